"""Where the item embeddings of validation queries lie. No torch until a file of the original Lever-Plus is opened."""

from pathlib import Path

from lever_plus import paths
from lever_plus import run as provenance
from lever_plus.data.dataset import load_split
from lever_plus.settings.shared import SharedSettings
from open_mmicl.lazy import lazy

embeddings = lazy("lever_plus.data.embeddings")


def query_embeddings_file(settings: SharedSettings) -> Path:
    """The validation split's embeddings.

    The original Lever-Plus's query_embeddings.pt holds the train split; where such a file is found, ours lies
    beside it as val_embeddings.pt.
    """
    usual = paths.query_embeddings(settings)
    if not usual.is_file() or provenance.sidecar(usual).is_file():
        return usual

    train, val = (len(load_split(settings, split)) for split in ("train", "val"))
    rows = len(embeddings.load_embeddings(usual, "query embeddings"))
    return usual.with_name(usual.name.replace("query_", "val_")) if rows == train != val else usual
