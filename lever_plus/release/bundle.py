"""The release bundle: one zip file that holds what reproduces the rows of a finished run.

``bundle.json`` (format, settings, accuracies, what the run needs, and the size and SHA-256 of every other file),
``selectors/<method>.safetensors``, ``anchors.json``, ``pools.jsonl``, ``picks.jsonl``, ``images.json`` (the hash of
every image in a prompt) and, where there is one, the record.
Items are named by their question_id, never by a row number. There is no pickle in it and no path of the machine that
made it. Reading extracts nothing: entries are read into memory, each under its own name, of its stated size and hash.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lever_plus import io
from open_mmicl.errors import DamagedInputError, MissingInputError, foreign

FORMAT = "lever_plus.bundle/1"
HEAD, ANCHORS, POOLS, PICKS, IMAGES = "bundle.json", "anchors.json", "pools.jsonl", "picks.jsonl", "images.json"
RECORDS = ("record.json", "record.md")
_NAME = re.compile(
    r"(selectors/[a-z0-9_]{1,40}\.safetensors|(anchors|images)\.json|(pools|picks)\.jsonl|record\.(json|md))"
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every entry, so that equal content gives equal bytes
_LARGEST_HEAD, _LARGEST = 64 << 20, 8 << 30  # bytes
_ABSOLUTE = re.compile(
    r"(?<![\w:/.~\\])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\\"'<>|,;:()（）]+[/\\])+([^\s/\\\"'<>|,;:()（）]*)"
)
_KINDS = {
    "dataset": str, "split": str, "n_queries": int, "methods": list, "settings": dict, "needs": dict,
    "accuracy": dict, "ci95": dict, "files": dict, "made_by": dict, "digest": str,
}  # fmt: skip


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read and checked: ``head`` is bundle.json, ``files`` every other file by name."""

    path: Path
    head: dict[str, Any]
    files: dict[str, bytes]

    def json(self, name: str) -> dict[str, Any]:
        """The object of a .json file. Raises: DamagedInputError."""
        value = parse(self.files[name].decode("utf-8", "replace"), f"bundle {self.path}: {name}")
        if not isinstance(value, dict):
            raise DamagedInputError(f"bundle {self.path}: {name}: expected a dict")
        return value

    @property
    def selectors(self) -> dict[str, bytes]:
        """The safetensors file of each selector, by method."""
        return {Path(name).stem: data for name, data in self.files.items() if name.startswith("selectors/")}

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a .jsonl file, each with a question_id.

        Raises:
            DamagedInputError.
        """
        found = []
        for number, line in enumerate(self.files[name].decode("utf-8", "replace").splitlines(), 1):
            value = parse(line, f"{self.path}, {name}, line {number}")
            if not isinstance(value, dict) or not isinstance(value.get("question_id"), (int, str)):
                raise DamagedInputError(f"bundle {self.path}: {name}, line {number}: no object with a question_id")
            found.append(value)
        return found


def parse(text: str, where: str) -> Any:
    """Strict JSON of a bundle's file. Raises: DamagedInputError."""
    try:
        return json.loads(text, object_pairs_hook=lambda items: io.distinct_keys(items, where))
    except (ValueError, RecursionError) as error:
        raise DamagedInputError(f"{where}: is not valid JSON") from error


def without_paths(value: Any) -> Any:
    """A plain value whose texts name files by their last part alone: no folder of the machine is told."""
    if isinstance(value, str):
        return _ABSOLUTE.sub(lambda found: found[1], value)
    if isinstance(value, Mapping):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    return [without_paths(item) for item in value] if isinstance(value, (list, tuple)) else value


def digest(head: Mapping[str, Any]) -> str:
    """Hash of a head, which lists the hashes of all files: what the bundle is."""
    return io.sha256_json({name: value for name, value in head.items() if name != "digest"})


