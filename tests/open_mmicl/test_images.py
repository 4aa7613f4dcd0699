"""Every model sees the same picture: odd files are read right, or refused in one line that names the file."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lever_plus.data.clip_features import open_image
from open_mmicl.errors import DamagedInputError, MissingInputError
from open_mmicl.interface.images import ImageFiles, load_rgb

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
TURNED = {
    1: PIXELS, 2: PIXELS[:, ::-1], 3: PIXELS[::-1, ::-1], 4: PIXELS[::-1], 5: PIXELS.swapaxes(0, 1),
    6: PIXELS[::-1].swapaxes(0, 1), 7: PIXELS[::-1, ::-1].swapaxes(0, 1), 8: PIXELS[:, ::-1].swapaxes(0, 1),
}  # fmt: skip
LOSSLESS = {"png": {}, "webp": {"lossless": True}, "tif": {}}


def encoded(kind: str, **options: object) -> bytes:
    buffer = BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int, *more: bytes) -> bytes:
    """A TIFF header and a directory with an orientation and further 12-byte entries."""
    entries = [struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0), *more]
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + struct.pack("<I", 0)


def chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    right = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", right if checksum is None else checksum)


def segment(number: int, content: bytes) -> bytes:
    return bytes([0xFF, number]) + struct.pack(">H", len(content) + 2) + content


def read(path: Path) -> np.ndarray:
    """The picture for the LVLM, once it is seen that CLIP's is the same and that the header's size is right."""
    image, again = load_rgb(str(path)), open_image(str(path))
    assert image.mode == "RGB" and image.size == again.size == ImageFiles().size(str(path))[::-1]
    assert np.array_equal(np.asarray(image), np.asarray(again))
    return np.asarray(image)


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("orientation", TURNED)
def test_every_orientation_is_obeyed(kind: str, orientation: int, tmp_path: Path) -> None:
    tag = Image.Exif()
    tag[0x112] = orientation
    file = tmp_path / f"a.{kind}"
    Image.fromarray(PIXELS).save(file, exif=tag, **LOSSLESS[kind])
    assert np.array_equal(read(file), TURNED[orientation])


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_is_none_leaves_the_picture(orientation: int, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", exif=b"Exif\0\0" + exif(orientation)))
    assert read(tmp_path / "a.jpg").shape == (40, 60, 3)


def test_a_tag_that_cannot_be_written_back_does_not_matter(tmp_path: Path) -> None:
    unwritable = struct.pack("<HHII", 0x11A, 10, 1, 8 + 2 + 24 + 4)  # a signed rational, -1/0
    content = b"Exif\0\0" + exif(6, unwritable) + struct.pack("<ii", -1, 0)
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", exif=content))
    assert read(tmp_path / "a.jpg").shape == (60, 40, 3)


PNG, JPEG = encoded("PNG"), encoded("JPEG", quality=95)
ODD = {
    "text with a wrong checksum.png": PNG[:33] + chunk(b"tEXt", b"a\0b", 1) + PNG[33:],
    "text that unpacks to 80 MB.png": PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 80_000_000)) + PNG[33:],
    "no colour profile.png": PNG[:33] + chunk(b"iCCP", b"a\0\0garbage") + PNG[33:],
    "no EXIF.png": PNG[:33] + chunk(b"eXIf", b"garbage") + PNG[33:],
    "no EXIF.jpg": JPEG[:2] + segment(0xE1, b"Exif\0\0II*\0\xff\xff") + JPEG[2:],
    "no list of pictures.jpg": JPEG[:2] + segment(0xE2, b"MPF\0II*\0" + b"\xff" * 40) + JPEG[2:],
    "a short list of pictures.jpg": JPEG[:2] + segment(0xE2, b"MPF\0xx") + JPEG[2:],
    "no Photoshop data.jpg": JPEG[:2] + segment(0xED, b"Photoshop 3.0\0" + b"8BIM" + b"\xff" * 9) + JPEG[2:],
}


@pytest.mark.parametrize("name", ODD)
def test_metadata_never_decides_whether_pixels_can_be_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(ODD[name])
    plain = tmp_path / f"plain{name[-4:]}"
    plain.write_bytes(PNG if name.endswith("png") else JPEG)
    assert np.array_equal(read(tmp_path / name), read(plain))


def test_an_orientation_is_obeyed_beside_metadata_that_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG[:33] + chunk(b"iCCP", b"a\0\0no") + chunk(b"eXIf", exif(6), 7) + PNG[33:])
    assert np.array_equal(read(tmp_path / "a.png"), TURNED[6])


def test_a_tiff_with_a_broken_exif_directory_is_read(tmp_path: Path) -> None:
    data = encoded("TIFF")
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    entries = [data[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    entries += [struct.pack("<HHIHH", 0x112, 3, 1, 6, 0), struct.pack("<HHII", 0x8769, 4, 1, 2**31)]
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry)[0])
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    (tmp_path / "a.tif").write_bytes(data[:4] + struct.pack("<I", len(data)) + data[8:] + directory)
    assert np.array_equal(read(tmp_path / "a.tif"), TURNED[6])


@pytest.mark.parametrize("kind", ["png", "webp", "tif", "gif", "palette.png", "grey.png"])
def test_what_is_transparent_is_white(kind: str, tmp_path: Path) -> None:
    drawn = np.zeros((40, 60, 4), np.uint8)
    drawn[..., :3], drawn[:20, :, 3] = (200, 10, 10), 255  # the lower half: red under full transparency
    image, options = Image.fromarray(drawn), {"lossless": True} if kind == "webp" else {}
    if kind == "palette.png":
        image, options = image.convert("P"), {"transparency": 0}
    (image.convert("LA") if kind == "grey.png" else image).save(tmp_path / f"a.{kind}", **options)
    seen = read(tmp_path / f"a.{kind}")
    assert (seen[20:] == 255).all() and (seen[:20] != 255).all()


def test_half_transparent_pixels_are_mixed_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert np.abs(read(tmp_path / "a.png").astype(int) - (255, 127, 127)).max() <= 1


@pytest.mark.parametrize("kind", ["png", "tif", "pgm", "big-endian.tif", "transparent.png"])
def test_sixteen_bits_are_scaled(kind: str, tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 256), (32, 1)).astype("uint16")
    file = tmp_path / f"a.{kind}"
    if kind == "pgm":
        file.write_bytes(b"P5 256 32 65535\n" + ramp.astype(">u2").tobytes())
    elif kind == "big-endian.tif":
        Image.fromarray(ramp.astype(">u2")).save(file)
    else:
        Image.fromarray(ramp).save(file, **({"transparency": 0} if kind == "transparent.png" else {}))
    expected = (ramp >> 8).astype(np.uint8)
    expected[ramp == 0] = 255 if kind == "transparent.png" else 0
    assert np.array_equal(read(file)[..., 0], expected)


@pytest.mark.parametrize("name", ["float.tif", "long.tif", "cut.png", "cut.jpg", "text.jpg", "empty.png", "huge.png"])
def test_what_cannot_be_read_is_one_line_with_the_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name == "float.tif":
        Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(file)
    elif name == "long.tif":
        Image.fromarray(np.full((8, 8), 100_000, np.int32)).save(file)
    elif name == "huge.png":
        file.write_bytes(PNG[:16] + struct.pack(">II", 60_000, 60_000) + PNG[24:])
    else:
        content = {"cut.png": PNG[:3000], "cut.jpg": JPEG[:1500], "text.jpg": b"<html>404</html>", "empty.png": b""}
        file.write_bytes(content[name])
    for opener in (load_rgb, open_image):
        with pytest.raises(DamagedInputError) as error:
            opener(str(file))
        assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nothing.jpg"):
        load_rgb(str(tmp_path / "nothing.jpg"))
    with pytest.raises(DamagedInputError, match="directory"):
        load_rgb(str(tmp_path))
