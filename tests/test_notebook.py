"""The notebook of docs/: its cells, run in order as it has them, end in the picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
INSTALL = "%pip install -q .."
"""The one cell that is no Python; what the tests run on is installed already."""


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_the_picture(tmp_path: Path) -> None:
    book = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    assert cells[0] == INSTALL and not any(cell.get("outputs") for cell in book["cells"])
    place = {"PYTHONPATH": str(ROOT), "RESULT_DIR": str(tmp_path / "results"), "DEVICE": "cpu", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(cells[1:])],
        cwd=tmp_path, env={**os.environ, **place}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, asked = done.stdout.strip().splitlines()
    right, alone, shown = (part.split(": ")[1] for part in asked.split("; "))
    assert shown == right != alone
    with Image.open(tmp_path / "picks.png") as picture:
        assert picture.width == 1500 and len(picture.convert("RGB").getcolors(1 << 24)) > 1000  # photographs, no blank
