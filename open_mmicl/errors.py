"""The errors a user can meet, each with its exit code (README, Troubleshooting).

0 done, 2 usage or configuration, 3 an input is missing, 4 an input is damaged or of an unknown
format, 5 the numbers went bad, 130 interrupted. The message is one line that says what to do.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 1000


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
    """Another process of the same run has ended, so this one cannot go on; what is done is kept."""

    exit_code = 130


@contextlib.contextmanager
def foreign(what: str, path: Path | str) -> Iterator[None]:
    """Around the call of a library that reads a file: whatever it raises becomes one error that names the file.

    Decoders and parsers raise what they like (struct.error, KeyError, MemoryError for a size that a damaged header
    claims); a list of their exceptions is never complete.

    Raises:
        DamagedInputError: any error that is not one of ours.
    """
    try:
        yield
    except LeverError:
        raise
    except OSError as error:
        raise DamagedInputError(f"{what} {path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # noqa: BLE001 - the boundary to other people's code
        said = " ".join(str(error).split())
        kind = type(error).__name__
        raise DamagedInputError(f"{what} {path}: damaged or of an unknown form ({kind}: {plain(said, 300)})") from error


def expand(text: str, name: str) -> Path:
    """A path with ``~`` and ``~user`` replaced; ``name``: the setting that holds it.

    Raises:
        UsageError: no such user, or no home folder is known.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{name}={text} is not allowed: there is no home folder of that name") from error
