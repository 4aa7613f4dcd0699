"""CLIP embeddings of every item: candidates (train split) and queries (validation split).

Writes results/<data set>/cache/{candidate,query}_embeddings.pt ([N, d] float32) and the image and
question embeddings apart (clip_train.pt, clip_val.pt), which the similarity samplers read.
"""

import time
from pathlib import Path

from lever_plus import cli, io, paths, provenance
from lever_plus.cli import log
from lever_plus.data import channel_names
from lever_plus.data.dataset import load_split
from lever_plus.devices import select_gpu, torch_device
from lever_plus.settings.data import EmbeddingSettings
from lever_plus.stages import recipes
from lever_plus.stages.lvlm import repo_path
from open_mmicl.lazy import lazy

clip_features = lazy("lever_plus.data.clip_features")
embeddings = lazy("lever_plus.data.embeddings")


def clip_path(settings: EmbeddingSettings) -> str:
    """The CLIP model: CLIP_PATH, else the data set's; a folder of the repository becomes an absolute path."""
    return repo_path(settings.clip_path or paths.dataset(settings).clip)


def recipe(settings: EmbeddingSettings, split: str) -> provenance.Recipe:
    """What the embeddings of a split are made from."""
    files, clip = clip_inputs(settings)
    inputs = {"dataset": load_split(paths.dataset(settings), split).fingerprint, "split": split, **clip}
    return recipes.recipe(settings, ("embeddings",), files, inputs)


def clip_inputs(settings: EmbeddingSettings) -> tuple[dict[str, Path], dict[str, str]]:
    """(CLIP's folder, by role, where it is one; its name, where it is none)."""
    model = clip_path(settings)
    files = {"clip": Path(model)} if Path(model).is_dir() else {}
    return files, {"clip": "" if files else model}


def _files(settings: EmbeddingSettings) -> list[tuple[str, Path, Path]]:
    """(split, file of image and question apart, file of the item embeddings) of both splits."""
    whole = {"train": paths.candidate_embeddings(settings), "val": channel_names.query_embeddings_file(settings)}
    return [(split, paths.modality_embeddings(settings, split), combined) for split, combined in whole.items()]


def is_done(settings: EmbeddingSettings) -> bool:
    """Whether the embeddings of both splits are there and made from exactly this. No torch."""
    for split, apart, combined in _files(settings):
        if provenance.status(apart, recipe(settings, split)) != "current":
            return False
        whole = not channel_names.names(settings)
        if whole and provenance.status(combined, whole_recipe(settings, apart)) != "current":
            return False
    return True


def whole_recipe(settings: EmbeddingSettings, apart: Path) -> provenance.Recipe:
    """What the item embeddings of a split are made from: both modalities (``apart``), and how they are joined."""
    word = channel_names.item_word(settings.embedding)
    return recipes.recipe(settings, ("items",), {"parts": apart}, {"embedding": word})


def run(settings: EmbeddingSettings, dry_run: bool) -> int:
    """Embed both splits, each where it is not done."""
    select_gpu(settings.device, settings.gpu_id)
    for split, apart, combined in _files(settings):
        made_from, whole = recipe(settings, split), whole_recipe(settings, apart)
        if (
            not apart.exists()
            and combined.exists()
            and not provenance.sidecar(combined).exists()
            and recipes.skip_if_done(combined, whole, f"{split} embeddings")
        ):
            continue  # a file of the original Lever-Plus: only the combined embeddings are there
        if not recipes.skip_if_done(apart, made_from, f"CLIP embeddings of {split}"):
            if dry_run:
                more = "" if channel_names.names(settings) else f" and {combined}"
                log.info(f"dry run: would write {apart}{more}")
                continue
            embed(settings, split, apart, made_from)
        if channel_names.names(settings):
            continue  # the selector reads channels, no embedding of the whole item
        if not recipes.skip_if_done(combined, whole, f"{split} embeddings") and not dry_run:
            combine(settings, apart, combined, whole)
    return 0


def embed(settings: EmbeddingSettings, split: str, output: Path, made_from: provenance.Recipe) -> None:
    """Run CLIP over a split and write both modalities."""
    started = time.monotonic()
    rows, device = load_split(paths.dataset(settings), split), torch_device(settings.device)
    features = clip_features.embed_split(rows, clip_path(settings), device, settings.clip_batch)
    with provenance.writing(output):
        io.save_torch(output, features)
        provenance.stamp(output, made_from, time.monotonic() - started)
    log.info(f"CLIP embeddings of {split}: {tuple(features['image'].shape)} ({time.monotonic() - started:.0f} s)")


def combine(settings: EmbeddingSettings, apart: Path, output: Path, made_from: provenance.Recipe) -> None:
    """Item embeddings from the two modalities, as EMBEDDING and the lever_lm name ask."""
    word, parts = channel_names.item_word(settings.embedding), embeddings.ModalityFile(apart, "CLIP embeddings")
    combined = clip_features.combine_file(parts, word, settings.lever_lm)
    with provenance.writing(output):
        io.save_torch(output, combined)
        provenance.stamp(output, made_from, 0.0)


if __name__ == "__main__":
    raise SystemExit(cli.stage_main(EmbeddingSettings, run, __doc__))
