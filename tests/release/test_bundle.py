"""The bundle file: what is written is read, and what was damaged, cut, forged or is something else is one line."""

import io as bytes_io
import json
import zipfile
from pathlib import Path

import pytest
import torch

from lever_plus.release import bundle
from lever_plus.selectors import PointerSelector, SelectorConfig
from lever_plus.selectors.checkpoint import as_safetensors
from open_mmicl.errors import DamagedInputError, MissingInputError

HEAD = {
    "dataset": "d", "split": "val", "n_queries": 1, "methods": ["v3"], "settings": {"DATASET": "d", "SEED": 1},
    "needs": {}, "accuracy": {"v3": {"1": 50.0}}, "ci95": {"v3": {"1": [0, 100]}}, "made_by": {},
}  # fmt: skip
FILES = {
    "anchors.json": b"{}", "images.json": b"{}", "pools.jsonl": b'{"question_id": 1, "pool": [2, 3]}\n',
    "picks.jsonl": b'{"question_id": 1, "method": "v3", "shot": 1, "picks": [3]}\n',
}  # fmt: skip


def made(tmp_path: Path, **files: bytes) -> Path:
    path = tmp_path / "b.zip"
    bundle.write(path, HEAD, {**FILES, **files})
    return path


def rewritten(path: Path, change) -> Path:
    """The same zip file with its entries changed: ``change`` takes and gives {name: bytes}."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in change(entries).items():
            archive.writestr(name, data)
    return path


def test_what_is_written_is_read_and_equal_content_is_equal_bytes(tmp_path: Path) -> None:
    first, second = made(tmp_path).read_bytes(), made(tmp_path).read_bytes()
    assert first == second
    found = bundle.read(tmp_path / "b.zip")
    assert found.files == FILES and found.head["methods"] == ["v3"] and found.lines("picks.jsonl")[0]["picks"] == [3]


def test_a_change_of_any_file_is_found(tmp_path: Path) -> None:
    changes = {name: (b"}", b" }") for name in FILES} | {"bundle.json": (b"50.0", b"51.0")}
    for name, (old, new) in changes.items():
        path = rewritten(made(tmp_path), lambda e, n=name, o=old, w=new: {**e, n: e[n].replace(o, w, 1)})
        with pytest.raises(DamagedInputError, match=r"damaged or was changed|longer|was changed"):
            bundle.read(path)


@pytest.mark.parametrize("name", [*FILES, "bundle.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = rewritten(made(tmp_path), lambda e: {k: v for k, v in e.items() if k != name})
    with pytest.raises(DamagedInputError, match=name):
        bundle.read(path)


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "selectors/../../evil", "more.json", "a\\b"])
def test_entries_that_are_not_listed_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DamagedInputError, match="does not list"):
        bundle.read(rewritten(made(tmp_path), lambda e: {**e, name: b"x"}))
    assert not (tmp_path.parent / "evil.txt").exists()


@pytest.mark.parametrize("name", ["../evil.safetensors", "/tmp/x.json", "selectors/x.pt", "selectors/a/b.safetensors"])
def test_listed_names_that_leave_the_bundle_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DamagedInputError, match="no file of a bundle"):
        bundle.read(made(tmp_path, **{name: b"x"}))


def test_an_entry_that_unpacks_to_more_than_it_says_is_not_unpacked(tmp_path: Path) -> None:
    path = made(tmp_path)

    def bomb(entries):
        return {**entries, "anchors.json": b"0" * 50_000_000}

    with pytest.raises(DamagedInputError, match="longer than 2 bytes"):
        bundle.read(rewritten(path, bomb))


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip", b"\x1f\x8b\x08"])
def test_other_files_are_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(content)
    with pytest.raises(DamagedInputError, match="x.zip"):
        bundle.read(path)
    with pytest.raises(MissingInputError, match=r"bundle\.sh"):
        bundle.read(tmp_path / "none.zip")


def test_a_cut_file_is_one_line(tmp_path: Path) -> None:
    path = made(tmp_path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedInputError):
            bundle.read(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "lever_plus.bundle/9"}, {"settings": {"A": []}}, {"methods": [1]}, {"files": {}}, {"needs": 3},
        {"files": {"anchors.json": {"bytes": "2", "sha256": ""}}},
    ],
)  # fmt: skip
def test_a_head_of_another_form_is_refused(tmp_path: Path, change: dict) -> None:
    path = made(tmp_path)

    def other(entries):
        head = {**json.loads(entries["bundle.json"]), **change}
        head["digest"] = bundle.digest(head)
        return {**entries, "bundle.json": json.dumps(head).encode()}

    with pytest.raises(DamagedInputError):
        bundle.read(rewritten(path, other))


def test_no_path_of_the_machine_is_kept() -> None:
    said = {"a": ["/home/me/models/x.pt", "see https://a.org/b/c"], "/data/y/z.json": "at /srv/q/r.md（/u/v/w）, 1/2"}
    assert bundle.without_paths(said) == {"a": ["x.pt", "see https://a.org/b/c"], "z.json": "at r.md（w）, 1/2"}


def test_a_selector_as_safetensors_picks_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    selector = PointerSelector(SelectorConfig(input_dim=8, hidden_dim=8, num_layers=1, gru_state=True), init="random")
    selector.save(tmp_path / "v3.pt", "rce", 1, {}, {}, {})
    (tmp_path / "v3.safetensors").write_bytes(as_safetensors(tmp_path / "v3.pt", PointerSelector))
    data = (tmp_path / "v3.safetensors").read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(head["__metadata__"]) == ["config", "format"] and int.from_bytes(data[:8], "little") % 8 == 0
    query, pool = torch.randn(5, 8), torch.randn(5, 9, 8)
    loaded = PointerSelector.load(tmp_path / "v3.safetensors")
    assert torch.equal(loaded.select(query, pool, 4), selector.eval().select(query, pool, 4))
    assert loaded.config == selector.config


@pytest.mark.parametrize("damage", ["cut", "foreign", "other"])
def test_damaged_safetensors_are_one_line(tmp_path: Path, damage: str) -> None:
    import safetensors.torch

    PointerSelector(SelectorConfig(input_dim=8, hidden_dim=8)).save(tmp_path / "a.pt", "rce", 1, {}, {}, {})
    whole = as_safetensors(tmp_path / "a.pt", PointerSelector)
    path = tmp_path / "a.safetensors"
    other = safetensors.torch.save({"x": torch.zeros(2)})
    path.write_bytes({"cut": whole[:200], "foreign": b"hello", "other": other}[damage])
    with pytest.raises(DamagedInputError, match=r"a\.safetensors"):
        PointerSelector.load(path)


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    path = made(tmp_path)
    buffer = bytes_io.BytesIO(path.read_bytes())
    with pytest.warns(UserWarning), zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("anchors.json", b"{}")
    path.write_bytes(buffer.getvalue())
    with pytest.raises(DamagedInputError, match="does not list once"):
        bundle.read(path)
