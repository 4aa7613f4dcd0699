"""What a server is and what it can: found out once with a few small requests, before anything is paid for.

Facts that tell one backend from another (model, version, how it answers trial prompts) are kept in the answer cache and
must be the same whenever the server is met again. The trial prompts are two images of noise with fixed questions.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from PIL import Image

from open_mmicl.errors import UsageError
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.images import ImageFiles
from open_mmicl.interface.prompts import Demo, Prompt
from open_mmicl.server import scoring
from open_mmicl.server.connection import Connection, Refused, Site
from open_mmicl.server.messages import Messages

_QUESTIONS = ("what is it?", "how many are there?", "what colour is it?", "what is it made of?")
_ANY_IDS = (10, 11, 12)  # tokens that every vocabulary has
_NEW_TOKENS = 5


class Trials:
    """The trial prompts of a model and how servers answer them."""

    def __init__(self, config: InferModelConfig, connection: Connection):
        self.config, self.server, self.connection = config, config.server_config, connection
        self._folder = tempfile.TemporaryDirectory(prefix="lever_trial_")
        random = np.random.default_rng(0)
        paths = [str(Path(self._folder.name) / f"{i}.png") for i in range(2)]
        for path in paths:
            Image.fromarray(random.integers(0, 256, (112, 112, 3), dtype=np.uint8)).save(path)
        first, second = paths
        self.prompts = [Prompt((Demo(first, "what is it?", "noise"),), second, question) for question in _QUESTIONS]
        self.messages = Messages(config.prompt_format, ImageFiles(), "data")

    def close(self) -> None:
        """Remove the images."""
        self._folder.cleanup()

    async def facts(self, site: Site) -> dict[str, Any]:
        """What the server says of itself.

        Raises:
            UsageError: it does not serve the model; names those it does.
        """
        listed = await self.connection.get(site, "/models")
        entries = listed.get("data") if isinstance(listed, dict) else None
        names = {str(e.get("id")): e for e in entries if isinstance(e, dict)} if isinstance(entries, list) else {}
        if names and self.connection.model not in names:
            raise UsageError(
                f"{self.config.name}: {site.url} serves {', '.join(sorted(names))[:200]}, not "
                f"{self.connection.model!r} (model_name_or_path in its YAML)"
            )
        entry = names.get(self.connection.model, {})
        parts = urlsplit(site.url)
        version = await self.connection.get(site, urlunsplit((parts.scheme, parts.netloc, "/version", "", "")))
        said = {key: entry.get(key) for key in ("owned_by", "root")}
        return {**said, "version": version.get("version") if isinstance(version, dict) else None}

    async def abilities(self, site: Site) -> dict[str, Any]:
        """What the server can: ``limit`` (its name for the most new tokens), ``extras`` (fields beyond OpenAI's that it
        takes), ``scores``, ``beams``, ``images``.

        Raises:
            UsageError: it does not take a prompt with two images.
        """
        can: dict[str, Any] = {"limit": "max_tokens", "extras": {"repetition_penalty": 1.0}, "answers_as": ""}
        while True:
            try:
                answer = await self._try(site, 0, can, _NEW_TOKENS)
                break
            except Refused as error:
                if "max_completion_tokens" in str(error) and can["limit"] == "max_tokens":
                    can["limit"] = "max_completion_tokens"
                elif can["extras"]:
                    can["extras"] = {}
                else:
                    raise UsageError(
                        f"{self.config.name}: {site.url} refuses a prompt of two images ({error}); it must read "
                        "several images in a conversation (vLLM: --limit-mm-per-prompt)"
                    ) from error
        can["answers_as"] = answer.model
        can["scores"] = await self._score_way(site, can)
        can["beams"] = await self._has_beams(site, can)
        can["images"] = await self._image_way(site, can, answer.choices[0].message.content)
        return can

    async def trial(self, site: Site, can: dict[str, Any]) -> dict[str, Any]:
        """The server's answers to the trial prompts, and log-probabilities [nats] where it gives such."""
        texts, scores, cut_off = [], [], 0
        for number in range(len(self.prompts)):
            try:
                answer = await self._try(site, number, can, _NEW_TOKENS)
            except Refused as error:
                raise UsageError(f"{self.config.name}: {site.url} refuses a trial prompt now: {error}") from error
            texts.append(answer.choices[0].message.content or "")
            cut_off += answer.choices[0].finish_reason == "length" and not texts[-1].strip()
            values = await self._values(site, number, can)
            scores += values or []
        if cut_off == len(texts):
            raise UsageError(
                f"{self.config.name}: {site.url} answers the trial prompts with nothing; a model that thinks before it "
                "answers cannot be used with answers this short"
            )
        return {"texts": texts, "scores": scores}

    def differs(self, before: dict[str, Any], now: dict[str, Any]) -> str:
        """In what two trials differ beyond rounding; "" where they do not."""
        old, new = before["scores"], now["scores"]
        if old or new:
            apart = max((abs(a - b) for a, b in zip(old, new, strict=False)), default=float("inf"))
            bound = self.server.bound(self.config.dtype)
            return "" if len(old) == len(new) and apart <= bound else f"log-probabilities differ by {apart:.3g} nats"
        other = sum(a != b for a, b in zip(before["texts"], now["texts"], strict=True))
        return f"{other} of {len(self.prompts)} trial answers differ" if 2 * other > len(self.prompts) else ""

    async def _try(
        self,
        site: Site,
        number: int,
        can: dict[str, Any],
        new_tokens: int,
        turns: list[dict[str, Any]] | None = None,
        **more: Any,
    ) -> Any:
        """One trial prompt (or other ``turns``) with further fields."""
        fields = request_fields(self.config, can, new_tokens, more)
        return await self.connection.try_chat(
            site, messages=turns or self.messages.of(self.prompts[number])[0], **fields
        )

    async def _values(self, site: Site, number: int, can: dict[str, Any]) -> list[float] | None:
        if can["scores"] == "token_ids":
            answer = await self._try(site, number, can, 1, **scoring.node_fields(_ANY_IDS))
            found = scoring.node_values(answer, _ANY_IDS)
            return list(found.values()) if found else None
        if can["scores"] == "prompt_logprobs":
            return scoring.prompt_values(await self._try(site, number, can, 1, prompt_logprobs=0))
        return None

    async def _score_way(self, site: Site, can: dict[str, Any]) -> str:
        for way in ("token_ids", "prompt_logprobs"):
            if self.server.scores in ("auto", way):
                with contextlib.suppress(Refused):
                    if await self._values(site, 0, {**can, "scores": way}):
                        return way
        return "none"

    async def _has_beams(self, site: Site, can: dict[str, Any]) -> bool:
        """Beams differ from one another; a server that only takes ``n`` answers the same several times."""
        try:
            for number in range(len(self.prompts)):
                answer = await self._try(site, number, can, _NEW_TOKENS, n=2, use_beam_search=True, length_penalty=0.0)
                if len({choice.message.content for choice in answer.choices}) == 2:
                    return True
        except Refused:
            pass
        return False

    async def _image_way(self, site: Site, can: dict[str, Any], text: str | None) -> str:
        if self.server.images not in ("auto", "uuid"):
            return self.server.images
        by_hash = Messages(self.config.prompt_format, self.messages.files, "uuid")
        with contextlib.suppress(Refused):
            turns, sent, _ = by_hash.of(self.prompts[0])
            await self._try(site, 0, can, _NEW_TOKENS, turns=turns)
            turns, _, _ = by_hash.of(self.prompts[0], held=set(sent))
            answer = await self._try(site, 0, can, _NEW_TOKENS, turns=turns)
            if answer.choices[0].message.content == text:
                return "uuid"
        if self.server.images == "uuid":
            raise UsageError(f"{self.config.name}: {site.url} does not take images by uuid; use images: data")
        return "data"


def request_fields(
    config: InferModelConfig, can: dict[str, Any], new_tokens: int, more: dict[str, Any]
) -> dict[str, Any]:
    """The fields of a request but its messages; ``more``: further ones, beyond the client library's own."""
    body = {**can["extras"], **config.server_config.body}
    if config.processor:
        body.setdefault("mm_processor_kwargs", config.processor)
    return {"temperature": 0, can["limit"]: new_tokens, "extra_body": {**body, **more}}


@contextlib.contextmanager
def trials(config: InferModelConfig, connection: Connection) -> Iterator[Trials]:
    """Trial prompts for as long as they are needed."""
    some = Trials(config, connection)
    try:
        yield some
    finally:
        some.close()
