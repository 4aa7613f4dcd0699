"""The one reader of .env files, for Python and for the scripts.

    python3 -I lever_plus/dotenv.py FILE [or-empty]

prints bash that exports what the file sets and the environment leaves unset (``or-empty``: or empty). The standard
library alone, and any Python 3: a script asks before the requirements are installed.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

_ASSIGNMENT = re.compile(r"(export\s+)?(?P<name>[A-Za-z_][A-Za-z_0-9]*)\s*=(?P<value>.*)", re.DOTALL)
_QUOTED = re.compile(r"""(?P<quote>["'])(?P<text>.*?)(?P=quote)\s*(#.*)?""", re.DOTALL)


class DotenvError(ValueError):
    """The file cannot be read, or a line of it is no assignment; one line that names both."""


def parse(data: bytes, path: Path) -> dict[str, str]:
    """``NAME=value`` lines; blanks round ``=``, ``export``, quotes and comments are allowed. The last of a name counts.

    Raises:
        DotenvError.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DotenvError(f"{path} is not UTF-8 text (byte {error.start})") from error
    values = {}
    for number, line in enumerate(map(str.strip, re.split(r"\r\n|\r|\n", text)), 1):
        if not line or line.startswith("#"):
            continue
        if "\0" in line:
            raise DotenvError(f"{path}: line {number} holds a NUL byte")
        found = _ASSIGNMENT.fullmatch(line)
        if not found:
            raise DotenvError(f"{path}: line {number} is not NAME=value: {line[:60]!r}")
        value = found.group("value").strip()
        quoted = _QUOTED.fullmatch(value)
        values[found.group("name")] = quoted.group("text") if quoted else value.split(" #")[0].strip()
    return values


def read(path: Path) -> dict[str, str]:
    """:func:`parse` of a file.

    Raises:
        DotenvError.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DotenvError(f"{path} cannot be read ({error.strerror})") from error
    return parse(data, path)


def main() -> int:
    """Entry point; returns the exit code (4: damaged)."""
    try:
        values = read(Path(sys.argv[1]))
    except DotenvError as error:
        print(f"error: {error}".encode("ascii", "backslashreplace").decode(), file=sys.stderr)
        return 4
    there = ":-" if "or-empty" in sys.argv[2:] else "+set"
    lines = (f'[ -n "${{{name}{there}}}" ] || export {name}={shlex.quote(value)}\n' for name, value in values.items())
    sys.stdout.buffer.write("".join(lines).encode())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
