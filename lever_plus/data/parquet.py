"""Questions from parquet files on disk, in the layout of the hub's data sets: pictures may be bytes in a column.

Such pictures are written to files once, named by their content: a picture that many questions share is one file, and
the same picture in two splits is recognised. An index beside them says which row has which.
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lever_plus import io
from lever_plus.data.fields import Source
from lever_plus.registries import READERS
from open_mmicl.errors import MissingInputError, UsageError, foreign
from open_mmicl.lazy import lazy

pyarrow = lazy("pyarrow")

log = logging.getLogger("lever_plus")
WHAT = "parquet file"
TEXT_ROWS, PICTURE_ROWS = 4096, 64  # rows in memory at a time
SIGNATURES = {
    b"\x89PNG": "png", b"\xff\xd8": "jpg", b"GIF8": "gif", b"BM": "bmp", b"II*\x00": "tif", b"MM\x00*": "tif",
    b"RIFF": "webp",
}  # fmt: skip


@READERS.add("parquet", "parquet files as the hub's data sets have them, pictures as bytes in them included")
def read_parquet(path: Path, extracted: Path = Path("images"), image: str = "") -> Iterator[tuple[str, Any]]:
    """The rows of a file; a column of pictures becomes the names of their files in ``extracted``.

    Args:
        extracted: folder for the pictures. image: the column that has them, where they are in the file; "": ``image``,
            else the only one that does.

    Raises:
        MissingInputError: no such file, or pyarrow is not installed. DamagedInputError: it cannot be read.
        UsageError: there is no such column.
    """
    file = _opened(path)
    image = _column(path, file.schema_arrow, image)
    columns = [name for name in file.schema_arrow.names if name != image]
    names = _names(path, file, image, extracted)
    if names is None and image in file.schema_arrow.names:
        columns.append(image)
    number = 0
    for batch in _batches(path, file, columns, TEXT_ROWS):
        for row in batch:
            if names is not None:
                row[image] = names[number] or None
                row.setdefault("image", row[image])
            number += 1
            yield f"row {number}", row


def _opened(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingInputError(f"{path}: parquet files need pyarrow: pip install -r requirements.txt") from error
    with foreign(WHAT, io.existing(path, WHAT)):
        return parquet.ParquetFile(path)


def _column(path: Path, schema: Any, image: str) -> str:
    if image and image not in schema.names:
        raise UsageError(
            f"{WHAT} {path}: reader_args: image={str(image)[:60]!r} is none of its columns: {', '.join(schema.names)}"
        )
    pictures = [field.name for field in schema if _is_binary(field.type) or _is_struct(field.type, "bytes")]
    return image or ("image" if "image" in schema.names or len(pictures) != 1 else pictures[0])


def _is_binary(kind: Any) -> bool:
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _is_struct(kind: Any, part: str) -> bool:
    return pyarrow.types.is_struct(kind) and part in [kind.field(i).name for i in range(kind.num_fields)]


def _batches(path: Path, file: Any, columns: list[str], size: int) -> Iterator[list[dict[str, Any]]]:
    batches = iter(file.iter_batches(size, columns=columns))
    while True:
        with foreign(WHAT, path):
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        if rows is None:
            return
        yield rows


def _names(path: Path, file: Any, image: str, extracted: Path) -> list[str] | None:
    """The picture file of each row, written where it is not there; None where the column holds none."""
    if image not in file.schema_arrow.names:
        return None
    kind = file.schema_arrow.field(image).type
    if not (pyarrow.types.is_struct(kind) or _is_binary(kind)):
        return None
    if not _is_binary(kind) and not _is_struct(kind, "bytes"):
        there = ", ".join(file.schema_arrow.names)
        raise UsageError(f"{WHAT} {path}: column {image!r} has no bytes (columns: {there})")
    stamp = path.stat()
    source = {"file": str(path.absolute()), "size": stamp.st_size, "mtime_ns": stamp.st_mtime_ns, "column": image}
    index = extracted / f"{path.stem}-{io.sha256_json(source['file'])[:8]}.json"
    with io.locked(index, lambda: log.info(f"{path.name}: another process is writing its pictures, waiting")):
        known = io.read_object(index, "index of pictures") if index.is_file() else {}
        if known.get("source") != source or not all((extracted / n).is_file() for n in set(known["names"]) if n):
            log.info(f"{path.name}: writing its pictures to {extracted} (once)")
            names = [
                _written(path, number, row[image], extracted)
                for number, row in enumerate(
                    (row for batch in _batches(path, file, [image], PICTURE_ROWS) for row in batch), 1
                )
            ]
            known = {"source": source, "names": names}
            io.write_json(index, known)
    return known["names"]


def _written(path: Path, number: int, value: Any, extracted: Path) -> str:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not content:
        named = value.get("path") if isinstance(value, dict) else None
        if named:
            raise Source(path, WHAT).error(
                f"row {number}: the picture is no bytes but the name {str(named)[:80]!r}; save the data set with its "
                "pictures embedded"
            )
        return ""
    ending = next((name for sign, name in SIGNATURES.items() if content.startswith(sign)), "img")
    name = f"{hashlib.sha256(content).hexdigest()[:24]}.{ending}"
    target = extracted / name
    if not target.is_file() or target.stat().st_size != len(content):
        with io.atomic_path(target) as temporary:
            temporary.write_bytes(content)
    return name
