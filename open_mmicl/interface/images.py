"""Image files: content hashes, sizes, pixels. Every error names the file."""

import hashlib
import os
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from open_mmicl.errors import DamagedInputError, MissingInputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What an image file may be, whatever its name says. Not among them: EPS, which Pillow hands to Ghostscript."""
_EXIF_ORIENTATION = 0x0112
_SIDEWAYS = {5, 6, 7, 8}


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
        """(height, width) in pixels after the EXIF rotation; only the header is read.

        Raises:
            DamagedInputError: not an image.
        """
        digest = self.digest(path)
        if digest not in self._size:
            with _open(path) as image:
                width, height = image.size
                sideways = image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
            self._size[digest] = (width, height) if sideways else (height, width)
        return self._size[digest]


def load_rgb(path: str) -> Image.Image:
    """The upright RGB image.

    Raises:
        MissingInputError: no such file. DamagedInputError: truncated or not an image.
    """
    with _open(path) as image:
        try:
            return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise DamagedInputError(f"image {path} is truncated or damaged: {error}") from error


def _open(path: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise MissingInputError(f"image not found: {path}") from None
    except (Image.UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DamagedInputError(f"{path} is not a readable image: {type(error).__name__}") from error
    except OSError as error:
        raise DamagedInputError(f"image {path} cannot be read: {error}") from error
