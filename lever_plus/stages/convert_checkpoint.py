"""Convert a checkpoint or embedding file that holds objects besides tensors and plain data.

    bash scripts/convert_checkpoint.sh --trust FILE [--output NEW]

Such files are refused by every other command, because reading them the usual way would run code. Here the
objects are replaced by inert stand-ins: only tensors, numbers, texts and containers are taken over, and no
code of the file runs. --trust says that you know where the file comes from and want its weights.

Without --output the converted file takes the old one's place, which is kept beside it as FILE.original.
"""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import cli, io
from open_mmicl.errors import UsageError, foreign
from open_mmicl.lazy import lazy

checkpoint = lazy("lever_plus.selectors.checkpoint")
embeddings = lazy("lever_plus.data.embeddings")
pointer = lazy("lever_plus.selectors.pointer")
torch = lazy("torch")

_PLAIN = {
    "builtins": {"set", "frozenset", "bytearray", "complex", "slice", "range"},
    "_codecs": {"encode"},  # bytes inside numpy arrays
    "collections": {"OrderedDict"},
    "torch": {"Size", "device"},
    "torch._utils": {"_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter", "_rebuild_tensor"},
    "torch.serialization": {"_get_layout"},
    "numpy": {"ndarray", "dtype"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
}


class StandIn:
    """What an object of the file becomes: it accepts everything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> "StandIn":
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Ignored."""

    def extend(self, values: Any) -> None:
        """Ignored."""


class Unpickler(pickle.Unpickler):  # noqa: S301 - finds plain data only, see find_class
    """Rebuilds tensors and plain data; every other class or function becomes :class:`StandIn`."""

    def find_class(self, module: str, name: str) -> Any:
        """The few harmless names of ``_PLAIN``, or the stand-in."""
        if name in _PLAIN.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return StandIn


class _InertPickle:
    """The module that ``torch.load`` is given in place of pickle."""

    __name__ = "inert pickle"
    Unpickler = Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()


def read_inert(path: Path) -> Any:
    """The content of a torch file, objects replaced by stand-ins; no code of the file runs.

    Raises:
        MissingInputError: no such file. DamagedInputError: not a torch file.
    """
    with foreign("checkpoint", io.existing(path, "file"), "is truncated or not a torch file"):
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_InertPickle)


def convert(path: Path) -> tuple[Any, list[str]]:
    """(what to write, lines that say what it is).

    A tensor or array [N, d], ``{"image", "text"}`` of them, or another form that is read as embeddings
    (docs/formats.md) is written as embeddings; anything else must be a selector checkpoint of a known form and is
    written in this project's format.

    Raises:
        MissingInputError, DamagedInputError.
    """
    content = read_inert(path)

    def rows(value: Any) -> torch.Tensor:
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
        return embeddings.check_embeddings(tensor, path, "embeddings").clone()

    if isinstance(content, (torch.Tensor, np.ndarray)):
        value = rows(content)
        return value, [f"embeddings {list(value.shape)}"]
    if isinstance(content, dict) and set(content) == set(embeddings.MODALITIES):
        return {name: rows(value) for name, value in content.items()}, ["image and question embeddings"]
    value, form = embeddings.understood(_tensors(content), path, "embeddings")
    if form:
        value = rows(value)
        return value, [f"{form}, embeddings {list(value.shape)}"]
    state, config, info = checkpoint.migrate(content, pointer.PointerSelector, path)
    metrics = content.get("metrics")
    native = pointer.native_checkpoint(
        pointer.SelectorConfig(**config),
        {name: value.clone() for name, value in state.items()},
        info.phase or "v2",
        info.epoch or 0,
        _plain(metrics) if isinstance(metrics, dict) else {},
        {},
        {"converted_from": path.name, "sha256": io.sha256_file(path)},
    )
    return native, [f"{info.form} selector, {config}", *info.lines]


def _tensors(value: Any, depth: int = 2) -> Any:
    """Arrays of floats as tensors, those in lists and dicts too."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return torch.from_numpy(value)
    if isinstance(value, dict) and depth:
        return {key: _tensors(item, depth - 1) for key, item in value.items()}
    return [_tensors(item, depth - 1) for item in value] if isinstance(value, (list, tuple)) and depth else value


def _plain(value: Any) -> Any:
    """Numbers, texts and containers of them; the rest as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


def main(argv: list[str] | None = None) -> int:
    """Convert the file named on the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)

    def body() -> int:
        if {"-h", "--help"} & set(words):
            print(__doc__.strip())
            return 0
        source, target, dry_run = _arguments(words)
        content, lines = convert(source)
        print("\n".join(f"{source.name}: {line}" for line in lines))
        if dry_run:
            print(f"dry run: would write {target or source}")
            return 0
        if target is None:
            kept = source.with_name(source.name + ".original")
            if kept.exists():
                raise UsageError(f"{kept} exists; name another file with --output")
            kept.hardlink_to(source)  # the old content keeps a name at every moment
        io.save_torch(target or source, content)
        print(f"written: {target or source}" + ("" if target else f" (the old file: {kept.name})"))
        return 0

    return cli.guard(body)


def _arguments(words: list[str]) -> tuple[Path, Path | None, bool]:
    trusted = target = None
    dry_run = False
    while words:
        word = words.pop(0)
        if word in ("-n", "--dry-run"):
            dry_run = True
        elif word in ("--trust", "--output") and words:
            value = Path(words.pop(0))
            trusted, target = (value, target) if word == "--trust" else (trusted, value)
        else:
            how = "see --help" if word.startswith("-") else f"say that you trust it: --trust {word}"
            raise UsageError(f"unknown option or missing value: {word!r}; {how}")
    if trusted is None:
        raise UsageError("say which file you trust: --trust FILE")
    return trusted, target, dry_run


if __name__ == "__main__":
    raise SystemExit(main())
