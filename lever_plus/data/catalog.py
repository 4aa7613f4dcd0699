"""Which data sets there are and where their files lie (configs/dataset/*.yaml). No torch, no image is opened."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lever_plus import config
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError, expand

SPLITS = ("train", "val")
KEYS = (
    "base", "name", "path_variable", "default_path", "default_coco_path", "questions", "annotations", "merged",
    "images", "image_name", "generator", "generator_args", "stand_in", "clip", "settings", "groups", "candidates_only",
)  # fmt: skip
"""What a configs/dataset/*.yaml may hold."""


@dataclass(frozen=True)
class DatasetConfig:
    """One configs/dataset/*.yaml with its path patterns filled in.

    ``questions``, ``annotations`` and ``merged`` give a file per split; ``image_dirs`` the folders that are
    tried in order; ``image_name`` a pattern with ``{image_id}``. ``groups`` is a file {question_id: group} (None
    where the data set has none), ``candidates_only`` the groups whose train items are never training queries.
    ``path_variable`` is "" where the folder follows from the results folder alone.
    """

    key: str
    name: str
    root: Path
    questions: dict[str, Path]
    annotations: dict[str, Path]
    merged: dict[str, Path]
    image_dirs: dict[str, list[Path]]
    image_name: dict[str, str]
    path_variable: str
    generator: str = ""
    generator_args: dict[str, Any] = field(default_factory=dict)
    stand_in: dict[str, str] = field(default_factory=dict)
    clip: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    groups: Path | None = None
    candidates_only: tuple[str, ...] = ()

    def found(self) -> bool:
        """Whether the annotation files of both splits are there (in either layout)."""
        return all(self._files(split) is not None for split in SPLITS)

    def files(self, split: str) -> list[Path]:
        """The JSON files of a split: [questions, annotations], or [merged] where only that is there.

        Raises:
            MissingInputError: neither layout is there; names the variable to set.
        """
        there = self._files(split)
        if there is None:
            where = f"{self.key}: {self.questions[split]} not found"
            if not self.path_variable:
                raise MissingInputError(f"{where} (make it with: python -m lever_plus.pipeline dataset)")
            raise MissingInputError(
                f"{where}; set {self.path_variable} to the folder that holds the "
                f"official questions and annotations JSON (now: {self.root})"
            )
        return there

    def group_files(self) -> list[Path]:
        """[the groups file], or [] for a data set without groups.

        Raises:
            MissingInputError: the YAML names one and it is not there.
        """
        if self.groups is not None and not self.groups.is_file():
            raise MissingInputError(f"{self.key}: groups file {self.groups} not found (groups in {self.key}.yaml)")
        return [] if self.groups is None else [self.groups]

    def question_count(self, split: str) -> int | None:
        """About how many questions a split has, without reading them as JSON; None where the files are not there."""
        there = self._files(split)
        return there[0].read_bytes().count(b'"question_id"') if there else None

    def _files(self, split: str) -> list[Path] | None:
        official = [self.questions[split], self.annotations[split]]
        if all(path.is_file() for path in official):
            return official
        if split in self.merged and self.merged[split].is_file():
            return [self.merged[split]]
        return None


def names() -> list[str]:
    """The data sets that have a configuration."""
    return sorted(path.stem for path in (config.CONFIG_DIR / "dataset").glob("*.yaml"))


def load(key: str, settings: Any) -> DatasetConfig:
    """Read configs/dataset/<key>.yaml; ``settings`` gives the paths (``okvqa_path``, ``coco_path``, …).

    A YAML with ``base: <other>`` has what that one has, key by key, where it says nothing itself; its ``name`` is its
    key then. The folder variable of a base that is generated stays the base's own.

    Raises:
        UsageError: an unknown data set (names the known). DamagedInputError: a key of the YAML is missing.
    """
    path = config.CONFIG_DIR / "dataset" / f"{config.check_name(key, 'DATASET')}.yaml"
    raw = _with_base(path, key, ())
    try:
        variable, name = raw["path_variable"], config.check_name(str(raw["name"]), f"{path}: name")
        default = raw["default_path"].format(result_dir=settings.result_dir, name=name)
        root = (getattr(settings, variable.lower()) if variable else "") or default
        coco = settings.coco_path or raw["default_coco_path"].format(root=root)
        places = {"root": root, "coco": coco}

        def fill(pattern: str) -> Path:
            return expand(pattern.format(**places), f"{path}: path ")

        return DatasetConfig(
            key=key,
            name=name,
            root=expand(root, variable or f"{path}: default_path"),
            questions={s: fill(raw["questions"][s]) for s in SPLITS},
            annotations={s: fill(raw["annotations"][s]) for s in SPLITS},
            merged={s: fill(p) for s, p in raw.get("merged", {}).items()},
            image_dirs={s: [fill(p) for p in raw["images"][s]] for s in SPLITS},
            image_name={s: str(raw["image_name"][s]) for s in SPLITS},
            path_variable=variable,
            generator=raw.get("generator", ""),
            generator_args=dict(raw.get("generator_args", {})),
            stand_in=dict(raw.get("stand_in", {})),
            clip=raw.get("clip", ""),
            settings=dict(raw.get("settings", {})),
            groups=fill(raw["groups"]) if raw.get("groups") else None,
            candidates_only=tuple(str(group) for group in raw.get("candidates_only", ())),
        )
    except KeyError as error:
        raise DamagedInputError(f"{path}: key {error} is missing") from error
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        raise DamagedInputError(f"{path}: a value of the wrong form ({error})") from error


def _with_base(path: Path, key: str, above: tuple[str, ...]) -> dict[str, Any]:
    """The YAML with what it takes from its base; mappings are joined key by key."""
    own = config.load_yaml(path)
    for name in own:
        if name not in KEYS:
            raise UsageError(f"{path}: unknown key {str(name)[:60]!r}; there are: {', '.join(KEYS)}")
    if "base" not in own:
        return own
    if key in above or not isinstance(own["base"], str):
        raise DamagedInputError(f"{path}: base {own['base']!r} is not the name of another data set")
    below = config.check_name(own["base"], f"{path}: base")
    base = _with_base(path.with_name(f"{below}.yaml"), below, (*above, key))
    if base.get("generator"):
        base["path_variable"] = ""
    merged = {**base, "name": key, **own}
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            merged[name] = {**base[name], **value}
    return merged


def pick(settings: Any) -> str:
    """The data set's key; ``auto`` is okvqa_local where its files are found, else mini_okvqa."""
    if settings.dataset != "auto":
        load(settings.dataset, settings)  # an unknown name is an error here
        return settings.dataset
    return "okvqa_local" if load("okvqa_local", settings).found() else "mini_okvqa"
