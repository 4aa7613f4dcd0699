"""Programs that may be there: asked where they are, done without where they are not."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

PATIENCE = 60  # seconds; a driver or a network file system may hang


def ask(words: Sequence[str], folder: Path | None = None) -> str | None:
    """What a program prints; None where it is not installed, may not be run, fails, or does not answer."""
    try:
        done = subprocess.run(
            words, cwd=folder, capture_output=True, check=False, timeout=PATIENCE, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
