"""The channels that the LVLM gives the selector: its hidden states of every item, its embeddings of every answer.

For each item one zero-shot prompt (image and question) is read where the model is about to answer; an answer costs no
prompt. Writes results/<data set>/cache/lvlm_….npy of both splits and the answers of the train split, each where
EMBEDDING asks for it. Processes share the prompts; an interrupted run resumes.
"""

import hashlib
import os
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import cli, io, paths, provenance, shards
from lever_plus.cli import log
from lever_plus.data import channel_names
from lever_plus.data.dataset import VqaSplit, load_split
from lever_plus.devices import select_gpu, torch_device
from lever_plus.settings import word_lists
from lever_plus.settings.data import ChannelSettings
from lever_plus.stages import export_embeddings, lvlm, recipes
from open_mmicl.interface.prompts import Prompt
from open_mmicl.lazy import lazy

clip_features = lazy("lever_plus.data.clip_features")

CHUNK = 64  # items per unit of work


def outputs(settings: ChannelSettings) -> dict[Path, provenance.Recipe]:
    """What is to be made, and from what."""
    wanted: dict[Path, provenance.Recipe] = {}
    for name in channel_names.names(settings):
        if name == "lvlm":
            for split in ("train", "val"):
                wanted[paths.lvlm_states(settings, split)] = _states_recipe(settings, split)
        elif name in word_lists.OF_CANDIDATES:
            wanted[paths.answer_embeddings(settings, name)] = _answers_recipe(settings, name)
    return wanted


def _states_recipe(settings: ChannelSettings, split: str) -> provenance.Recipe:
    inner = lvlm.inner_config(settings)
    inputs = {
        "dataset": load_split(paths.dataset(settings), split).fingerprint, "split": split,
        "model": lvlm.model_fingerprint(settings, inner), "prompt_format": inner.prompt_format.fingerprint(),
    }  # fmt: skip
    made_from = recipes.recipe(settings, ("states",), {}, inputs)
    made_from.values["layers"] = made_from.values.pop("lvlm_layers").split()  # as stamps have named them
    made_from.values["pool"] = made_from.values.pop("lvlm_pool")
    return made_from


def _answers_recipe(settings: ChannelSettings, name: str) -> provenance.Recipe:
    inputs: dict[str, Any] = {"dataset": load_split(paths.dataset(settings), "train").fingerprint}
    if name == "answer":
        inputs["model"] = lvlm.model_fingerprint(settings, lvlm.inner_config(settings))
        return recipes.recipe(settings, ("answers",), {}, inputs)
    files, clip = export_embeddings.clip_inputs(settings)
    return recipes.recipe(settings, ("answers",), files, {**inputs, **clip})


def is_done(settings: ChannelSettings) -> bool:
    """Whether everything is there and made from exactly this. No torch."""
    return all(provenance.status(path, made_from) == "current" for path, made_from in outputs(settings).items())


def run(settings: ChannelSettings, dry_run: bool) -> int:
    """Make what is missing, or say that it is there."""
    open_now = {
        path: made_from
        for path, made_from in outputs(settings).items()
        if not recipes.skip_if_done(path, made_from, path.stem.replace("_", " "))
    }
    if dry_run or not open_now:
        for path in open_now:
            log.info(f"dry run: would write {path}" + (f": {_price(settings, path)}" if "lvlm_" in path.name else ""))
        return 0
    select_gpu(settings.device, settings.gpu_id)
    engine: Any = None
    for path, made_from in open_now.items():
        if engine is None and not path.name.startswith("answer_clip"):
            engine = lvlm.load_engine(settings, lvlm.inner_config(settings))
        started = time.monotonic()
        if path.name.startswith("lvlm_"):
            _write_states(settings, engine, path, made_from, started)
        elif shards.rank() == 0:
            values = _answer_values(settings, path.name.startswith("answer_clip"), engine)
            with provenance.writing(path):
                with io.atomic_path(path) as temporary, temporary.open("wb") as handle:
                    np.save(handle, values, allow_pickle=False)
                provenance.stamp(path, made_from, time.monotonic() - started)
            log.info(f"answers: {path} {list(values.shape)}")
    return 0


def _split_of(settings: ChannelSettings, path: Path) -> VqaSplit:
    return load_split(paths.dataset(settings), "train" if path.stem.endswith("_train") else "val")


def _price(settings: ChannelSettings, path: Path) -> str:
    return f"{len(_split_of(settings, path))} prompts, zero-shot"


def _write_states(
    settings: ChannelSettings, engine: Any, output: Path, made_from: provenance.Recipe, started: float
) -> None:
    """Hidden states of a split, chunk by chunk into the rows of one file, which gets its name when all are there."""
    split = _split_of(settings, output)
    layers = word_lists.layers(settings.lvlm_layers)

    def states(rows: range) -> np.ndarray:
        prompts = [Prompt((), split.image_path(row), split.question(row)) for row in rows]
        return engine.hidden_states(prompts, layers, settings.lvlm_pool).flatten(1).numpy()

    width = states(range(1)).shape[1]
    partial = output.with_name(f".{output.name}.{made_from.fingerprint()[:16]}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    header = _header((len(split), width))
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as handle:
        handle.write(header)  # every process writes the same first bytes

        def work(start: int) -> str:
            rows = range(start, min(start + CHUNK, len(split)))
            data = np.ascontiguousarray(states(rows), dtype=np.float32).tobytes()
            handle.seek(len(header) + start * width * 4)
            handle.write(data)
            handle.flush()
            return hashlib.sha256(data).hexdigest()

        starts = list(range(0, len(split), CHUNK))
        what = f"hidden states of {'train' if output.stem.endswith('_train') else 'val'}"
        done = shards.sharded_map(starts, work, output, made_from.fingerprint(), what, CHUNK, len(split))
        if done is None:
            return
        for start in starts:  # rows that a machine's crash took from the file, though its list of parts survived
            handle.seek(len(header) + start * width * 4)
            size = min(CHUNK, len(split) - start) * width * 4
            if hashlib.sha256(handle.read(size)).hexdigest() != done[str(start)]:
                work(start)
    with provenance.writing(output):
        with io.atomic_path(output) as temporary:
            partial.rename(temporary)
        extra = {"prompts": {"hidden_states": len(split)}}
        provenance.stamp(output, made_from, time.monotonic() - started, extra)
    shards.finish(output)
    log.info(f"{output.name}: [{len(split)}, {width}] ({time.monotonic() - started:.0f} s)")


def _header(shape: tuple[int, int]) -> bytes:
    """The first bytes of a .npy file of float32 in rows."""
    head = BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return head.getvalue()


def _answer_values(settings: ChannelSettings, by_clip: bool, engine: Any) -> np.ndarray:
    """float32 [N, d]: each train item's most frequent answer, embedded by CLIP's text tower or by the LVLM."""
    train = load_split(paths.dataset(settings), "train")
    answers = [train.answer(row) for row in range(len(train))]
    distinct = sorted(set(answers))
    if by_clip:
        clip, device = export_embeddings.clip_path(settings), torch_device(settings.device, threads=1)
        values = clip_features.embed_texts(distinct, clip, device, settings.clip_batch)
    else:
        values = engine.answer_embeddings(distinct)
    place = {answer: i for i, answer in enumerate(distinct)}
    return values.numpy()[[place[answer] for answer in answers]].astype(np.float32)


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(ChannelSettings, run, __doc__))
