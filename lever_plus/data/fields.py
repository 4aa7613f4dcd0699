"""Reading JSON with checks: every error names the file, the query and the field (exit code 4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import io
from open_mmicl.errors import DamagedInputError

MAX_INDEX = 2**62  # ids are kept as int64


@dataclass(frozen=True)
class Source:
    """The file that is being read; turns a problem into a :class:`DamagedInputError` that says where it is."""

    path: Path
    what: str

    def error(self, problem: str, query: Any = None, field: str = "") -> DamagedInputError:
        """The error to raise for ``field`` of ``query``."""
        where = "" if query is None else f"query {_short(query)}, "
        return DamagedInputError(f"{self.what} {self.path}: {where}{field + ': ' if field else ''}{problem}")

    def mapping(self, value: Any, query: Any = None, field: str = "") -> dict[str, Any]:
        """A JSON object."""
        if not isinstance(value, dict):
            raise self.error(f"expected an object, got {_short(value)}", query, field)
        return value

    def sequence(self, value: Any, query: Any = None, field: str = "") -> list[Any]:
        """A JSON array."""
        if not isinstance(value, list):
            raise self.error(f"expected a list, got {_short(value)}", query, field)
        return value

    def integer(self, value: Any, query: Any, field: str, lo: int = 0, hi: int = MAX_INDEX) -> int:
        """A whole number in [lo, hi)."""
        if type(value) is not int:
            raise self.error(f"expected a whole number, got {_short(value)}", query, field)
        if not lo <= value < hi:
            raise self.error(f"{_short(value)} is outside {lo}..{hi - 1}", query, field)
        return value

    def number(self, value: Any, query: Any, field: str, lo: float = -math.inf, hi: float = math.inf) -> float:
        """A finite number in [lo, hi]."""
        if type(value) not in (int, float):
            raise self.error(f"expected a number, got {_short(value)}", query, field)
        if abs(value) > 1e300 or not math.isfinite(value):
            raise self.error(f"{_short(value)} is not finite", query, field)
        if not lo <= value <= hi:
            raise self.error(f"{_short(value)} is outside {lo:g}..{hi:g}", query, field)
        return float(value)

    def text(self, value: Any, query: Any, field: str) -> str:
        """A text that can be written out again (no lone surrogates)."""
        if type(value) is not str:
            raise self.error(f"expected text, got {_short(value)}", query, field)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"broken text (character {error.start})", query, field) from error
        return value

    def distinct(self, values: Any, query: Any, field: str, hi: int, minimum: int = 1) -> list[int]:
        """A list of distinct whole numbers in [0, hi), at least ``minimum`` of them."""
        values = self.sequence(values, query, field)
        if len(values) < minimum:
            raise self.error(f"{len(values)} entries, expected at least {minimum}", query, field)
        found = [self.integer(value, query, field, 0, hi) for value in values]
        if len(set(found)) < len(found):
            twice = next(value for i, value in enumerate(found) if value in found[:i])
            raise self.error(f"{twice} stands there twice", query, field)
        return found

    def query_key(self, key: str, num_rows: int | None) -> int:
        """The query index that a key of the file's top object stands for."""
        if not key.isascii() or not key.isdecimal() or len(key) > 18:
            raise self.error(f"{_short(key)} is not a query index")
        return self.integer(int(key), key, "query index", 0, MAX_INDEX if num_rows is None else num_rows)


def read_queries(
    path: Path, what: str, num_rows: int | None, make: str = ""
) -> tuple[Source, dict[int, dict[str, Any]], list[str]]:
    """Read ``{query_idx: {…}, …}``.

    Keys that begin with an underscore (``_meta`` of the original Lever-Plus) are left out and noted.

    Returns: (source, entries by query index in the file's order, notes).

    Raises:
        MissingInputError, DamagedInputError: not such a file, no query in it, a query twice or out of range.
    """
    source = Source(Path(path), what)
    content = source.mapping(io.read_json(path, what, make))
    entries, notes = {}, []
    for key, value in content.items():
        if key.startswith("_"):
            notes.append(f"left out {key!r}: not a query")
            continue
        index = source.query_key(key, num_rows)
        if index in entries:
            raise source.error("stands there twice", key)
        entries[index] = source.mapping(value, key)
    if not entries:
        raise source.error("holds no query")
    return source, entries, notes


def positions_in(pool: Sequence[int]) -> dict[int, int]:
    """Pool position of each global index."""
    return {index: position for position, index in enumerate(pool)}


def as_ids(values: Sequence[int]) -> np.ndarray:
    """int64 array."""
    return np.asarray(values, dtype=np.int64)


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return {"dict": "an object", "list": "a list"}[type(value).__name__]
    text = repr(value)  # one line: control characters come out escaped
    return text if len(text) <= 60 else text[:57] + "..."
