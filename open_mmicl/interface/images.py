"""Image files: content hashes, sizes, pixels. The one place that opens a picture, for every model.

What a file says beside its pixels (EXIF, colour profiles, comments) is advice: it turns the picture where it can be
read, and never decides whether the picture can. Every error names the file.
"""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from open_mmicl.errors import DamagedInputError, MissingInputError, foreign
from open_mmicl.interface.image_bytes import pixels_only

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What an image file may be, whatever its name says. Not among them: EPS, which Pillow hands to Ghostscript."""
READ_AS = 2
"""Part of every answer's cache key; goes up when a file's pixels are read otherwise than before."""
_EXIF_ORIENTATION, _TIFF_BITS = 0x0112, 0x0102
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SIDEWAYS = {5, 6, 7, 8}
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
T = TypeVar("T")


class ImageFiles:
    """Content hashes and sizes of image files, remembered by path, size and modification time.

    Two paths with the same bytes are the same image; a file that is replaced is a new one.
    """

    def __init__(self) -> None:
        self._digest: dict[str, tuple[tuple[int, int], bytes]] = {}
        self._size: dict[bytes, tuple[int, int]] = {}

    def digest(self, path: str) -> bytes:
        """SHA-256 (20 bytes of it) of the file's bytes.

        Raises:
            MissingInputError: no such file. DamagedInputError: it cannot be read.
        """
        try:
            stat = os.stat(path)  # noqa: PTH116 - a Path object costs more than the call itself
        except OSError:
            raise MissingInputError(f"image not found: {path}") from None
        stamp = (stat.st_mtime_ns, stat.st_size)
        known = self._digest.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        try:
            digest = hashlib.sha256(Path(path).read_bytes()).digest()[:20]
        except OSError as error:
            raise DamagedInputError(f"image {path} cannot be read: {error.strerror or error}") from error
        self._digest[path] = (stamp, digest)
        return digest

    def size(self, path: str) -> tuple[int, int]:
        """(height, width) in pixels of the upright image; only the header is read.

        Raises:
            DamagedInputError: not an image.
        """
        digest = self.digest(path)
        if digest not in self._size:
            self._size[digest] = _with_image(path, _upright_size)
        return self._size[digest]


def load_rgb(path: str) -> Image.Image:
    """The upright RGB image: transparent pixels over white, 16 bits scaled to 8, the first frame of several.

    Raises:
        MissingInputError: no such file. DamagedInputError: truncated, not an image, or pixels without a known range.
    """
    return _with_image(path, _upright_rgb)


def _with_image(path: str, use: Callable[[Image.Image], T]) -> T:
    """``use(image)`` of the file; tried again without the file's metadata where anything is raised."""
    try:
        with foreign("image", path, "cannot be read"):
            return _opened(path, use)
    except DamagedInputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise MissingInputError(f"image not found: {path}") from None
        plain = None if isinstance(error.__cause__, _BOMBS) else _without_metadata(path)
        if plain is not None:
            with contextlib.suppress(DamagedInputError), foreign("image", path):  # the whole file's error is told
                return _opened(BytesIO(plain), use)
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise DamagedInputError(
                f"image {path} cannot be read: not an image of a known format, or a damaged one"
            ) from error
        raise


def _without_metadata(path: str) -> bytes | None:
    with contextlib.suppress(DamagedInputError), foreign("image", path):
        return pixels_only(Path(path).read_bytes())
    return None


def _opened(source: Any, use: Callable[[Image.Image], T]) -> T:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(source, formats=FORMATS) as image:
            return use(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def _upright_rgb(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    image.load()
    upright = _rgb(image)
    return upright.transpose(_TURNS[orientation]) if orientation in _TURNS else upright


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (as it is) where there is none that can be read. Pillow turns a TIFF itself."""
    if image.format == "TIFF":
        return 1
    value = None
    with contextlib.suppress(DamagedInputError), foreign("EXIF of", str(image.format)):
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    return value if isinstance(value, int) and value in _TURNS else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP:
        return _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers without a known range; save it with 8 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in key)  # of 16 bits; Pillow keeps the higher 8
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits (or 12, in a TIFF), scaled; the transparent level is white."""
    levels = np.asarray(image).astype(np.int64)
    if levels.min() < 0 or levels.max() > 0xFFFF:
        raise ValueError("its pixels are 32-bit numbers without a known range; save it with 8 bits")
    bits = 12 if getattr(image, "tag_v2", {}).get(_TIFF_BITS) == (12,) else 16
    grey = (levels >> (bits - 8)).clip(0, 255).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[levels == key] = 255
    return Image.fromarray(grey).convert("RGB")
