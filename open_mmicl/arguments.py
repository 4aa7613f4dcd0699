"""The command lines that argparse reads: one printable line for what is wrong with them, numbers with limits."""

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from open_mmicl.errors import UsageError, expand, plain

LARGEST = 2**32 - 1  # seeds are the largest whole numbers that a command takes
LONGEST_PATH = 4096  # bytes
_WHOLE = re.compile(r"[0-9]{1,10}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


class Parser(argparse.ArgumentParser):
    """argparse's own, whose ``type=int`` is a whole number from 0 to :data:`LARGEST` in ASCII digits, ``type=float`` a
    finite one, and ``type=Path`` a path that can be handed to the system.
    """

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        for kind, read in ((int, whole()), (float, _number), (Path, _path)):
            self.register("type", kind, read)

    def error(self, message: str) -> NoReturn:
        """Exit code 2 and one line."""
        self.exit(UsageError.exit_code, f"error: {plain(message, 400)} (see --help)\n")


def whole(lo: int = 0, hi: int = LARGEST) -> Callable[[str], int]:
    """An argument's ``type``: a whole number from ``lo`` to ``hi`` (0 to :data:`LARGEST`)."""

    def read(text: str) -> int:
        if not _WHOLE.fullmatch(text) or not lo <= int(text) <= hi:
            raise argparse.ArgumentTypeError(f"{plain(repr(text), 80)} is not a whole number from {lo} to {hi}")
        return int(text)

    return read


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text) or len(text) > 40 or not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{plain(repr(text), 80)} is not a number")
    return float(text)


def _path(text: str) -> Path:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        size = 0
    if not 0 < size <= LONGEST_PATH or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{plain(repr(text), 80)} is not a path")
    try:
        return expand(text, "path") if text.startswith("~") else Path(text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
