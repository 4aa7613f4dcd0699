import weakref

import pytest
import torch

from lever_plus.data.embeddings import ModalityFile, load_embeddings
from open_mmicl.errors import DamagedInputError, MissingInputError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_comes_as_float32(tmp_path, dtype):
    value = torch.tensor([[1.0, -0.5], [0.25, 2.0]], dtype=dtype)
    torch.save(value, tmp_path / "e.pt")
    loaded = load_embeddings(tmp_path / "e.pt", "query embeddings", 2)
    assert loaded.dtype == torch.float32 and torch.equal(loaded, value.float())


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), "row 0, column 1 is nan"),
        (torch.tensor([[1.0, 2.0], [float("inf"), 1.0]]), "row 1, column 0 is inf"),
        (torch.zeros(3), r"shape \[3\]"),
        (torch.zeros(2, 3, 4), r"shape \[2, 3, 4\]"),
        (torch.zeros(0, 4), r"shape \[0, 4\]"),
        (torch.zeros(2, 4, dtype=torch.int64), "int64 tensor"),
        (torch.zeros(2, 4, dtype=torch.complex64), "complex64 tensor"),
        (torch.zeros(2, 4).to_sparse(), "float32 tensor"),
        ({"embeddings": torch.zeros(2, 4), "ids": [1, 2]}, "a dict"),
        ({"embeddings": {"embeddings": torch.zeros(2, 4)}}, "a dict"),
        ({"a": torch.zeros(4), "b": torch.zeros(4)}, "a dict"),
        ({1: torch.zeros(4), "1": torch.zeros(4)}, "an id stands there twice"),
        ({1: torch.zeros(4), 2: torch.zeros(2, 4)}, "entry 1 is a float32 tensor of shape"),
        ([1.0, 2.0], "entry 0 is a float"),
        ([[1.0, 2.0], [1.0]], r"entry 1 is a float32 tensor of shape \[1\], expected a vector of width 2"),
        ([[1.0, True], [1.0, 2.0]], "entry 0 is a list"),
        ([[1.0, 10**400], [1.0, 2.0]], "row 0, column 1 is inf"),
        ([], "a list"),
        ({}, "a dict"),
        (torch.zeros(3, 4), "3 rows for 2 items"),
        (torch.zeros(1).expand(10**9, 256), "float tensor"),  # a terabyte out of four bytes
        (torch.zeros(2, 4, device="meta"), "float tensor"),
    ],
)
def test_damage_is_named(tmp_path, value, says):
    torch.save(value, tmp_path / "e.pt")
    with pytest.raises(DamagedInputError, match=says):
        load_embeddings(tmp_path / "e.pt", "query embeddings", 2)


ROWS = torch.tensor([[1.0, -0.5], [0.25, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (list(ROWS), "a list of 3 tensors or vectors"),
        (tuple(ROWS.half()), "a tuple of 3 tensors or vectors"),
        ([ROWS[:2], ROWS[2:]], "a list of 2 tensors or vectors"),
        (ROWS.tolist(), "a list of 3 tensors or vectors"),
        ({"embeddings": ROWS, "model": "clip", "dim": 2}, "a dict with a tensor under 'embeddings'"),
        ({"features": ROWS.tolist()}, "a dict with a list of 3 tensors or vectors under 'features'"),
        ({2: ROWS[2], 0: ROWS[0], 1: ROWS[1][None]}, "the ids 0 to 2, taken in ascending order"),
        ({"900": ROWS[2], "70": ROWS[0].tolist(), "100": ROWS[1]}, "the ids 70 to 900, taken in ascending order"),
    ],
)
def test_plain_forms_are_read_and_said(tmp_path, caplog, value, says):
    from lever_plus.data.embeddings import log

    torch.save(value, tmp_path / "e.pt")
    log.propagate = True
    with caplog.at_level("INFO", "lever_plus"):
        found = load_embeddings(tmp_path / "e.pt", "query embeddings", 3)
    assert torch.equal(found, ROWS) and found.dtype == torch.float32
    assert [r.message for r in caplog.records] and says in caplog.records[0].message


@pytest.mark.parametrize("embedding", ["mean", "concat"])
def test_the_embeddings_of_a_file_are_combined_block_by_block(tmp_path, embedding, monkeypatch):
    from lever_plus.data import clip_features

    parts = {name: torch.nn.functional.normalize(torch.randn(11, 4), dim=1) for name in ("image", "text")}
    torch.save(parts, tmp_path / "e.pt")
    file = ModalityFile(tmp_path / "e.pt", "CLIP embeddings", 11)
    blocks = ModalityFile.blocks
    monkeypatch.setattr(ModalityFile, "blocks", lambda self, name: blocks(self, name, 4))
    found = clip_features.combine_file(file, embedding, "query_img_text_icd_img_text")
    assert torch.equal(found, clip_features.combine_modalities(parts, embedding, "query_img_text_icd_img_text"))
    parts["text"][9, 1] = float("nan")
    torch.save(parts, tmp_path / "e.pt")
    with pytest.raises(DamagedInputError, match=r"\(text\).*row 9, column 1 is nan"):
        clip_features.combine_file(file, embedding, "query_img_text_icd_img_text")
    torch.save({"image": parts["image"], "text": parts["text"][:9].nan_to_num()}, tmp_path / "e.pt")
    with pytest.raises(DamagedInputError, match=r"image is \[11, 4\], text is \[9, 4\]"):
        clip_features.combine_file(ModalityFile(tmp_path / "e.pt", "CLIP embeddings"), "mean", "query_img_icd_img")


def test_modalities(tmp_path):
    parts = {"image": torch.rand(3, 4), "text": torch.rand(3, 4)}
    torch.save(parts, tmp_path / "e.pt")
    loaded = dict(ModalityFile(tmp_path / "e.pt", "CLIP embeddings", 3))
    assert all(torch.equal(loaded[name], parts[name]) for name in parts)
    torch.save({"image": torch.rand(3, 4)}, tmp_path / "e.pt")
    with pytest.raises(DamagedInputError, match="image and text"):
        dict(ModalityFile(tmp_path / "e.pt", "CLIP embeddings", 3))


def test_missing_names_the_command(tmp_path):
    with pytest.raises(MissingInputError, match="export_embeddings.sh"):
        load_embeddings(tmp_path / "e.pt", "query embeddings")


def test_a_modality_is_held_only_by_who_asked_for_it(tmp_path):
    parts = {"image": torch.rand(3, 4), "text": torch.rand(3, 4)}
    torch.save(parts, tmp_path / "e.pt", _use_new_zipfile_serialization=False)  # an older form cannot be mapped
    file = ModalityFile(tmp_path / "e.pt", "CLIP embeddings", 3)
    assert list(file) == ["image", "text"] and torch.equal(file["text"], parts["text"])
    torch.save(parts, tmp_path / "e.pt")
    asked = weakref.ref(file["text"])
    assert asked() is None and torch.equal(file["image"], parts["image"])
