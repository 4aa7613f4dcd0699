"""What the selector sees of an item: named channels, apart for an item as a query and as a candidate.

``EMBEDDING`` names the channels, e.g. ``clip_image clip_text lvlm answer``. As a candidate an item shows all of them,
as a query only those of ``SEEN_OF_QUERIES`` (lever_plus/settings/word_lists.py): a query's own answer cannot reach
its choice, because the table of queries is made of files in which no answer occurs. Two words are item embeddings of
one table, as the original Lever-Plus exports them: ``mean`` and ``concat`` of CLIP's image and question.

Legend: N items of a split, d width of a table.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lever_plus import io
from lever_plus.data.channel_names import TableFiles
from lever_plus.data.embeddings import ModalityFile, check_embeddings, load_embeddings
from open_mmicl.errors import DamagedInputError

MAKE = "bash scripts/export_embeddings.sh"
_BLOCK = 1 << 14  # rows looked at together
_SMALL = 1e-6  # standard deviation below which a dimension is constant


class Rows(Protocol):
    """A table of vectors: a tensor, or one that reads its rows when they are asked for."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, d)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """int64 (n,) or (n, m) -> float32 (n, d) or (n, m, d)."""


@dataclass(frozen=True)
class Tables:
    """``queries`` [N_q, d_q] and ``candidates`` [N, d_c]. ``split``: queries and candidates are in one space of which
    the queries' dimensions come first (channels); otherwise they are one table's rows.
    """

    queries: Rows
    candidates: Rows
    split: bool

    @property
    def widths(self) -> tuple[int, int]:
        """(d_q, d_c)."""
        return self.queries.shape[1], self.candidates.shape[1]

    def dimensions(self, channel: str) -> slice:
        """Where a channel lies in a row, of queries as of candidates.

        Raises:
            KeyError: the tables have no such channel.
        """
        start = 0
        for part in self.queries.parts:
            width = part.values.shape[1]
            if part.name == channel:
                return slice(start, start + width)
            start += width
        raise KeyError(channel)


def load_tables(files: TableFiles, num_train: int | None, num_queries: int | None = None) -> Tables:
    """The tables of channels, or of item embeddings.

    Args:
        files: see :func:`lever_plus.data.channel_names.table_files`.
        num_train, num_queries: rows they must have; None: whatever there are. Queries of train are all its items.

    Raises:
        MissingInputError: a file is not there; names the command that makes it. DamagedInputError: of another form.
    """
    if not files.channels:
        return _item_tables(files, num_train, num_queries)
    rows = num_train if files.split == "train" else num_queries
    queries = ChannelTable(_parts(files.channels, files.queries, files.split, rows))
    return Tables(queries, ChannelTable(_parts(files.channels, files.candidates, "train", num_train)), True)


def _item_tables(files: TableFiles, num_train: int | None, num_queries: int | None) -> Tables:
    items = load_embeddings(files.candidates["embeddings"], "embeddings", num_train)
    if files.split == "train":
        return Tables(items, items, False)
    path = files.queries["embeddings"]
    queries = load_embeddings(path, "query embeddings", num_queries)
    if queries.shape[1] != items.shape[1]:
        widths = f"{queries.shape[1]}, the candidate embeddings have {items.shape[1]}"
        raise DamagedInputError(f"query embeddings {path}: width {widths}")
    return Tables(queries, items, False)


def _parts(channels: tuple[str, ...], files: dict[str, Path], split: str, rows: int | None) -> list["_Part"]:
    """The channels that ``files`` have: those of queries, or all of them."""
    parts: list[_Part] = []
    for name in channels:
        if name in ("clip_image", "clip_text"):
            values = ModalityFile(files[f"clip_{split}"], f"CLIP embeddings of {split}", rows)
            parts.append(_Part(values[name.removeprefix("clip_")], name))
        elif name == "lvlm":
            centre = _standard(load_array(files["lvlm_train"], "the LVLM's hidden states"))
            values = load_array(files[f"lvlm_{split}"], f"the LVLM's hidden states of {split}", rows)
            parts.append(_Part(values, name, *centre))
        elif name in files:
            values = load_array(files[name], "answer embeddings", rows)
            parts.append(_Part(values, name, *_standard(values)))
    return parts


class _Part:
    """One channel's rows [N, d]: as they are, or with each dimension's mean and spread taken off; L2-normalised."""

    def __init__(
        self, values: Any, name: str, mean: torch.Tensor | None = None, spread: torch.Tensor | None = None
    ) -> None:
        self.values, self.name, self.mean, self.spread = values, name, mean, spread

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """int64 (n,) -> float32 (n, d)."""
        found = self.values[rows] if isinstance(self.values, torch.Tensor) else _of(self.values, rows.numpy())
        found = found.to(torch.float32)
        if self.mean is not None:
            found = (found - self.mean) / self.spread
        return torch.nn.functional.normalize(found, dim=-1)


class ChannelTable:
    """Channels side by side, [N, d]; rows are read, standardised and joined when they are asked for."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.parts = list(parts)
        counts = {part.name: len(part.values) for part in self.parts}
        if len(set(counts.values())) > 1:
            raise DamagedInputError(f"channels of different numbers of items: {counts}; remake them with: {MAKE}")
        self.shape = (min(counts.values()), sum(part.values.shape[1] for part in self.parts))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        flat = rows.reshape(-1)
        joined = torch.cat([part.rows(flat) for part in self.parts], dim=1)
        return joined.view(*rows.shape, self.shape[1])


def load_array(path: Path, what: str, rows: int | None = None) -> np.ndarray:
    """A float32 array [N, d] of a .npy file, mapped: its values are read when they are touched.

    Raises:
        MissingInputError, DamagedInputError.
    """
    array = io.load_npy(path, what, MAKE, mapped=True)
    if array.ndim != 2 or array.dtype != np.float32 or 0 in array.shape:
        raise DamagedInputError(f"{what} {path}: expected a float32 array [N, d]")
    if rows is not None and len(array) != rows:
        raise DamagedInputError(f"{what} {path}: {len(array)} rows for {rows} items; it belongs to other data")
    for start, block in _blocks(array):
        check_embeddings(torch.from_numpy(block), path, what, first=start)
    return array


def _blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(array), _BLOCK):
        yield start, np.array(array[start : start + _BLOCK])


def _of(array: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array[rows]))


def _standard(array: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each dimension, (d,) each; a constant dimension keeps its size."""
    total, squares = np.zeros(array.shape[1]), np.zeros(array.shape[1])
    for _, block in _blocks(array):
        total += block.sum(0, dtype=np.float64)
    mean = total / len(array)
    for _, block in _blocks(array):
        squares += np.square(block - mean).sum(0)
    spread = np.sqrt(squares / max(1, len(array) - 1))
    spread[spread < _SMALL] = 1.0
    return torch.from_numpy(mean).float(), torch.from_numpy(spread).float()
