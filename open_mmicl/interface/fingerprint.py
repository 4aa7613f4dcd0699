"""Which model exactly answered: a hash of a model folder's files."""

import contextlib
import hashlib
import json
import operator
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from open_mmicl.errors import DamagedInputError, MissingInputError, foreign

_REMEMBERED_FROM = 64 << 20  # bytes; a smaller file is hashed again each time
_TEXT_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
_FURTHER = ("*.json", "*.jinja", "*.txt", "*.model", "*/*.jinja")


def folder_fingerprint(folder: Path, extra: Iterable[str] = ()) -> str:
    """Hex hash of every byte of the configuration, tokenizer, template and processor files and of the safetensors
    weights. ``extra`` are words that also count.

    Raises:
        MissingInputError: no config.json or no weights. DamagedInputError: a weight file is truncated.
    """
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        what = "weights (*.safetensors)" if (folder / "config.json").is_file() else "config.json"
        raise MissingInputError(f"{folder} is not a model folder: {what} not found")
    digest = hashlib.sha256()
    others = {path.relative_to(folder).as_posix() for pattern in _FURTHER for path in folder.glob(pattern)}
    for name in (*_TEXT_FILES, *sorted(others.difference(_TEXT_FILES))):
        path = folder / name
        if path.is_file():
            digest.update(json.dumps([name, hashlib.sha256(path.read_bytes()).hexdigest()]).encode())
    for path in weights:
        digest.update(json.dumps([path.name, weight_digest(path)]).encode())
    for word in extra:
        digest.update(json.dumps(["extra", word]).encode())
    return digest.hexdigest()[:32]


def weight_digest(path: Path) -> str:
    """Hash of every byte of one safetensors file.

    That of a file of 64 MB or more is remembered in the user's cache folder under the file's number, size and times
    (the time of its last change cannot be set by hand), so that a large model is read for this once.

    Raises:
        DamagedInputError: shorter than its header says.
    """
    stat = path.stat()
    size = stat.st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as handle:
        digest.update(_header(handle.read(8), handle, path, size))
        memo = _memo_file(json.dumps([stat.st_dev, stat.st_ino, size, stat.st_mtime_ns, stat.st_ctime_ns]))
        if size >= _REMEMBERED_FROM and memo is not None and (known := _read(memo)):
            return known
        while block := handle.read(1 << 20):
            digest.update(block)
    found = digest.hexdigest()
    if size >= _REMEMBERED_FROM and memo is not None:
        _write(memo, found)
    return found


def _memo_file(stamp: str) -> Path | None:
    """None for a user who has no home folder."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return None
    return root / "lever_plus" / "weights" / hashlib.sha256(stamp.encode()).hexdigest()[:32]


def _read(memo: Path) -> str:
    """A remembered hash, "" where there is none (or no whole one: then it is made again)."""
    try:
        text = memo.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
    return text if len(text) == 64 and set(text) <= set("0123456789abcdef") else ""


def _write(memo: Path, digest: str) -> None:
    """Remember a hash; where that cannot be written (a read-only home) it is made again each time."""
    part = memo.with_name(f"{memo.name}.{os.getpid()}")
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(digest, encoding="ascii")
        part.replace(memo)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()


def _header(prefix: bytes, handle: object, path: Path, size: int) -> bytes:
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= size - 8:
        raise DamagedInputError(f"weights {path} are truncated or not a safetensors file")
    header = handle.read(length)
    with foreign("weights", path, "the safetensors header is damaged"):
        tensors = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        end = operator.index(max((v["data_offsets"][1] for v in tensors.values()), default=0))
    if size != 8 + length + end:
        raise DamagedInputError(f"weights {path} are truncated: {size} bytes of {8 + length + end}")
    return header
