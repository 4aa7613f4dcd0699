"""Files: written whole or not at all, read with a clear error, hashed for provenance. No unpickling."""

import contextlib
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_mmicl.errors import DamagedInputError, MissingInputError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; on success fsyncs it and renames it into place.

    On any exception the temporary file is removed and ``path`` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        _fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write JSON atomically; NaN and infinities are refused (``ValueError``)."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False) + "\n")


def read_json(path: Path, what: str, make: str = "") -> Any:
    """Read a JSON file.

    Args:
        what: what the file is, for the error message, e.g. "RL data".
        make: the command that makes it, named when the file is missing.

    Raises:
        MissingInputError, DamagedInputError.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"{what} not found: {path}" + (f" (make it with: {make})" if make else ""))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise DamagedInputError(f"{what} {path} is not UTF-8 text (byte {error.start})") from error
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "nesting"
        raise DamagedInputError(f"{what} {path} is not valid JSON ({where}): truncated or damaged") from error


def save_torch(path: Path, value: Any) -> None:
    """``torch.save`` atomically; ``value`` must be tensors and plain data only (readable with weights_only)."""
    import torch

    with atomic_path(path) as temporary:
        torch.save(value, temporary)


def load_torch(path: Path, what: str, make: str = "") -> Any:
    """``torch.load(weights_only=True)`` onto the CPU.

    Raises:
        MissingInputError: no such file. DamagedInputError: truncated, not a torch file, or a pickle that
        would run code (refused; the message names the command that converts it).
    """
    import pickle

    import torch

    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"{what} not found: {path}" + (f" (make it with: {make})" if make else ""))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch remarks on a plain pickle is said by the error
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
            raise DamagedInputError(
                f"{what} {path} is damaged or holds objects besides tensors and plain data; if you trust where it "
                f"comes from, convert it with: bash scripts/convert_checkpoint.sh --trust {path}"
            ) from error
        raise DamagedInputError(f"{what} {path} is not a readable torch file") from error
    except (
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        OSError,
        AttributeError,
        IndexError,
        TypeError,
        AssertionError,
    ) as error:
        raise DamagedInputError(f"{what} {path} is truncated or not a torch file") from error


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a plain value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _fsync_dir(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
