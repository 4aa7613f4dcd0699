"""Embedding files: float tensors [N, d], one row per item (docs/formats.md), and other forms of the same."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lever_plus import io
from open_mmicl.errors import DamagedInputError

log = logging.getLogger("lever_plus")
MAKE = "bash scripts/export_embeddings.sh"
MODALITIES = ("image", "text")
NAMES = ("embeddings", "embedding", "features", "query_embeddings", "candidate_embeddings", "data")
BLOCK = 1 << 16  # rows looked at together


def load_embeddings(path: Path, what: str, num_rows: int | None = None) -> torch.Tensor:
    """Read an embedding file.

    Args:
        what: what it is, for the error message, e.g. "query embeddings".
        num_rows: rows it must have.

    Returns: float32 [N, d] on the CPU.

    Raises:
        MissingInputError: no such file. DamagedInputError: not a tensor file, not a dense float [N, d]
        tensor or a plain form of one (:func:`understood`), another number of rows, or a value that is not finite
        (names row and column).
    """
    path = Path(path)
    value, form = understood(io.load_torch(path, what, MAKE), path, what)
    found = check_embeddings(value, path, what, num_rows)
    if form:
        log.info(f"{path.name}: {form}, read as {what} {list(found.shape)}")
    return found


def understood(value: Any, path: Path, what: str) -> tuple[Any, str]:
    """(the tensor meant, what the file held in words) of plain forms that are no tensor; the rest comes back as it is.

    * a list of vectors, of lists of numbers, or of blocks of rows: one after the other;
    * ``{"embeddings": …}`` or another of :data:`NAMES`, nothing beside it but numbers and texts;
    * ``{id: vector}`` with whole numbers as ids: in ascending order, which is the order of the rows whether the ids
      are row numbers or question_ids.

    Raises:
        DamagedInputError: vectors of different lengths or no numbers in them, or an id twice (``7`` and ``"7"``).
    """
    if isinstance(value, (list, tuple)) and value:
        return _stacked(value, path, what), f"a {type(value).__name__} of {len(value)} tensors or vectors"
    if not isinstance(value, Mapping) or not value:
        return value, ""
    named = [name for name in value if name in NAMES]
    beside = [item for name, item in value.items() if name not in NAMES]
    if len(named) == 1 and all(isinstance(item, (int, float, str, type(None))) for item in beside):
        inner = value[named[0]]
        if isinstance(inner, Mapping):
            return value, ""
        inner, form = understood(inner, path, what)
        return inner, f"a dict with {form or 'a tensor'} under {named[0]!r}"
    ids = [_id(key) for key in value]
    if None in ids:
        return value, ""
    if len(set(ids)) < len(ids):
        raise DamagedInputError(f"{what} {path}: an id stands there twice, as a number and as text")
    ordered = dict(sorted(zip(ids, value.values(), strict=True)))
    form = f"a dict of {len(ids)} vectors with the ids {min(ids)} to {max(ids)}, taken in ascending order"
    return _stacked(list(ordered.values()), path, what, one_each=True), form


class ModalityFile(Mapping[str, torch.Tensor]):
    """A file of image and question embeddings apart, ``{"image": [N, d], "text": [N, d]}``; each tensor is read when it
    is asked for and kept by nobody but who asked: at VQAv2's size one of them is 1.4 GB.

    Raises:
        MissingInputError, DamagedInputError: as :func:`load_embeddings`.
    """

    def __init__(self, path: Path, what: str, num_rows: int | None = None) -> None:
        self._path, self._what, self._num_rows = Path(path), what, num_rows

    def __getitem__(self, name: str) -> torch.Tensor:
        return check_embeddings(self._open(name), self._path, f"{self._what} ({name})", self._num_rows)

    def blocks(self, name: str, size: int = BLOCK >> 2) -> Iterator[torch.Tensor]:
        """The rows of a modality as float32, ``size`` at a time, checked; only a block of them is in memory.

        Raises:
            MissingInputError, DamagedInputError: as :func:`load_embeddings`.
        """
        what = f"{self._what} ({name})"
        for first in range(0, self.shape(name)[0], size):
            rows = self._open(name)[first : first + size]  # reopened: the last block's pages are let go
            yield check_embeddings(rows, self._path, what, first=first).clone()

    def shape(self, name: str) -> tuple[int, int]:
        """[N, d] of a modality.

        Raises:
            MissingInputError, DamagedInputError: as :func:`load_embeddings`, values apart.
        """
        value = self._open(name)
        check_form(value, self._path, f"{self._what} ({name})", self._num_rows)
        return value.shape[0], value.shape[1]

    def check_shapes(self) -> None:
        """Both modalities are of one shape.

        Raises:
            MissingInputError, DamagedInputError.
        """
        image, text = (list(self.shape(name)) for name in MODALITIES)
        if image != text:
            raise DamagedInputError(f"{self._what} {self._path}: image is {image}, text is {text}")

    def _open(self, name: str) -> torch.Tensor:
        value = io.load_torch(self._path, self._what, MAKE, mapped=True)
        if not isinstance(value, dict) or set(value) != set(MODALITIES):
            found = _describe(value)
            raise DamagedInputError(f"{self._what} {self._path}: expected the tensors image and text, got {found}")
        return value[name]

    def __iter__(self) -> Iterator[str]:
        return iter(MODALITIES)

    def __len__(self) -> int:
        return len(MODALITIES)


def check_form(value: Any, path: Path, what: str, num_rows: int | None = None) -> None:
    """A dense float tensor [N, d] with as many rows as there should be; its values are not looked at.

    Raises:
        DamagedInputError.
    """
    if not io.is_dense(value) or value.dim() != 2 or 0 in value.shape:
        raise DamagedInputError(f"{what} {path}: expected a float tensor [N, d], got {_describe(value)}")
    if num_rows is not None and value.shape[0] != num_rows:
        raise DamagedInputError(f"{what} {path}: {value.shape[0]} rows for {num_rows} items; it belongs to other data")


def check_embeddings(value: Any, path: Path, what: str, num_rows: int | None = None, first: int = 0) -> torch.Tensor:
    """float32 [N, d] of what a file held; ``first`` is the number of the first row, for messages.

    Raises:
        DamagedInputError: as :func:`load_embeddings`.
    """
    check_form(value, path, what, num_rows)
    value = value.detach().to(torch.float32)
    for start in range(0, len(value), BLOCK):
        bad = ~torch.isfinite(value[start : start + BLOCK])
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            found = f"row {first + start + row}, column {column} is {value[start + row, column].item()}"
            raise DamagedInputError(f"{what} {path}: {found}")
    return value


def _id(key: Any) -> int | None:
    """A whole number >= 0, as a number or as text; None for any other key."""
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 18:
        key = int(key)
    return key if type(key) is int and 0 <= key < 1 << 62 else None


def _stacked(parts: Sequence[Any], path: Path, what: str, one_each: bool = False) -> torch.Tensor:
    """[N, d] of vectors [d] (or lists of d numbers) and blocks [n, d], one after the other.

    ``one_each``: each must be one row.
    """
    rows: list[torch.Tensor] = []
    for number, part in enumerate(parts):
        if isinstance(part, (list, tuple)) and part and all(type(x) in (int, float) for x in part):
            part = torch.tensor([float(x) if abs(x) < 1e300 else torch.inf for x in part])
        fits = io.is_dense(part) and part.dim() in (1, 2) and part.numel() > 0
        block = part.detach().to(torch.float32).reshape(-1, part.shape[-1]) if fits else None
        if block is None or (rows and block.shape[1] != rows[0].shape[1]) or (one_each and len(block) > 1):
            width = f" of width {rows[0].shape[1]}" if rows else ""
            raise DamagedInputError(f"{what} {path}: entry {number} is {_describe(part)}, expected a vector{width}")
        rows.append(block)
    return torch.cat(rows)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor) and not value.is_nested:
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
