"""Files: written whole or not at all, read with a clear error, hashed for provenance. No unpickling."""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import logging
import os
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from open_mmicl.errors import DamagedInputError, MissingInputError, foreign
from open_mmicl.lazy import lazy

torch = lazy("torch")

log = logging.getLogger("lever_plus")


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
            _fsync(handle.fileno())
        temporary.replace(path)
        _fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_cut_off(folder: Path, name: str = "") -> None:
    """Remove the temporary files that killed writers left in a folder; only for who alone may write there.

    ``name``: those of the file of this name and of files whose names begin with it.
    """
    for path in folder.glob(f".{glob.escape(name)}*.tmp"):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock that belongs to ``path`` (a hidden file beside it, removed at the end) against other processes.

    It ends with the process, however that ends. ``waiting`` is called once where another process holds it.
    """
    path = Path(path)
    file, said = path.with_name(f".{path.name}.lock"), False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # another process has just removed the folder
            continue
        try:
            try:
                flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not said:
                    waiting()
                said = True
                flock(descriptor, fcntl.LOCK_EX)
            if not _is_open_as(descriptor, file):
                continue  # its last holder has removed it
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def flock(descriptor: int, operation: int) -> None:
    """Lock an open file (``fcntl.LOCK_*``); for a shared lock it must be open for reading (a network file system asks).

    Where the file system knows no locks, a warning says what is then to be avoided.

    Raises:
        BlockingIOError: another process holds it, and ``operation`` has LOCK_NB.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        _warn_of_no_locks(os.strerror(error.errno))


@functools.cache
def _warn_of_no_locks(reason: str) -> None:
    log.warning(
        f"the file system of the results has no file locks ({reason}): do not run two commands on one results folder "
        "at once"
    )


