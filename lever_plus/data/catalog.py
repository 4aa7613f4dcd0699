"""Which data sets there are and where their files lie (configs/dataset/*.yaml, docs/datasets.md). No torch, no image
is opened.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lever_plus import config
from lever_plus.registries import READERS
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError, expand, foreign

SPLITS = ("train", "val")
KEYS = (
    "base", "name", "path_variable", "default_path", "default_coco_path", "questions", "annotations", "merged",
    "images", "image_name", "generator", "generator_args", "stand_in", "clip", "settings", "groups", "candidates_only",
    "reader", "reader_args", "files", "fields", "annotators", "val_share", "val_seed",
)  # fmt: skip
"""What a configs/dataset/*.yaml may hold."""
FIELDS = ("question", "answers", "question_id", "image", "image_id")
"""What ``fields`` of a YAML may name: where an item of the file has it."""
FORMER_FIELDS = ("question_type", "answer_type")
"""Older YAMLs may name these; nothing reads them."""
OFFICIAL = "official"
EMBEDDED = "mini_okvqa"
CLIP = "openai/clip-vit-base-patch32"
VAL_SHARE = 0.2
SMALL = 4 << 20  # bytes of files
_FUNCTION = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")
_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*_(PATH|DIR)")


@dataclass(frozen=True)
class DatasetConfig:
    """One configs/dataset/*.yaml with its path patterns filled in.

    ``questions``, ``annotations`` and ``merged`` give a file per split; ``image_dirs`` the folders that are
    tried in order; ``image_name`` a pattern with ``{image_id}``. ``groups`` is a file {question_id: group} (None
    where the data set has none), ``candidates_only`` the groups whose train items are never training queries.
    ``path_variable`` is "" where the folder follows from the results folder alone.

    With a ``reader`` other than "official" the questions come from ``items`` (files per split, patterns with *
    allowed; both splits name the same files where ``val_share`` parts them by image), ``fields`` says what is called
    what in them, and ``extracted`` is the folder for pictures that the files hold themselves. ``annotators`` is how
    many answers each question must have (0: any number).
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
    reader: str = OFFICIAL
    reader_args: dict[str, Any] = field(default_factory=dict)
    items: dict[str, list[Path]] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    annotators: int = 10
    val_share: float = 0.0
    val_seed: int = 0
    extracted: Path = Path()

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
            missing = self.expected(split)[0]
            where = f"{self.key}: {missing} not found"
            if not self.path_variable:
                raise MissingInputError(f"{where} (make it with: python -m lever_plus.pipeline dataset)")
            raise MissingInputError(
                f"{where}; set {self.path_variable} to the folder that holds the "
                f"{'official questions and annotations JSON' if self.reader == OFFICIAL else 'data set'} "
                f"(now: {self.root})"
            )
        return there

    def expected(self, split: str) -> list[Path]:
        """The files of a split that are not there, in the layout that the YAML names first."""
        wanted = self.items[split] if self.items else [self.questions[split], self.annotations[split]]
        return [path for path in wanted if not _matches(path)]

    def group_files(self) -> list[Path]:
        """[the groups file], or [] for a data set without groups.

        Raises:
            MissingInputError: the YAML names one and it is not there.
        """
        if self.groups is not None and not self.groups.is_file():
            raise MissingInputError(f"{self.key}: groups file {self.groups} not found (groups in {self.key}.yaml)")
        return [] if self.groups is None else [self.groups]

    def question_count(self, split: str, largest: int | None = None) -> int | None:
        """About how many questions a split has, without reading them as JSON; None where the files are not there, of a
        form that has to be read for it, or larger than ``largest`` bytes.
        """
        there = self._files(split) if not self.items else None
        if not there or (largest is not None and there[0].stat().st_size > largest):
            return None
        with foreign("VQA file", there[0]):
            return there[0].read_bytes().count(b'"question_id"')

    def is_small(self) -> bool:
        """Whether a data set with a reader is read in no time."""
        files = [path for split in SPLITS for path in (self._files(split) or [])]
        return bool(self.items and files) and sum(path.stat().st_size for path in set(files)) < SMALL

    def _files(self, split: str) -> list[Path] | None:
        if self.items:
            matches = [_matches(path) for path in self.items[split]]
            return [path for some in matches for path in some] if all(matches) else None
        official = [self.questions[split], self.annotations[split]]
        if all(path.is_file() for path in official):
            return official
        if split in self.merged and self.merged[split].is_file():
            return [self.merged[split]]
        return None


def _matches(path: Path) -> list[Path]:
    if any(mark in path.name for mark in "*?["):
        return sorted(found for found in path.parent.glob(path.name) if found.is_file())
    return [path] if path.is_file() else []


def names() -> list[str]:
    """The data sets that have a configuration."""
    return sorted({path.stem for folder in config.config_dirs("dataset") for path in folder.glob("*.yaml")})


def load(key: str, folders: Mapping[str, str]) -> DatasetConfig:
    """Read configs/dataset/<key>.yaml.

    Args:
        folders: what the variables of folders say: RESULT_DIR, and where they are set COCO_PATH, DATASET_PATH and
            those that YAMLs name (OKVQA_PATH, …); "" is not set. See :func:`lever_plus.paths.folders`.

    A YAML with ``base: <other>`` has what that one has, key by key, where it says nothing itself; its ``name`` is its
    key then. The folder variable of a base that is generated stays the base's own.

    Raises:
        UsageError: an unknown data set (names the known). DamagedInputError: a key of the YAML is missing.
    """
    path = config.config_file("dataset", config.check_name(key, "DATASET"))
    raw = _with_base(path, key, ())
    try:
        own = _Own(path, raw)
        variable, name = own.variable, config.check_name(str(raw.get("name", key)), f"{path}: name")
        default = _filled(path, raw.get("default_path", "data/{name}"), result_dir=folders["RESULT_DIR"], name=name)
        root = _folder(folders, variable, bool(raw.get("generator"))) or default
        coco = folders.get("COCO_PATH") or _filled(path, raw.get("default_coco_path", "data/coco"), root=root)
        places = {"root": root, "coco": coco}

        def fill(pattern: str) -> Path:
            return expand(_filled(path, pattern, **places), f"{path}: path ")

        official, extracted = own.reader == OFFICIAL, Path(folders["RESULT_DIR"]) / name / "images"
        return DatasetConfig(
            key=key,
            name=name,
            root=expand(root, variable or f"{path}: default_path"),
            questions={s: fill(raw["questions"][s]) for s in SPLITS} if official else {},
            annotations={s: fill(raw["annotations"][s]) for s in SPLITS} if official else {},
            merged={s: fill(p) for s, p in raw.get("merged", {}).items()} if official else {},
            image_dirs={
                s: [*([extracted] if own.reader == "parquet" else []), *map(fill, of)] for s, of in own.images.items()
            },
            image_name=own.image_name,
            path_variable=variable,
            generator=raw.get("generator", ""),
            generator_args=dict(raw.get("generator_args", {})),
            stand_in=dict(raw.get("stand_in", {})),
            clip=raw.get("clip", CLIP),
            settings=dict(raw.get("settings", {})),
            groups=fill(raw["groups"]) if raw.get("groups") else None,
            candidates_only=tuple(str(group) for group in raw.get("candidates_only", ())),
            reader=own.reader,
            reader_args=own.reader_args,
            items={s: [fill(p) for p in of] for s, of in own.files.items()},
            fields=own.fields,
            annotators=own.annotators,
            val_share=own.val_share,
            val_seed=own.val_seed,
            extracted=extracted,
        )
    except KeyError as error:
        raise DamagedInputError(f"{path}: key {error} is missing") from error
    except (TypeError, AttributeError, ValueError, IndexError) as error:
        raise DamagedInputError(f"{path}: a value of the wrong form ({error})") from error


def _filled(path: Path, pattern: object, **values: str) -> str:
    """A path of the YAML with ``{root}`` and the like filled in."""
    try:
        return config.fill_in(str(pattern), **values)
    except KeyError as error:
        there = ", ".join(f"{{{name}}}" for name in values)
        raise DamagedInputError(f"{path}: {str(pattern)[:80]!r}: {{{error.args[0]}}} is none of: {there}") from error


def _folder(folders: Mapping[str, str], variable: str, generated: bool) -> str:
    """What the data set's variable says; else DATASET_PATH, but for a data set that is generated or has no variable."""
    return folders.get(variable, "") or ("" if generated or not variable else folders.get("DATASET_PATH", ""))


class _Own:
    """The keys by which a YAML describes files of one's own, checked.

    Raises:
        UsageError: a value is not allowed. KeyError, TypeError: a key is missing, or of the wrong form.
    """

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path = path
        self.variable = "DATASET_PATH" if raw.get("path_variable") is None else str(raw["path_variable"])
        if "path_variable" not in raw and raw.get("reader") is None:
            raise KeyError("path_variable")
        if self.variable and not _VARIABLE.fullmatch(self.variable):
            raise self._refused("path_variable", self.variable, "capitals that end in _PATH or _DIR")
        self.reader = self._reader(str(raw.get("reader", OFFICIAL)))
        self.reader_args = self._mapping(raw, "reader_args")
        self.fields = {name: str(value) for name, value in self._mapping(raw, "fields").items()}
        unknown = [name for name in self.fields if name not in FIELDS + FORMER_FIELDS]
        if unknown:
            raise self._refused("fields", unknown[0], ", ".join(FIELDS))
        for key in ("questions", "annotations", "merged", "images", "image_name"):
            of_splits = raw.get(key)
            odd = [name for name in of_splits if name not in SPLITS] if isinstance(of_splits, dict) else []
            if odd:
                raise self._refused(key, odd[0], " and ".join(SPLITS))
        self.annotators = self._number(raw, "annotators", 0 if "reader" in raw else 10, 0, 1000, whole=True)
        self.val_seed = self._number(raw, "val_seed", 0, 0, config.LARGEST_SEED, whole=True)
        self.files: dict[str, list[str]] = {}
        self.val_share = 0.0
        official = self.reader == OFFICIAL
        if not official:
            self._take_files(raw)
        elif "files" in raw:
            raise self._refused("files", raw["files"], "questions and annotations, with reader: official")
        if official and "val_share" in raw:
            raise self._refused("val_share", raw["val_share"], "a reader whose files are one split")
        pictures = raw["images"] if official else raw.get("images", "{root}")
        self.images = {s: _list(pictures[s] if isinstance(pictures, dict) else pictures) for s in SPLITS}
        pattern = raw["image_name"] if official else raw.get("image_name", "{image_id}")
        self.image_name = {s: str(pattern[s] if isinstance(pattern, dict) else pattern) for s in SPLITS}

    def _reader(self, given: str) -> str:
        """The reader as the rest knows it: a function's file is looked for beside the YAML, then where one works."""
        if given in (OFFICIAL, *READERS):
            return given
        function = _FUNCTION.fullmatch(given)
        if not function:
            raise self._refused("reader", given, f"{', '.join((OFFICIAL, *READERS))}, or path/to/file.py:function")
        file = expand(function["file"], f"{self.path}: reader ")
        beside = self.path.parent / file
        return f"{beside if beside.is_file() else file}:{function['name']}"

    def _take_files(self, raw: dict[str, Any]) -> None:
        files = raw["files"]
        if isinstance(files, dict) and set(files) == set(SPLITS):
            if "val_share" in raw:
                raise self._refused("val_share", raw["val_share"], "files of one split; these have a val already")
            self.files = {s: _list(files[s]) for s in SPLITS}
            return
        if isinstance(files, dict):
            if set(files) != {"train"}:
                raise self._refused("files", ", ".join(map(str, files)), "train and val, or train alone with val_share")
            files = files["train"]
        self.files = dict.fromkeys(SPLITS, _list(files))
        self.val_share = self._number(raw, "val_share", VAL_SHARE, 0.01, 0.9)

    def _mapping(self, raw: dict[str, Any], key: str) -> dict[str, Any]:
        value = raw.get(key) or {}
        if not isinstance(value, dict):
            raise self._refused(key, value, "{name: value, …}")
        return {str(name): what for name, what in value.items()}

    def _number(self, raw: dict[str, Any], key: str, default: Any, lo: float, hi: float, whole: bool = False) -> Any:
        value = raw.get(key, default)
        if type(value) not in ((int,) if whole else (int, float)) or not lo <= value <= hi:
            raise self._refused(key, value, f"{'a whole number' if whole else 'a number'} from {lo} to {hi}")
        return value

    def _refused(self, key: str, value: Any, allowed: str) -> UsageError:
        return UsageError(f"{self.path}: {key}: {str(value)[:80]!r} is not allowed: {allowed}")


def _list(value: Any) -> list[str]:
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(one, str) and one for one in found):
        raise TypeError(f"{value!r} is neither a path nor a list of paths")
    return found


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
    base = _with_base(config.config_file("dataset", below), below, (*above, key))
    if base.get("generator"):
        base["path_variable"] = ""
    merged = {**base, "name": key, **own}
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            merged[name] = {**base[name], **value}
    return merged


def pick(key: str, folders: Mapping[str, str]) -> DatasetConfig:
    """The data set; ``auto`` is okvqa_local where its files are found, else mini_okvqa."""
    if key != "auto":
        return load(key, folders)
    local = load("okvqa_local", folders)
    return local if local.found() else load(EMBEDDED, folders)
