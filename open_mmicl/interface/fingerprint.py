"""Which model exactly answered: a hash of a model folder's files."""

import hashlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path

from open_mmicl.errors import DamagedInputError, MissingInputError

_WHOLE_FILE_LIMIT = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10
_TEXT_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


def folder_fingerprint(folder: Path, extra: Iterable[str] = ()) -> str:
    """Hex hash of configuration, tokenizer and processor files (every byte) and of the safetensors weights.

    A weight file below 64 MB is hashed whole; a larger one by its header, its size and 64 blocks of 64 KB spread
    evenly over it (a retrained or requantised model differs in all of them; one changed number in between would not
    be seen). ``extra`` are words that also count.

    Raises:
        MissingInputError: no config.json or no weights. DamagedInputError: a weight file is truncated.
    """
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not (folder / "config.json").is_file() or not weights:
        what = "weights (*.safetensors)" if (folder / "config.json").is_file() else "config.json"
        raise MissingInputError(f"{folder} is not a model folder: {what} not found")
    digest = hashlib.sha256()
    for name in _TEXT_FILES:
        path = folder / name
        if path.is_file():
            digest.update(json.dumps([name, hashlib.sha256(path.read_bytes()).hexdigest()]).encode())
    for path in weights:
        digest.update(json.dumps([path.name, weight_digest(path)]).encode())
    for word in extra:
        digest.update(json.dumps(["extra", word]).encode())
    return digest.hexdigest()[:32]


def weight_digest(path: Path) -> str:
    """Hash of one safetensors file (see :func:`folder_fingerprint`).

    Raises:
        DamagedInputError: shorter than its header says.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as handle:
        header = _header(handle.read(8), handle, path, size)
        digest.update(header)
        if size <= _WHOLE_FILE_LIMIT:
            while block := handle.read(1 << 20):
                digest.update(block)
        else:
            start = 8 + len(header)
            for i in range(_SAMPLES):
                handle.seek(start + (size - start - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(handle.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _header(prefix: bytes, handle: object, path: Path, size: int) -> bytes:
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= size - 8:
        raise DamagedInputError(f"weights {path} are truncated or not a safetensors file")
    header = handle.read(length)
    try:
        tensors = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        end = max((v["data_offsets"][1] for v in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DamagedInputError(f"weights {path}: the safetensors header is damaged") from error
    if size != 8 + length + end:
        raise DamagedInputError(f"weights {path} are truncated: {size} bytes of {8 + length + end}")
    return header