def _is_open_as(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write JSON atomically; NaN and infinities are refused (``ValueError``)."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False) + "\n")


def existing(path: Path, what: str, make: str = "") -> Path:
    """The path of a file that is there.

    Args: as of :func:`read_text`. Raises: MissingInputError: no such file; names the command that makes it.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"{what} not found: {path}" + (f" (make it with: {make})" if make else ""))
    return path


def read_text(path: Path, what: str, make: str = "") -> str:
    """The text of a UTF-8 file (with or without byte order mark).

    Args:
        what: what the file is, for the error message, e.g. "RL data".
        make: the command that makes it, named when the file is missing.

    Raises:
        MissingInputError: no such file. DamagedInputError: empty, compressed, UTF-16 or not text.
    """
    path = existing(path, what, make)
    with reading(path, what):
        data = path.read_bytes()
    check_encoding(path, what, data)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedInputError(f"{what} {path}: is not UTF-8 text (byte {error.start})") from error


@contextlib.contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Around the reading of a file: what the system says against it (no permission, a broken disk) is one line.

    Raises:
        DamagedInputError.
    """
    try:
        yield
    except OSError as error:
        raise DamagedInputError(f"{what} {path}: cannot be read ({error.strerror or error})") from error


def is_there(path: Path) -> bool:
    """Whether a name is taken, be it by a folder or a link that leads nowhere: such a file is damaged, not absent."""
    return os.path.lexists(path)


def is_plain(value: Any) -> bool:
    """Whether a value from a JSON file is a number that fits a double, a text that can be written out, or null."""
    if isinstance(value, str):
        return value.isascii() or value.encode("utf-8", "ignore").decode() == value
    return value is None or (isinstance(value, (int, float)) and abs(value) < 1e300)


def check_encoding(path: Path, what: str, beginning: bytes) -> None:
    """Say so where a file's first bytes are those of something else than UTF-8 text.

    Raises:
        DamagedInputError.
    """
    if not beginning.strip():
        raise DamagedInputError(f"{what} {path}: is empty")
    if beginning.startswith(b"\x1f\x8b"):
        raise DamagedInputError(f"{what} {path}: is gzip-compressed; unpack it first (gunzip)")
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DamagedInputError(f"{what} {path}: is UTF-16 text; save it as UTF-8")


def read_json(path: Path, what: str, make: str = "") -> Any:
    """Strict JSON: UTF-8, no NaN or infinity, no key twice in an object.

    Args: as :func:`read_text`.

    Raises:
        MissingInputError, DamagedInputError.
    """

    def refuse(constant: str) -> None:
        raise DamagedInputError(f"{what} {path}: holds {constant}, which is not a number")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return distinct_keys(items, f"{what} {path}")

    try:
        return json.loads(read_text(path, what, make), parse_constant=refuse, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DamagedInputError(f"{what} {path}: is not valid JSON ({where}): truncated or damaged") from error
    except (RecursionError, ValueError) as error:  # ValueError: a whole number of thousands of digits
        raise DamagedInputError(f"{what} {path}: is not valid JSON: nested too deeply, or a number too long") from error


def distinct_keys(items: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """The object of some JSON pairs.

    Raises:
        DamagedInputError: a key stands there twice; the message begins with ``where``.
    """
    found = dict(items)
    if len(found) < len(items):
        counts = Counter(key for key, _ in items)
        twice = counts.most_common(1)[0][0]
        raise DamagedInputError(f"{where}: key {twice[:60]!r} occurs twice in one object")
    return found


def read_object(path: Path, what: str, make: str = "") -> dict[str, Any]:
    """As :func:`read_json`, a file whose value is an object.

    Raises:
        MissingInputError, DamagedInputError.
    """
    value = read_json(path, what, make)
    if not isinstance(value, dict):
        raise DamagedInputError(f"{what} {path}: expected an object, got a {type(value).__name__}")
    return value


def is_file_name(value: Any) -> bool:
    """Whether a value from a file is a text that names a file of the same folder, and nothing outside it."""
    return isinstance(value, str) and value not in ("", ".", "..") and value.isprintable() and Path(value).name == value


def save_torch(path: Path, value: Any) -> None:
    """``torch.save`` atomically; ``value`` must be tensors and plain data only (readable with weights_only)."""
    with atomic_path(path) as temporary:
        with temporary.open("wb") as handle:  # given a name, torch writes it into the file
            torch.save(value, handle)


def load_torch(path: Path, what: str, make: str = "", mapped: bool = False) -> Any:
    """``torch.load(weights_only=True)`` onto the CPU; numpy numbers (a metric from ``np.mean``) are plain data too.

    ``mapped``: tensors stay in the file until they are touched, where its format allows that.

    Raises:
        MissingInputError: no such file. DamagedInputError: truncated, not a torch file, or a pickle that
        would run code (refused; the message names the command that converts it).
    """
    path = existing(path, what, make)
    try:
        with foreign(what, path, "is truncated or not a torch file"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch remarks on a plain pickle is said by the error
            with torch.serialization.safe_globals(_numpy_numbers()):
                mapped = mapped and zipfile.is_zipfile(path)
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except DamagedInputError as error:
        if isinstance(error.__cause__, pickle.UnpicklingError) and "weights" in str(error.__cause__).lower():
            raise DamagedInputError(
                f"{what} {path} is damaged or holds objects besides tensors and plain data; if you trust where it "
                f"comes from, convert it with: bash scripts/convert_checkpoint.sh --trust {path}"
            ) from error
        raise


def load_npy(path: Path, what: str, make: str = "", mapped: bool = False) -> Any:
    """The array of a .npy file, no pickles; ``mapped``: its values are read when they are touched.

    Raises:
        MissingInputError: no such file. DamagedInputError: not an array's file.
    """
    path = existing(path, what, make)
    with foreign(what, path, "is not a readable .npy file"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    if not isinstance(value, np.ndarray):
        raise DamagedInputError(f"{what} {path}: is not a readable .npy file (several arrays, .npz)")
    return value


def is_dense(value: Any) -> bool:
    """Whether a value from a file is an ordinary float tensor that holds as many numbers as its shape says."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized or value.is_nested:
        return False
    there = value.untyped_storage().nbytes() // value.element_size()  # a stride of 0 makes terabytes of a few bytes
    return value.is_floating_point() and value.device.type == "cpu" and value.numel() <= there


def _numpy_numbers() -> list[Any]:
    """What a pickle of a numpy number names: it is built from a type and bytes, no code of the file runs."""
    kinds = [np.bool_, np.int32, np.int64, np.float16, np.float32, np.float64]
    made_by = [(np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [*made_by, np.dtype, *(type(np.dtype(kind)) for kind in kinds)]


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


def _fsync(descriptor: int) -> None:
    """Bring a file to the disk; a file system that has no such call keeps it as well as it can."""
    try:
        os.fsync(descriptor)
    except OSError as error:  # EIO and ENOSPC are about the data and count
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def _fsync_dir(directory: Path) -> None:
    """Have a rename last through a power cut, where the file system can: many (CIFS, VirtualBox shares, FUSE) refuse to
    open or sync a folder. The file itself is whole and in its place by then.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