def write(path: Path, head: dict[str, Any], files: Mapping[str, bytes]) -> str:
    """Write a bundle, whole or not at all; returns its digest.

    Args:
        head: bundle.json without ``format``, ``files`` and ``digest``.
    """
    listed = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    whole = {"format": FORMAT, **head, "files": dict(sorted(listed.items()))}
    whole["digest"] = digest(whole)
    text = json.dumps(whole, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    with io.atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {HEAD: text.encode(), **dict(sorted(files.items()))}.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, data)
    return whole["digest"]


def read(path: Path) -> Bundle:
    """Read a bundle and check every file of it against bundle.json.

    Raises:
        MissingInputError: no such file.
        DamagedInputError: no zip file, no bundle, one of another version, or one that was damaged or changed: says
            which file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"bundle not found: {path} (pack one with: bash scripts/bundle.sh EXP_NAME)")
    with foreign("bundle", path, "is truncated or not a zip file"), zipfile.ZipFile(path) as archive:
        names = [entry.filename for entry in archive.infolist()]
        if HEAD not in names:
            raise DamagedInputError(f"{path} is not a release bundle: it has no {HEAD}")
        head = _head(_entry(archive, HEAD, _LARGEST_HEAD, path), path)
        listed = head["files"]
        for name in names:
            if names.count(name) > 1 or name not in {HEAD, *listed}:
                raise DamagedInputError(f"bundle {path}: holds {name[:80]!r}, which {HEAD} does not list once")
        files = {}
        for name, said in listed.items():
            if name not in names:
                raise DamagedInputError(f"bundle {path}: is incomplete, {name} is missing")
            data = _entry(archive, name, said["bytes"], path)
            if len(data) != said["bytes"] or hashlib.sha256(data).hexdigest() != said["sha256"]:
                raise DamagedInputError(f"bundle {path}: {name} is damaged or was changed; get the bundle again")
            files[name] = data
    return Bundle(path, head, files)


def _entry(archive: zipfile.ZipFile, name: str, most: int, path: Path) -> bytes:
    """One entry's bytes, never more than ``most``: what a small file unpacks to is not believed."""
    with archive.open(name) as handle:
        data = handle.read(most + 1)
    if len(data) > most:
        raise DamagedInputError(f"bundle {path}: {name} is longer than {most} bytes")
    return data


def _head(data: bytes, path: Path) -> dict[str, Any]:
    """bundle.json, checked."""
    where = f"bundle {path}: {HEAD}"
    with foreign("bundle", path, f"{HEAD} is no UTF-8 text"):
        text = data.decode("utf-8")
    head = parse(text, where)
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        said = head.get("format") if isinstance(head, dict) else None
        raise DamagedInputError(f"{where} has format {str(said)[:60]!r}; this version reads {FORMAT!r}")
    for name, kind in _KINDS.items():
        if not isinstance(head.get(name), kind):
            raise DamagedInputError(f"{where}: {name!r} is missing or of the wrong type")
    if digest(head) != head["digest"]:
        raise DamagedInputError(f"{where} was changed after it was written (its digest does not fit)")
    total = 0
    for name, said in head["files"].items():
        size = said.get("bytes") if isinstance(said, dict) else None
        if not _NAME.fullmatch(name) or type(size) is not int or not isinstance(said.get("sha256"), str):
            raise DamagedInputError(f"{where} lists {name[:80]!r}, which is no file of a bundle")
        total += max(0, size)
    needed = {ANCHORS, IMAGES, POOLS, PICKS} - head["files"].keys()
    if needed or total > _LARGEST:
        raise DamagedInputError(f"{where}: " + (f"lists no {sorted(needed)[0]}" if needed else "too large"))
    plain = all(
        isinstance(k, str) and (v is None or isinstance(v, (str, int, float))) for k, v in head["settings"].items()
    )
    if not plain or not all(isinstance(method, str) for method in head["methods"]):
        raise DamagedInputError(f"{where}: a setting or method is of the wrong type")
    return head
