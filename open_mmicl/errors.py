"""The errors a user can meet, each with its exit code (README, Troubleshooting).

0 done, 2 usage or configuration, 3 an input is missing, 4 an input is damaged or of an unknown
format, 5 the numbers went bad, 130 interrupted. The message is one line that says what to do.
"""


class LeverError(Exception):
    """Base class; ``exit_code`` is what the process returns."""

    exit_code = 1


class UsageError(LeverError):
    """A setting or argument is wrong: names it, its value and what is allowed."""

    exit_code = 2


class MissingInputError(LeverError):
    """An input file or model is not there: says which, and the command that makes it."""

    exit_code = 3


class DamagedInputError(LeverError):
    """An input exists but is truncated, malformed or of an unknown format: says where."""

    exit_code = 4


class NumericError(LeverError):
    """A loss or score became non-finite. Nothing was overwritten."""

    exit_code = 5
