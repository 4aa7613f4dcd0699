"""Embedding files: float tensors [N, d], one row per item (contract, "Files")."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from lever_plus import io
from open_mmicl.errors import DamagedInputError

MAKE = "bash scripts/export_embeddings.sh"
MODALITIES = ("image", "text")
BLOCK = 1 << 16  # rows looked at together


def load_embeddings(path: Path, what: str, num_rows: int | None = None) -> torch.Tensor:
    """Read an embedding file.

    Args:
        what: what it is, for the error message, e.g. "query embeddings".
        num_rows: rows it must have.

    Returns: float32 [N, d] on the CPU.

    Raises:
        MissingInputError: no such file. DamagedInputError: not a tensor file, not a dense float [N, d]
        tensor, another number of rows, or a value that is not finite (names row and column).
    """
    return check_embeddings(io.load_torch(Path(path), what, MAKE), Path(path), what, num_rows)


def load_modalities(path: Path, what: str, num_rows: int | None = None) -> dict[str, torch.Tensor]:
    """Read a file of image and question embeddings apart, ``{"image": [N, d], "text": [N, d]}``.

    Raises:
        MissingInputError, DamagedInputError: as :func:`load_embeddings`.
    """
    return dict(ModalityFile(path, what, num_rows))


class ModalityFile(Mapping[str, torch.Tensor]):
    """As :func:`load_modalities`, each tensor read when it is asked for and kept by nobody but who asked.

    At VQAv2's size one of them is 1.4 GB.
    """

    def __init__(self, path: Path, what: str, num_rows: int | None = None) -> None:
        self._path, self._what, self._num_rows = Path(path), what, num_rows

    def __getitem__(self, name: str) -> torch.Tensor:
        value = io.load_torch(self._path, self._what, MAKE, mapped=True)
        if not isinstance(value, dict) or set(value) != set(MODALITIES):
            found = _describe(value)
            raise DamagedInputError(f"{self._what} {self._path}: expected the tensors image and text, got {found}")
        return check_embeddings(value[name], self._path, f"{self._what} ({name})", self._num_rows)

    def __iter__(self) -> Iterator[str]:
        return iter(MODALITIES)

    def __len__(self) -> int:
        return len(MODALITIES)


def check_embeddings(value: Any, path: Path, what: str, num_rows: int | None = None) -> torch.Tensor:
    """float32 [N, d] of what a file held.

    Raises:
        DamagedInputError: as :func:`load_embeddings`.
    """
    if not io.is_dense(value) or value.dim() != 2 or 0 in value.shape:
        raise DamagedInputError(f"{what} {path}: expected a float tensor [N, d], got {_describe(value)}")
    if num_rows is not None and value.shape[0] != num_rows:
        raise DamagedInputError(f"{what} {path}: {value.shape[0]} rows for {num_rows} items; it belongs to other data")
    value = value.detach().to(torch.float32)
    for first in range(0, len(value), BLOCK):
        bad = ~torch.isfinite(value[first : first + BLOCK])
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            found = f"row {first + row}, column {column} is {value[first + row, column].item()}"
            raise DamagedInputError(f"{what} {path}: {found}")
    return value


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor) and not value.is_nested:
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
