"""Reproduce the rows of a release bundle, and say what does not match.

    python -m lever_plus.release.reproduce BUNDLE [METHOD …] [--NAME value …] [-n]

Needs the data set and the model (OKVQA_PATH, QWEN2_5_VL_3B_PATH, … as for a run), nothing else of the machine that made
the bundle. The bundle's own settings hold; results go to a folder of their own, RESULT_DIR/reproduced/<digest>. METHOD:
only these rows. -n checks the bundle, the data set and the model, and stops there.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import cli, config, io, paths, provenance
from lever_plus.cli import log
from lever_plus.data.dataset import load_split
from lever_plus.experiments.samples import read_samples
from lever_plus.registries import plugins_of
from lever_plus.release import bundle
from lever_plus.release.pack import clip_fingerprint, kept_settings
from lever_plus.settings import loading
from lever_plus.settings.inference import InferenceSettings
from lever_plus.stages import lvlm, prepare_dataset
from open_mmicl.errors import DamagedInputError, MissingInputError, NumericError, UsageError
from open_mmicl.lazy import lazy

selectors = lazy("lever_plus.selectors")
retrieval = lazy("lever_plus.stages.retrieval")

RUN = "reproduced"
Key = tuple[str, int, int | None, int | str]
"""(method, shot, seed, question_id) of a pick."""


@dataclass(frozen=True)
class Row:
    """One row and shot of the record, in the bundle and here.

    Attributes:
        picks, prompts, answers, scores: queries whose demonstrations, prompt, answer or score differ.
    """

    method: str
    shot: str
    bundle: float
    here: float | None
    ci95: bool
    n: int
    picks: int = 0
    prompts: int = 0
    answers: int = 0
    scores: int = 0

    @property
    def same(self) -> bool:
        """Whether accuracy, interval and every pick and answer are the bundle's, to the digit."""
        return (
            self.bundle == self.here and self.ci95 and not (self.picks or self.prompts or self.answers or self.scores)
        )

    def told(self) -> str:
        """A line of the table."""
        here = "none" if self.here is None else f"{self.here:.4f}"
        counts = (("picks", self.picks), ("prompts", self.prompts), ("answers", self.answers), ("scores", self.scores))
        differ = [f"{what} of {number} of {self.n} queries" for what, number in counts if number]
        differ += ["accuracy"] if self.bundle != self.here else []
        differ += ["interval"] if not self.ci95 else []
        said = "the same" if self.same else f"DIFFERS: {', '.join(differ)}"
        return f"  {self.method:<16} shot {self.shot}: {self.bundle:8.4f} {here:>9}   {said}"


def values_of(made: bundle.Bundle, methods: Sequence[str], out: Path) -> dict[str, str]:
    """The settings of the reproduction, by name, as texts.

    Raises:
        UsageError: a method that the bundle does not hold. DamagedInputError: settings that are none here.
    """
    unknown = [method for method in methods if method not in made.head["methods"]]
    if unknown:
        raise UsageError(f"{made.path} has no method {unknown[0]!r}; it has: {', '.join(made.head['methods'])}")
    own = made.head["settings"]
    foreign = sorted(own.keys() - kept_settings(own).keys())
    if foreign:
        raise DamagedInputError(f"bundle {made.path}: this version has no setting {foreign[0][:60]!r}")
    values = {name: str(value) for name, value in own.items()}
    values |= {"METHODS": " ".join(methods or made.head["methods"]), "RESULT_DIR": str(out), "RUN_NAME": RUN}
    places = {"v3": "LEVER_LM_CHECKPOINT_PATH", "v2": "V2_CHECKPOINT_PATH"}
    return values | {
        name: str(out / "selectors" / f"{m}.safetensors") for m, name in places.items() if m in made.selectors
    }


def told_of_environment(values: Mapping[str, str]) -> list[str]:
    """The settings of the environment that the bundle's take the place of."""
    given = {**config.read_dotenv(), **os.environ}
    ours = ("RESULT_DIR", "RUN_NAME", "DATASET")
    return [name for name, value in values.items() if given.get(name, value) not in (value, "") and name not in ours]


