"""Named choices that one decorated function or class adds: losses, rewards, scorers, rivals, readers, interfaces.

    @REWARDS.add("soft_only", "VQA accuracy in [0, 1]")
    def soft_only(answer, rule): ...

The two texts are at once what the setting allows, its help and a row of the documentation. A registry's names are
read from the source of its home modules, which are imported only when an entry is used: help and checks need no torch.
:func:`load_file` takes entries from a file of the user's own.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_mmicl.errors import MissingInputError, UsageError, plain

_loaded: dict[Path, str] = {}  # files of the user's own -> SHA-256 of their bytes
_loading: list[Path] = []


@dataclass(frozen=True)
class Entry:
    """One choice: its name, what it is in a line, the decorated object, and the user's file that it comes from."""

    name: str
    help: str
    value: Any
    file: Path | None = None


class Registry(Sequence[str]):
    """The choices of one kind; as a sequence, their names in order.

    Args:
        kind: what one of them is, for messages.
        symbol: the registry's name in its home modules' source.
        homes: modules that hold the package's own entries.
        also: {other name: name}, accepted wherever the name is.
    """

    def __init__(self, kind: str, symbol: str, *homes: str, also: Mapping[str, str] | None = None) -> None:
        self.kind, self.symbol, self.homes, self.also = kind, symbol, homes, also or {}
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, help: str) -> Callable[[Any], Any]:  # noqa: A002 - the word argparse uses
        """Decorator: the object under it is the choice ``name``. Both texts are literals.

        Raises:
            UsageError: the name is taken, or is not made of letters, digits, "_", "-" and ".".
        """

        def register(value: Any) -> Any:
            if not name or not all(c.isascii() and (c.isalnum() or c in "_-.") for c in name):
                raise UsageError(f"{self.kind} {plain(repr(name), 80)}: a name is made of letters, digits, _, - and .")
            ours = getattr(value, "__module__", "") in self.homes  # which a user's file may be the first to import
            file = _loading[-1] if _loading and not ours else None
            taken = name in self._entries or name in self.also or (file is not None and name in self._own())
            if taken:
                raise UsageError(f"{self.kind} {name!r} is taken; choose another name")
            self._entries[name] = Entry(name, help, value, file)
            return value

        return register

    def get(self, name: str) -> Any:
        """The object of a choice; one from a user's file names that file where it fails.

        Raises:
            UsageError: there is none of this name; names those there are.
        """
        entry = self.entry(name)
        return entry.value if entry.file is None else _guarded(entry)

    def entry(self, name: str) -> Entry:
        """The whole entry of a choice (see :meth:`get`)."""
        name = self.also.get(name, name)
        for home in self.homes:
            if name not in self._entries and name in _in_source(home, self.symbol):
                importlib.import_module(home)
        if name not in self._entries:
            raise UsageError(f"unknown {self.kind} {plain(repr(name), 80)}; there are: {', '.join(self)}")
        return self._entries[name]

    def helps(self) -> dict[str, str]:
        """{name: its line of help}, the package's own first."""
        return {**self._own(), **{e.name: e.help for e in self._entries.values() if e.file is not None}}

    def file_of(self, name: str) -> Path | None:
        """The user's file that a choice comes from; None for the package's own."""
        found = self._entries.get(name)
        return found.file if found else None

    def help_text(self) -> str:
        """All choices with their meanings, for a setting's help."""
        return "; ".join(f"{name}: {text}" for name, text in self.helps().items())

    def _own(self) -> dict[str, str]:
        return {name: text for home in self.homes for name, text in _in_source(home, self.symbol).items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.helps())

    def __len__(self) -> int:
        return len(self.helps())

    def __contains__(self, name: object) -> bool:
        return name in self.helps() or name in self.also

    def __getitem__(self, index: Any) -> Any:
        return list(self.helps())[index]


@functools.cache
def _in_source(module: str, symbol: str) -> dict[str, str]:
    """{name: help} of the decorators ``@symbol.add(name, help)`` in a module's source."""
    package, *rest = module.split(".")  # find_spec of the module itself would import the packages above it
    source = Path(importlib.util.find_spec(package).origin).parent.joinpath(*rest).with_suffix(".py")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    found = {}
    for node in ast.walk(tree):
        for call in getattr(node, "decorator_list", ()):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == f"{symbol}.add":
                name, text = (ast.literal_eval(argument) for argument in call.args)
                found[name] = text
    return found


def load_file(path: Path, named_by: str = "LEVER_PLUGINS") -> str:
    """Run a Python file of the user's own, once, so that what it decorates is there. Returns its SHA-256.

    Raises:
        MissingInputError: it is not there. UsageError: it fails; names the file, the line and what was wrong.
    """
    path = path.resolve()
    if path in _loaded:
        return _loaded[path]
    if not path.is_file():
        raise MissingInputError(f"plugin file {path} not found ({named_by})")
    name = _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise UsageError(f"plugin file {path} is not Python source ({named_by})")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    _loading.append(path)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a stranger's file raises what it likes
        del sys.modules[name]
        raise UsageError(f"plugin file {_where(error, path)}") from error
    finally:
        _loading.pop()
    _loaded[path] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _loaded[path]


def function_in(path: Path, name: str) -> tuple[Callable[..., Any], str]:
    """A function of a Python file of the user's own, and the file's SHA-256. What it raises (and is none of our errors)
    becomes one line, with the line of the file.

    Raises:
        MissingInputError, UsageError: see :func:`load_file`; or there is no such function in it.
    """
    path = path.resolve()
    digest = load_file(path, "reader of the data set's YAML")
    value = getattr(sys.modules[_module_name(path)], name, None)
    if not callable(value):
        raise UsageError(f"{path}: there is no function {plain(name, 80)} in it")
    return _guarded(Entry(name, "", value, path)), digest


def _module_name(path: Path) -> str:
    return f"lever_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def plugins_in(words: Sequence[str], registries: Sequence[Registry]) -> dict[str, str]:
    """{name: SHA-256 of its file} of those words that name an entry of a user's file."""
    found = {}
    for word in words:
        for registry in registries:
            if (file := registry.file_of(word)) is not None:
                found[word] = _loaded[file]
    return found


def _guarded(entry: Entry) -> Any:
    """The object of a user's file; what a function raises (and is none of our errors) becomes one line."""
    if isinstance(entry.value, type) or not callable(entry.value):
        return entry.value

    @functools.wraps(entry.value)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return entry.value(*args, **kwargs)
        except (UsageError, MissingInputError, MemoryError):
            raise
        except (Exception, SystemExit) as error:  # a stranger's function raises what it likes
            raise UsageError(f"{entry.name} of plugin file {_where(error, entry.file)}") from error

    return call


def _where(error: BaseException, path: Path | None) -> str:
    """``path:line: what it raised``, the line being the deepest one in the user's file."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path]
    line = error.lineno if isinstance(error, SyntaxError) else (lines[-1] if lines else None)
    return f"{path}{f':{line}' if line else ''}: {type(error).__name__}: {plain(str(error), 200)}"
