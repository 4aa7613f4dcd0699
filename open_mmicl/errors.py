"""The errors a user can meet, each with its exit code (README, Troubleshooting).

0 done, 2 usage or configuration, 3 an input is missing, 4 an input is damaged or of an unknown
format, 5 the numbers went bad, 130 interrupted. The message is one line that says what to do.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 1000
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "can't start new thread")


def plain(value: Any, longest: int = LONGEST_MESSAGE) -> str:
    """A text as one line for a screen: what does not print is escaped, and of a very long one the middle is left out.

    File names and file contents reach error messages; a terminal would obey their escape sequences.
    """
    text = str(value)
    if len(text) > longest:
        text = f"{text[: longest * 2 // 3]} … {text[-longest // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class LeverError(Exception):
    """Base class; ``exit_code`` is what the process returns."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(plain(message))


class UsageError(LeverError):
    """A setting or argument is wrong: names it, its value and what is allowed."""

    exit_code = 2


class UnscorableAnswerError(UsageError):
    """An answer whose tokens cannot be told from the prompt around it, or do not decode to it."""


class MissingInputError(LeverError):
    """An input file or model is not there: says which, and the command that makes it."""

    exit_code = 3


class DamagedInputError(LeverError):
    """An input exists but is truncated, malformed or of an unknown format: says where."""

    exit_code = 4


class NumericError(LeverError):
    """A loss or score became non-finite. Nothing was overwritten."""

    exit_code = 5


class InterruptedRunError(LeverError):
    """Another process of the same run has ended, so this one cannot continue; what is done is kept."""

    exit_code = 130


@contextlib.contextmanager
def foreign(
    what: str, path: Path | str, problem: str = "is damaged or of an unknown form", advice: str = ""
) -> Iterator[None]:
    """Around the call of a library that reads a file: whatever it raises becomes one error that names the file.

    Decoders and parsers raise what they like (struct.error, KeyError, MemoryError for a size that a damaged header
    claims); a list of their exceptions is never complete. The library's own error is the ``__cause__``.

    Args:
        problem, advice: what is said between the file and the library's words, and after them.

    Raises:
        DamagedInputError: any error that is not one of ours.
    """
    try:
        yield
    except LeverError:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary to other people's code
        after = f"; {advice}" if advice else ""
        if is_no_memory(error):
            problem = "cannot be read: it is damaged, or needs more memory than there is"
        elif isinstance(error, OSError) and error.strerror:
            raise DamagedInputError(f"{what} {path}: cannot be read ({error.strerror}){after}") from error
        raise DamagedInputError(f"{what} {path}: {problem} ({_said(error)}){after}") from error


def is_no_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short: Python's own, or a library's by its words."""
    text = _text(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in text for w in NO_MEMORY))


def _text(error: BaseException) -> str:
    """An error's text; a library's may not be able to say its own."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - its kind is told all the same
        return ""


def _said(error: BaseException) -> str:
    """The first line of an error's text, and what kind of error it is."""
    line = (_text(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {plain(line, 300)}" if line else type(error).__name__


def expand(text: str, name: str) -> Path:
    """A path with ``~`` and ``~user`` replaced; ``name``: the setting that holds it.

    Raises:
        UsageError: no such user, or no home folder is known.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{name}={text} is not allowed: there is no home folder of that name") from error