def check_needs(made: bundle.Bundle, s: InferenceSettings) -> list[str]:
    """See that data set and model are the bundle's; returns what else is not the same.

    Raises:
        UsageError: they are not; says which to set. MissingInputError: not there at all.
    """
    there, found = made.head["needs"], paths.dataset(s)
    here = lvlm.prompt_inputs(s, ("train", "val"))
    variable = found.path_variable or "DATASET_PATH"
    for split in ("train", "val"):
        wanted, got = _entry(there, "dataset", split), here["dataset"][split]
        if wanted != got:
            raise UsageError(
                f"{s.dataset}: the {split} questions or annotations are not the bundle's (fingerprint {got[:12]}, "
                f"the bundle's {str(wanted)[:12]}); set {variable} to the files that it was made with"
            )
    model, ours = there.get("model"), here["model"]
    differ = [n for n in ours if not isinstance(model, dict) or model.get(n) != ours[n]]
    if differ:
        raise UsageError(
            f"the model here is not the bundle's {str(there.get('lvlm'))[:60]}: {', '.join(differ)} differ; set the "
            f"path of that one (configs/infer_model/{paths.infer_model_yaml(s).stem}.yaml names the variable)"
        )
    if there.get("prompt_format") != here["prompt_format"]:
        raise UsageError("the prompt's words in this version are not the bundle's; use the version that made_by names")
    plugins = there.get("plugins") or {}
    if plugins != plugins_of(config.as_dict(s)):
        raise UsageError(f"the bundle needs your own {', '.join(plugins) or 'none'} (LEVER_PLUGINS) as it was then")
    notes, clip = [], _entry(there, "clip", "files")
    if clip != clip_fingerprint(s):
        notes.append("CLIP is not the bundle's: embeddings, and with them picks, may differ (CLIP_PATH)")
    return notes


def _entry(there: dict[str, Any], name: str, key: str) -> Any:
    part = there.get(name)
    return part.get(key) if isinstance(part, dict) else None


def check_images(made: bundle.Bundle, s: InferenceSettings) -> int:
    """See that every image of a prompt is the bundle's; returns how many there are.

    Raises:
        MissingInputError: one is not there. UsageError: one has other bytes.
    """
    hashes = made.json(bundle.IMAGES)
    for split in ("train", "val"):
        found = load_split(paths.dataset(s), split)
        wanted = {n: sha for n, sha in hashes.items() if n.startswith(f"{split}/")}
        for row in range(len(found)):
            name = f"{split}/{found.image_name(row)}"
            if (sha := wanted.pop(name, None)) and io.sha256_file(Path(found.image_path(row)))[:16] != sha:
                raise UsageError(
                    f"image {found.image_path(row)} is not the bundle's (other bytes); restore the original"
                )
        if wanted:
            raise MissingInputError(
                f"{s.dataset} has no image {next(iter(wanted))[:100]}, which the bundle's prompts show"
            )
    return len(hashes)


def place_selectors(made: bundle.Bundle, s: InferenceSettings, out: Path) -> None:
    """Write the bundle's selectors where an evaluation looks for them, and see that each can be read.

    Raises:
        DamagedInputError: one is no selector.
    """
    usual = {"label": paths.label_checkpoint(s), "v1": paths.v2_checkpoint(s, "v1")}
    for method, data in made.selectors.items():
        path = out / "selectors" / f"{method}.safetensors"
        with io.atomic_path(path) as temporary:
            temporary.write_bytes(data)
        selector = selectors.PointerSelector.load(path)
        if method in usual:
            selector.save(usual[method], method, 0, {}, {}, {})


def anchors_of(made: bundle.Bundle, s: InferenceSettings) -> list[str]:
    """What does not match of the anchors and RL queries: question_ids that the train split has not."""
    known = set(load_split(paths.dataset(s), "train").question_ids.tolist())
    lost = {name: [q for q in ids if q not in known] for name, ids in made.json(bundle.ANCHORS).items()}
    return [
        f"{len(ids)} queries of {name} are not in the train split, the first {ids[0]}"
        for name, ids in lost.items()
        if ids
    ]


def pools_of(made: bundle.Bundle, s: InferenceSettings) -> list[str]:
    """What does not match of the pools."""
    train, queries, rows, pools = retrieval.evaluated(s)
    ids = np.asarray(train.question_ids)
    here = {queries.question_id(int(row)): ids[pool].tolist() for row, pool in zip(rows, pools, strict=True)}
    there = {line["question_id"]: line.get("pool") for line in made.lines(bundle.POOLS)}
    if here.keys() != there.keys():
        return [f"queries: {len(here.keys() ^ there.keys())} are evaluated here or in the bundle only"]
    differ = [q for q in here if here[q] != there[q]]
    return [f"pools of {len(differ)} of {len(here)} queries, the first {differ[0]}"] if differ else []


