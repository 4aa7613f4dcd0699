"""Prompts as messages of the chat-completions API, images as data URLs, file URLs or identifiers."""

import base64
import io
from collections.abc import Set
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from open_mmicl.errors import DamagedInputError
from open_mmicl.interface.images import FORMATS, ImageFiles, load_rgb
from open_mmicl.interface.prompts import Prompt, PromptFormat

_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_EXIF_ORIENTATION = 0x0112
_KEPT = 512  # encoded images


class Messages:
    """Makes the messages of prompts.

    Args:
        files: digests of images. way: how images are sent: ``data`` (in every request), ``uuid`` (in the first request
            that holds them, with their hash; from then on the hash alone) or ``file`` (the server reads the path).
    """

    def __init__(self, prompt_format: PromptFormat, files: ImageFiles, way: str):
        self.format, self.files, self.way = prompt_format, files, way
        self._data_url = lru_cache(_KEPT)(_data_url)

    def of(
        self, prompt: Prompt, answer: str | None = None, held: Set[str] = frozenset()
    ) -> tuple[list[dict[str, Any]], list[str], list[str]]:
        """(messages, digests of the images whose data is in them, and of those left out).

        Args:
            answer: text of an assistant turn at the end. held: digests that the server has.

        Raises:
            MissingInputError, DamagedInputError: an image file.
        """
        sent: list[str] = []
        left_out: list[str] = []
        turns = []
        for turn in self.format.messages(prompt, answer):
            content = turn["content"]
            if turn["role"] == "user":
                turns.append({"role": "user", "content": [self._part(part, held, sent, left_out) for part in content]})
            else:
                turns.append({"role": turn["role"], "content": content[0]["text"]})
        return turns, sent, left_out

    def _part(self, part: dict[str, Any], held: Set[str], sent: list[str], left_out: list[str]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        path = part["image"]
        digest = self.files.digest(path).hex()
        if self.way == "file":
            load_rgb(path)
            return {"type": "image_url", "image_url": {"url": Path(path).resolve().as_uri()}}
        if self.way == "data":
            sent.append(digest)
            return {"type": "image_url", "image_url": {"url": self._data_url(path, digest)}}
        if digest in held:
            left_out.append(digest)
            return {"type": "image_url", "image_url": None, "uuid": digest}
        sent.append(digest)
        return {"type": "image_url", "image_url": {"url": self._data_url(path, digest)}, "uuid": digest}


def _data_url(path: str, digest: str) -> str:  # noqa: ARG001 - the digest is part of the cache's key
    """An upright RGB image as it is; anything else as the PNG of what our own engine sees."""
    image = load_rgb(path)
    with Image.open(path, formats=FORMATS) as file:
        kind = _SENT_AS_THEY_ARE.get(file.format or "")
        plain = file.mode == "RGB" and file.getexif().get(_EXIF_ORIENTATION, 1) == 1
        plain = plain and getattr(file, "n_frames", 1) == 1
    if kind and plain:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DamagedInputError(f"image {path} cannot be read: {error.strerror or error}") from error
    else:
        buffer, kind = io.BytesIO(), "image/png"
        image.save(buffer, "PNG")
        data = buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
