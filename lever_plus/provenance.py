"""Done or stale: whether a stage's output was made from the inputs and settings at hand, and by what."""

import contextlib
import json
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from lever_plus import config, io
from lever_plus.programs import ask
from lever_plus.registries import plugins_of
from open_mmicl.errors import DamagedInputError

MOST_PROMPTS = 10**15
PACKAGES = ("torch", "transformers", "deepspeed", "peft", "numpy")


@dataclass
class Recipe:
    """What an output is made from: input files (by role), and the settings that matter for its content."""

    files: dict[str, Path]
    values: dict[str, Any] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    """Names of settings that decide nothing here, in capitals; a stamp that has one of them is read without it."""
    before: dict[str, Any] = field(default_factory=dict)
    """{NAME: value} of settings that stamps may be older than, and the value with which those outputs were made."""

    def describe(self) -> dict[str, Any]:
        """Hashes of the files and the settings; equal descriptions mean equal outputs. Choices that come from files of
        the user's own count with those files.
        """
        values = {**self.values, **{f"plugin {name}": sha for name, sha in plugins_of(self.values).items()}}
        return {"files": {role: _hash(path) for role, path in self.files.items()}, "values": values}

    def fingerprint(self) -> str:
        """Hash of :meth:`describe`."""
        return io.sha256_json(self.describe())

    def made(self, stamp: Mapping[str, Any]) -> bool:
        """Whether a stamp is that of an output made from exactly this; it may be older, with settings that decide
        nothing, or without those that are younger.
        """
        if stamp.get("fingerprint") == self.fingerprint():
            return True
        old = stamp.get("recipe")
        return isinstance(old, dict) and not self.differences(old)

    def differences(self, old: Mapping[str, Any]) -> list[str]:
        """The names of the inputs and settings in which an older :meth:`describe` differs."""
        now, names = self.describe(), []
        for part in ("files", "values"):
            before = old.get(part) if isinstance(old.get(part), dict) else {}
            idle = {name for name in before if part == "values" and name not in now[part] and name.upper() in self.idle}
            for name in sorted({*before, *now[part]} - idle):
                absent = self.before.get(name.upper(), "not there") if part == "values" else "not there"
                both = [json.dumps(some.get(name, absent), sort_keys=True) for some in (before, now[part])]
                names += [name] if both[0] != both[1] else []
        return names


def sidecar(output: Path) -> Path:
    """Where an output's provenance lies."""
    return output.with_name(output.name + ".meta.json")


def read_stamp(output: Path) -> dict[str, Any]:
    """The provenance that lies beside an output, seen to hold what is read of it.

    Raises:
        MissingInputError: there is none. DamagedInputError: it cannot be read.
    """
    path = sidecar(output)
    found = io.read_object(path, "provenance file")
    recipe, prompts = found.get("recipe", {}), found.get("prompts") or {}
    whole = isinstance(recipe, dict) and all(isinstance(recipe.get(part, {}), dict) for part in ("files", "values"))
    whole = whole and isinstance(found.get("table", ""), str) and isinstance(prompts, dict)
    if not whole or not all(type(number) is int and abs(number) < MOST_PROMPTS for number in prompts.values()):
        raise DamagedInputError(f"provenance file {path}: not what a stage writes; remove it, or {output} with it")
    return found


def status(output: Path, recipe: Recipe) -> str:
    """``current`` (made from exactly this), ``stale`` (made from something else), ``foreign`` (brought or
    changed by somebody else: used as it is), or ``missing`` (also: its making was interrupted).
    """
    if not output.exists():
        return "missing"
    if not sidecar(output).is_file():
        return "foreign"
    meta = read_stamp(output)
    if meta.get("pending"):
        return "missing"
    if meta.get("output_sha256") != _hash(output):
        now = read_stamp(output)
        return "foreign" if now == meta else status(output, recipe)  # another run has just remade it
    return "current" if recipe.made(meta) else "stale"


def is_brought(output: Path) -> bool:
    """Whether an output is there and no stage of ours says that it made it: the user brought it."""
    return output.is_file() and not sidecar(output).exists()


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Around the writing and stamping of an output and of the files that belong to it: two runs that end at the same
    moment write one after the other, so that all these files are one run's.
    """
    with io.locked(output):
        io.remove_cut_off(output.parent, output.name)
        begin(output)
        yield


def begin(output: Path) -> None:
    """Mark an output as being made, so that an interruption between writing and stamping shows."""
    io.write_json(sidecar(output), {"pending": True})


def stamp(output: Path, recipe: Recipe, seconds: float, extra: dict[str, Any] | None = None) -> None:
    """Write the provenance beside a finished output."""
    io.write_json(
        sidecar(output),
        {
            "fingerprint": recipe.fingerprint(), "recipe": recipe.describe(), "output_sha256": _hash(output),
            "seconds": round(seconds, 2), "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **provenance(), **(extra or {}),
        },
        indent=1,
    )  # fmt: skip


def changed(output: Path, recipe: Recipe) -> list[str]:
    """The names of the inputs and settings in which a stale output's recipe differs from this one."""
    return recipe.differences(read_stamp(output).get("recipe", {}))


@lru_cache(maxsize=1)
def _provenance() -> dict[str, Any]:
    root = ask(["git", "rev-parse", "--show-toplevel"], config.REPO_ROOT)
    ours = root is not None and Path(root.rstrip("\n")).resolve() == config.REPO_ROOT  # not a repository around ours
    commit = ask(["git", "rev-parse", "HEAD"], config.REPO_ROOT) if ours else None
    dirty = ask(["git", "status", "--porcelain"], config.REPO_ROOT) if ours else None
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "git": (commit or "").strip() or None, "git_dirty": None if dirty is None else bool(dirty.strip()),
        "versions": versions, "python": platform.python_version(),
    }  # fmt: skip


def provenance() -> dict[str, Any]:
    """Git commit, package versions, Python: what every record carries."""
    return dict(_provenance())


def _hash(path: Path) -> str | None:
    if path.is_dir():
        return io.sha256_json({p.name: io.sha256_file(p) for p in sorted(path.iterdir()) if p.is_file()})
    if not path.is_file():
        return None
    seen = path.stat()
    return _hash_file(path, seen.st_ino, seen.st_size, seen.st_mtime_ns)


@lru_cache(maxsize=4096)
def _hash_file(path: Path, *seen: int) -> str:
    """A file's hash; one process asks about the same files for many steps."""
    return io.sha256_file(path)