def rows_of(made: bundle.Bundle, s: InferenceSettings, methods: Sequence[str]) -> list[Row]:
    """Every row and shot, in the bundle and in the run that was just made."""
    folder = paths.inference_dir(s, RUN)
    metrics, train = io.read_object(folder / "metrics.json", "metrics"), load_split(paths.dataset(s), "train")
    here: dict[Key, dict[str, Any]] = {}
    for r in read_samples(folder / "samples.jsonl").rows:
        here[r["method"], r["shot"], r["seed"], r["question_id"]] = r
    by_row: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any] | None]]] = {}
    for line in made.lines(bundle.PICKS):
        key = (line.get("method"), line.get("shot"), line.get("seed"), line["question_id"])
        by_row.setdefault((str(key[0]), str(key[1])), []).append((line, here.get(key)))  # type: ignore[arg-type]
    found = []
    for method in methods:
        for shot, value in made.head["accuracy"].get(method, {}).items():
            pairs = by_row.get((method, shot), [])
            ours = metrics["accuracy"].get(method, {}).get(shot)
            same_ci = made.head["ci95"].get(method, {}).get(shot) == metrics["ci95"].get(method, {}).get(shot)
            counts = {
                "picks": sum(
                    r is None or [train.question_id(i) for i in r["icd_ids"]] != p.get("picks") for p, r in pairs
                ),
                "prompts": sum(r is not None and r["prompt_hash"] != p.get("prompt_hash") for p, r in pairs),
                "answers": sum(r is not None and r["raw_answer"] != p.get("raw_answer") for p, r in pairs),
                "scores": sum(r is not None and r["score"] != p.get("score") for p, r in pairs),
            }
            found.append(Row(method, shot, value, ours, same_ci, len(pairs), **counts))
    return found


def versions_of(made: bundle.Bundle) -> list[str]:
    """Packages whose version is not that of the bundle's machine."""
    there, here = made.head["made_by"].get("versions") or {}, provenance.provenance()["versions"]
    return [f"{n} {here[n]} (there {there[n]})" for n in here if n in there and there[n] != here[n]]


def reproduce(made: bundle.Bundle, methods: Sequence[str], results: Path, dry_run: bool) -> int:
    """Check, run, compare; returns 0 where everything asked for is the same.

    Raises:
        NumericError: it is not; the lines before say what. UsageError, MissingInputError, DamagedInputError.
    """
    out = results / "reproduced" / made.head["digest"][:12]
    values = values_of(made, methods, out)
    if replaced := told_of_environment(values):
        log.info(f"note: the bundle's values hold, not yours, of: {', '.join(sorted(replaced))}")
    s = loading.load(InferenceSettings, values)
    prepare_dataset.run(s, dry_run)
    if dry_run and not paths.dataset(s).found():
        log.info("dry run: it and the model are compared with the bundle's once it is there")
        return 0
    notes = check_needs(made, s)
    log.info(f"data set {s.dataset} and model {made.head['needs'].get('lvlm')}: the bundle's")
    log.info(f"{check_images(made, s)} images of its prompts: the bundle's")
    if versions := versions_of(made):
        notes.append(f"versions differ: {', '.join(versions)}")
    for note in notes:
        log.info(f"note: {note}")
    if dry_run:
        log.info(f"dry run: would evaluate {values['METHODS']} on {made.head['n_queries']} queries in {out}")
        return 0
    place_selectors(made, s, out)
    env = {**os.environ, **values, "PYTHONUNBUFFERED": "1", "LEVER_NAMES_CHECKED": "1", "LEVER_TABLE_LATER": "1"}
    code = cli.call([sys.executable, "-m", "lever_plus.pipeline", "inference"], env)
    if code != 0:
        return code
    wrong = anchors_of(made, s) + pools_of(made, s)
    found = rows_of(made, s, methods or made.head["methods"])
    log.info("\n".join([f"{'':<18} accuracy: bundle, here", *(row.told() for row in found)]))
    for line in wrong:
        log.info(f"  DIFFERS: {line}")
    odd = [row for row in found if not row.same]
    if odd or wrong or not found:
        raise NumericError(
            f"not reproduced: {len(odd)} of {len(found)} rows{' and ' + '; '.join(wrong) if wrong else ''} differ "
            f"from the bundle (see above{'; ' + notes[0] if notes else ''})"
        )
    log.info(f"reproduced: all {len(found)} rows to the digit, every pick and answer the same ({out})")
    return 0


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    names, rest = cli.positional(argv)
    found: list[bundle.Bundle] = []

    def load(values: dict[str, str]) -> InferenceSettings:
        if not names:
            raise UsageError(
                "which bundle? reproduce BUNDLE [METHOD …] (pack one with: bash scripts/bundle.sh EXP_NAME)"
            )
        found.append(bundle.read(Path(names[0])))
        os.environ.update(values)  # for the evaluation, which is a process of its own
        return loading.load(
            InferenceSettings, {**values, "DATASET": str(found[0].head["settings"].get("DATASET", ""))}
        )

    def body(s: InferenceSettings, dry_run: bool) -> int:
        return reproduce(found[0], names[1:], Path(s.result_dir), dry_run)

    return cli.stage_main(InferenceSettings, body, __doc__ or "", rest, load)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
