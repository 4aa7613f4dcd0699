import weakref

import pytest
import torch

from lever_plus.data.embeddings import ModalityFile, load_embeddings, load_modalities
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
        ({"embeddings": torch.zeros(2, 4)}, "a dict"),
        ([1.0, 2.0], "a list"),
        (torch.zeros(3, 4), "3 rows for 2 items"),
        (torch.zeros(1).expand(10**9, 256), "float tensor"),  # a terabyte out of four bytes
        (torch.zeros(2, 4, device="meta"), "float tensor"),
    ],
)
def test_damage_is_named(tmp_path, value, says):
    torch.save(value, tmp_path / "e.pt")
    with pytest.raises(DamagedInputError, match=says):
        load_embeddings(tmp_path / "e.pt", "query embeddings", 2)


def test_modalities(tmp_path):
    parts = {"image": torch.rand(3, 4), "text": torch.rand(3, 4)}
    torch.save(parts, tmp_path / "e.pt")
    loaded = load_modalities(tmp_path / "e.pt", "CLIP embeddings", 3)
    assert all(torch.equal(loaded[name], parts[name]) for name in parts)
    torch.save({"image": torch.rand(3, 4)}, tmp_path / "e.pt")
    with pytest.raises(DamagedInputError, match="image and text"):
        load_modalities(tmp_path / "e.pt", "CLIP embeddings", 3)


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
