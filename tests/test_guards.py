"""The boundary to libraries that read files: whatever they raise is one line that names the file, exit 4."""

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lever_plus import io
from lever_plus.stages.convert_checkpoint import read_inert
from open_mmicl.errors import DamagedInputError, LeverError, MissingInputError, foreign
from open_mmicl.interface.config import read_yaml
from open_mmicl.interface.fingerprint import weight_digest
from open_mmicl.interface.images import ImageFiles, load_rgb


def every_exception(cls: type = Exception) -> list[type]:
    """All exception classes of Python and of the libraries that are loaded."""
    found = [cls]
    for sub in cls.__subclasses__():
        found += every_exception(sub)
    return found


class Odd(Exception):
    """A library's own exception, which no list of ours can name."""


def made(kind: type) -> Exception | None:
    for arguments in (("some\ntext \x1b[31m",), (), ("utf-8", b"x", 0, 1, "bad"), (1, 2)):
        try:
            return kind(*arguments)
        except Exception:  # noqa: BLE001, S112 - not every class takes these
            continue
    return None


def test_every_exception_there_is_becomes_one_line_that_names_the_file() -> None:
    seen = 0
    for kind in {Odd, *every_exception()}:
        error = made(kind)
        if error is None:
            continue
        with pytest.raises(Exception) as caught, foreign("YAML", "a.yaml"):
            raise error
        if isinstance(error, LeverError):  # the package's own, which other tests may have loaded
            assert caught.value is error
            continue
        assert type(caught.value) is DamagedInputError and caught.value.__cause__ is error
        assert str(caught.value).startswith("YAML a.yaml: ") and str(caught.value).isprintable()
        seen += 1
    assert seen > 100


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interruption_passes(kind: type) -> None:
    with pytest.raises(kind), foreign("YAML", "a.yaml"):
        raise kind


def test_memory_that_is_short_is_not_told_as_damage_alone() -> None:
    for error in (MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate")):
        with pytest.raises(DamagedInputError, match="more memory than there is"), foreign("model in", "m"):
            raise error


def good_files(folder: Path) -> dict[str, bytes]:
    """One whole file of each form."""
    np.save(folder / "a.npy", np.arange(12, dtype=np.float32).reshape(3, 4))
    torch.save({"w": torch.ones(3), "epoch": 2}, folder / "a.pt")
    torch.save([torch.ones(3)], folder / "b.pt", _use_new_zipfile_serialization=False)
    for name in ("a.png", "a.jpg", "a.gif", "a.bmp", "a.webp", "a.tiff", "a.ppm"):
        Image.new("RGB", (9, 7), (1, 2, 3)).save(folder / name)
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, str(folder / "a.safetensors"))
    (folder / "a.yaml").write_text("a: 1\nb: [1, {c: d}]\n")
    (folder / "a.json").write_text('{"a": [1, 2.5, null, "x"]}')
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


READERS = {
    ".npy": [lambda p: io.load_npy(p, "x"), lambda p: io.load_npy(p, "x", mapped=True)],
    ".pt": [lambda p: io.load_torch(p, "x"), lambda p: io.load_torch(p, "x", mapped=True), read_inert],
    ".safetensors": [weight_digest],
    ".yaml": [read_yaml],
    ".json": [lambda p: io.read_json(p, "x")],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("files")
    return folder, good_files(folder)


@given(data=st.data())
def test_a_damaged_file_of_any_form_is_one_line_that_names_it(files, data) -> None:
    folder, good = files
    name = data.draw(st.sampled_from(sorted(good)))
    content = bytearray(good[name])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        how = data.draw(st.sampled_from(["cut", "byte", "insert", "number", "repeat"]))
        if how == "cut":
            del content[at:]
        elif how == "byte" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif how == "insert":
            content[at:at] = data.draw(st.binary(max_size=12))
        elif how == "number":
            content[at : at + 4] = struct.pack("<I", data.draw(st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1])))
        else:
            content[at:at] = content[at : at + 40]
    path = folder / f"damaged{Path(name).suffix}"
    path.write_bytes(bytes(content))
    readers = READERS.get(path.suffix, [lambda p: load_rgb(str(p)), lambda p: ImageFiles().size(str(p))])
    for read in readers:
        try:
            read(path)
        except DamagedInputError as error:
            assert path.name in str(error) and str(error).isprintable()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EACCES, errno.EIO, errno.EBADF])
def test_a_folder_that_cannot_be_synced_fails_no_write(tmp_path: Path, monkeypatch, number: int) -> None:
    sync = os.fsync

    def refuse(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    io.write_json(tmp_path / "a.json", {"x": 1})
    assert io.read_json(tmp_path / "a.json", "x") == {"x": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("number", "counts"), [(errno.EINVAL, False), (errno.EIO, True), (errno.ENOSPC, True)])
def test_what_a_file_s_own_sync_says_counts_where_it_is_about_the_data(tmp_path, monkeypatch, number, counts) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if counts:
        with pytest.raises(OSError):
            io.write_json(tmp_path / "a.json", 1)
        assert not list(tmp_path.iterdir())
    else:
        io.write_json(tmp_path / "a.json", 1)


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    for read in (lambda p: io.load_npy(p, "x"), lambda p: load_rgb(str(p)), read_inert):
        with pytest.raises(MissingInputError):
            read(tmp_path / "no.npy")
