"""Commands one after the other, in a script's place, so that a signal to the script reaches the one that runs.

    python -m lever_plus.in_turn -- COMMAND … [-- COMMAND …]

Ends with the exit code of the first that fails.
"""

import itertools
import os
import sys
from collections.abc import Sequence

from lever_plus import cli
from open_mmicl.errors import UsageError


def main(argv: Sequence[str]) -> int:
    """Run them."""
    commands = [list(words) for is_end, words in itertools.groupby(argv, lambda word: word == "--") if not is_end]
    if not commands or argv[0] != "--":
        raise UsageError("usage: python -m lever_plus.in_turn -- COMMAND … [-- COMMAND …]")
    for command in commands:
        code = cli.call(command, os.environ)
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guard(lambda: main(sys.argv[1:])))
