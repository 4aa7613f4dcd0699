"""Where a data set's pictures lie: names in some folders, tried in order. No picture is opened."""

from functools import cached_property
from os import DirEntry, scandir
from pathlib import Path
from unicodedata import normalize

from lever_plus.config import fill_in
from open_mmicl.errors import UsageError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Endings that are tried, small and in capitals, where a name has none of them."""


class Pictures:
    """The pictures of a split.

    Args:
        folders: tried in order. pattern: name of an image's file with ``{image_id}``, with or without its ending;
            used where the questions do not name the file.
    """

    def __init__(self, folders: list[Path], pattern: str) -> None:
        self.folders, self.pattern = folders, pattern

    def name(self, image_id: int | str) -> str:
        """The name of an image's file.

        Raises:
            UsageError: the pattern does not fit the ids.
        """
        try:
            return fill_in(self.pattern, image_id=image_id)
        except (ValueError, KeyError) as error:
            raise UsageError(
                f"image_name {self.pattern!r} of the data set's YAML does not fit image_id {image_id!r} ({error})"
            ) from error

    def find(self, name: str) -> Path | None:
        """The file of this name in the first folder that has it, with one of :data:`ENDINGS` where it has none."""
        for folder in self.folders:
            for candidate in _spellings(name):
                if (folder / candidate).is_file():
                    return folder / candidate
        return None

    def missing(self, names: list[str]) -> tuple[list[str], list[str]]:
        """Of some names: (those that no folder has, those whose file is empty)."""
        missing, empty = [], []
        for name in names:
            size = next((s for c in _spellings(name) if (s := self._size(c)) is not None), None)
            if size is None:
                missing.append(name)
            elif size == 0:
                empty.append(name)
        return missing, empty

    def _size(self, name: str) -> int | None:
        if "/" not in name:
            return self._sizes.get(name)
        found = next((folder / name for folder in self.folders if (folder / name).is_file()), None)
        return found.stat().st_size if found else None

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Sizes of the files that lie in the folders themselves; of equal names the first folder's."""
        sizes: dict[str, int] = {}
        for folder in reversed(self.folders):
            if folder.is_dir():
                with scandir(folder) as entries:
                    sizes.update((entry.name, entry.stat().st_size) for entry in entries if _is_file(entry))
        return sizes


def _is_file(entry: DirEntry) -> bool:
    """As ``Path.is_file``, for which a link that leads to itself is no file."""
    try:
        return entry.is_file()
    except OSError:
        return Path(entry.path).is_file()


def _spellings(name: str) -> list[str]:
    """The names that a file may have: an accented letter is one character or, on macOS, two; the ending may lack."""
    forms = [name]
    if not name.isascii():
        forms = list(dict.fromkeys((name, normalize("NFC", name), normalize("NFD", name))))
    if name.lower().endswith(ENDINGS):
        return forms
    return [form + ending for form in forms for ending in ("", *ENDINGS, *(ending.upper() for ending in ENDINGS))]
