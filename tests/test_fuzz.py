"""A part of the fuzz (scripts/fuzz.sh runs it for minutes) with a fixed seed, in a process of its own."""

import subprocess
import sys

from lever_plus.config import REPO_ROOT


def test_no_case_breaks_a_reader() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--cases", "250", "--seed", "2"]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "25 targets" in done.stdout and "exit 2" in done.stdout and "exit 4" in done.stdout
