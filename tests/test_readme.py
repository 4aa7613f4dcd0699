"""The two READMEs say the same in the same places."""

import re

import pytest

from lever_plus.config import REPO_ROOT

ENGLISH, CHINESE = ((REPO_ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))


def shape(text: str) -> list[str]:
    """Headings by level, table rows by their number of cells, code blocks by their number of lines, in order."""
    found, fence = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            if fence is not None:
                found.append(f"code {fence}")
            fence = 0 if fence is None else None
        elif fence is not None:
            fence += 1
        elif line.startswith("#"):
            found.append(line.split(" ")[0])
        elif line.startswith("|"):
            found.append(f"row {line.count('|')}")
        elif line.startswith("!["):
            found.append("picture")
    return found


def test_headings_tables_and_code_blocks_are_in_step() -> None:
    assert shape(ENGLISH) == shape(CHINESE)


def test_tables_name_the_same_settings_and_scripts_and_measure_the_same() -> None:
    def rows(text: str) -> list[list[str]]:
        told = [line for line in text.splitlines() if line.startswith("| ")]
        return [re.findall(r"`[A-Z_]{3,}`|`\w+\.sh`|[+−]?\d+\.\d", line) for line in told]

    assert rows(ENGLISH) == rows(CHINESE)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_local_links_lead_somewhere(text: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (REPO_ROOT / target).exists(), target
