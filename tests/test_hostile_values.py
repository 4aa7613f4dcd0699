"""Values of files and command lines that are not what their reader expects, drawn: kinds, not cases."""

import contextlib
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lever_plus import provenance, shards
from lever_plus.config import fill_in
from open_mmicl.arguments import LARGEST, Parser, whole
from open_mmicl.errors import DamagedInputError
from open_mmicl.interface.config import read_yaml

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TEXT = st.one_of(
    st.text(max_size=12), st.sampled_from(["1_0", "٣", "-1", "1e3", "9" * 30, "\x1b[31m", "~nosuchuser", "a\0"])
)


@given(TEXT, st.sampled_from(["--n", "--few", "--x", "--file", "--no"]))
def test_a_command_line_is_read_in_ascii_or_refused_in_one_line(text: str, option: str) -> None:
    parser = Parser(prog="p")
    parser.add_argument("--n", type=int)
    parser.add_argument("--few", type=whole(2, 40))
    parser.add_argument("--x", type=float)
    parser.add_argument("--file", type=Path)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found = parser.parse_args([f"{option}={text}"])
    except SystemExit as error:
        said = said.getvalue()
        assert error.code == 2 and len(said.splitlines()) == 1 and len(said) < 600
        assert said.startswith("error: ") and said.rstrip("\n").isprintable()
        return
    assert option != "--n" or (text.isascii() and text.isdecimal() and 0 <= found.n <= LARGEST)
    assert option != "--few" or (text.isascii() and text.isdecimal() and 2 <= found.few <= 40)
    assert option != "--x" or (text.isascii() and found.x == float(text))
    assert option != "--file" or str(found.file).isprintable()


@given(
    st.one_of(st.text(max_size=20), st.sampled_from(["{a.__class__}", "{a!r}", "{a:>9999999999}", "{a[0]}", "{{}}"]))
)
def test_a_pattern_replaces_names_and_nothing_else(pattern: str) -> None:
    try:
        made = fill_in(pattern, a="x", image_id=7)
    except (KeyError, ValueError):
        return
    assert len(made) <= len(pattern) + 200 and "class" not in made.replace(pattern, "")


@pytest.mark.parametrize(("pattern", "made"), [("{image_id:012d}.jpg", "000000000007.jpg"), ("{{{image_id}}}", "{7}")])
def test_a_pattern_as_the_readme_has_it(pattern: str, made: str) -> None:
    assert fill_in(pattern, image_id=7) == made


@given(JSON)
def test_whatever_lies_beside_an_output_is_provenance_or_damaged(tmp_path_factory, value: object) -> None:
    out = tmp_path_factory.mktemp("stamp") / "out.json"
    out.write_text("1")
    provenance.sidecar(out).write_text(json.dumps({"recipe": value, "prompts": value, "fingerprint": value}))
    try:
        assert provenance.status(out, provenance.Recipe({}, {})) in ("stale", "foreign", "missing", "current")
        provenance.changed(out, provenance.Recipe({}, {}))
    except DamagedInputError as error:
        assert provenance.sidecar(out).name in str(error)


@given(st.lists(JSON, min_size=2, max_size=3))
def test_a_part_s_line_is_a_row_or_damaged(tmp_path_factory, values: list) -> None:
    folder = tmp_path_factory.mktemp("parts")
    good = json.dumps({"fingerprint": "f", "key": "1", "value": 2})
    (folder / "a.jsonl").write_text("\n".join([good, *map(json.dumps, values), good, ""]))
    with pytest.raises(DamagedInputError, match="line 2"):
        shards._read_parts(folder, "f")


@given(st.sampled_from([("1", "0x1"), ("yes", "true"), ("a", "'a'"), ("1.0", "1"), ("~", "null"), ("a", '"\\x61"')]))
def test_equal_keys_are_refused_however_they_are_written(tmp_path_factory, keys: tuple[str, str]) -> None:
    path = tmp_path_factory.mktemp("yaml") / "a.yaml"
    path.write_text(f"b: 0\n{keys[0]}: 1\n{keys[1]}: 2\n")
    with pytest.raises(DamagedInputError, match=r"a\.yaml.*line 3: .* is there twice \(first in line 2\)"):
        read_yaml(path)


def test_a_mapping_that_another_is_merged_into_may_say_more(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n")
    assert read_yaml(tmp_path / "a.yaml")["b"] == {"x": 1, "y": 3}
