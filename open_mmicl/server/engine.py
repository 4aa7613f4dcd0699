"""An engine whose LVLM answers on OpenAI-compatible servers: the same calls as :class:`open_mmicl.engine.Engine`.

Every reply is written to the answer cache the moment it comes, so nothing is paid for twice; a call of which the cache
holds everything needs no server. The cache key holds server, model and backend. What is known of a backend is kept
with its key: a server that is another one now is refused, so that no file holds answers of two backends.
"""

import asyncio
import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from open_mmicl.answer_cache import entry_key, model_key
from open_mmicl.asking import DECIMALS, WAIT_SECONDS, Asking, Request, score_entries
from open_mmicl.errors import UnscorableAnswerError, UsageError
from open_mmicl.interface.base import AnswerScore, GenerationSettings
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.images import ImageFiles
from open_mmicl.interface.prompts import Prompt
from open_mmicl.server import scoring
from open_mmicl.server.checks import Trials, request_fields, trials
from open_mmicl.server.connection import Connection, Refused, Site
from open_mmicl.server.messages import Messages

log = logging.getLogger("lever_plus.engine")


class ServerEngine(Asking):
    """Scores and generates answers with one LVLM on one or several servers. Made by :meth:`load`."""

    on_server, kind = True, "server"

    def __init__(
        self,
        config: InferModelConfig,
        cache_path: Path | None,
        device: str = "auto",
        own: Callable[..., Any] | None = None,
    ):
        super().__init__(cache_path)
        self.config, self.server, self.name = config, config.server_config, config.name
        self._own_device, self._own = device, own
        self.images = ImageFiles()
        self.gives_scores = self.server.scores != "none"
        self._loop = asyncio.Runner()
        self._connection: Connection | None = None
        self._tokens: scoring.AnswerTokens | None = None
        self._inner: Any = None
        self.apart = 0.0  # largest difference to our own engine's log-probabilities, where they were compared [nats]
        self._messages = Messages(config.prompt_format, self.images, "data")
        self._can: dict[str, Any] = {}
        self.device = " ".join(self.server.addresses())
        self._static = {
            "interface": "openai", "model": config.model_name_or_path, **self.server.identity(),
            "prompt_format": config.prompt_format.fingerprint(), "dtype": config.dtype,
            "processor": repr(sorted(config.processor.items())), "decimals": DECIMALS,
        }  # fmt: skip
        self.key, self._known = "", self._remembered()
        if self._known:
            self._is(self._known)
        else:
            self._begin()
        self.fingerprint = self.key

    @classmethod
    def load(
        cls,
        config: InferModelConfig,
        device: str = "auto",
        mode: str = "fast",
        precision: str = "auto",
        cache_path: Path | None = None,
        own: Callable[..., Any] | None = None,
    ) -> "ServerEngine":
        """Find out who answers, unless the answer cache knows it.

        Args:
            device: of our own engine, where scores are compared with it; ``own`` loads it.

        Raises:
            UsageError: a setting that a server does not take, another model or another backend than before.
            MissingInputError: no server answers.
        """
        for name, value, usual in (("ENGINE", mode, "fast"), ("PRECISION", precision, "auto")):
            if value != usual:
                raise UsageError(f"{name}={value} is not allowed for {config.name}: a server answers, by its own means")
        return cls(config, cache_path, device, own)

    def said(self) -> dict[str, Any]:
        """``facts``: what the server says of itself; ``can``: what it was found to be able to."""
        return {name: dict(self._known[name]) for name in ("facts", "can")}

    def scorable(self, answer: str) -> bool:
        """Whether the model can say exactly this answer; without ``server.reference`` only a blank one is known."""
        if not self.server.reference:
            return bool(answer.strip())
        try:
            return bool(self._answer_tokens().of(answer, False))
        except UnscorableAnswerError:
            return False

    def hidden_states(self, *asked: Any) -> Any:
        """A server shows none: those of the same model in our own engine (``server.reference``), which stays loaded.

        Raises:
            UsageError: no reference.
        """
        return self._beside().hidden_states(*asked)

    def answer_embeddings(self, *asked: Any) -> Any:
        """A server shows none: those of the reference, as :meth:`hidden_states`."""
        return self._beside().answer_embeddings(*asked)

    def _beside(self) -> Any:
        if self._inner is None:
            self._inner = self._own(self.config.own_engine(), device=self._own_device)
        return self._inner

    def close(self) -> None:
        """Close the connections and the answer cache."""
        if self._inner is not None:
            self._inner.close()
        if self._connection:
            self._run(self._connection.close())
        self._loop.close()
        super().close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        try:
            return self._loop.run(work)
        except BaseException:
            self._loop.close()  # ends what is under way
            self._loop, self._connection = asyncio.Runner(), None
            raise

    # Who answers

    def _remembered(self) -> dict[str, Any]:
        """What the answer cache knows of this backend, {} for nothing."""
        known = self.cache.descriptions() if self.cache else {}
        alike = [(self.cache.last_answer(key), d) for key, d in known.items() if d.get("static") == self._static]
        found = [(last, description) for last, description in alike if last is not None]
        if len(found) > 1:
            raise UsageError(f"{self.name}: the answer cache knows two backends of one description; remove it")
        self._heard, description = found[0] if found else (0, {})
        return description

    def _is(self, known: dict[str, Any]) -> None:
        """Take on the key of a backend, which the first process that met it has registered."""
        counted = {key: known[key] for key in ("static", "facts")}
        can = {key: value for key, value in known["can"].items() if key != "images"}
        self.key = model_key({**counted, "can": can})
        self._known = known
        if self.cache:
            self._model_row = self.cache.register(self.key, self.name, known)

    def _begin(self) -> None:
        if self._connection is None:
            self._run(self._meet())

    async def _meet(self) -> None:
        """Ask the servers who they are and what they can."""
        connection = Connection(self.name, self.config.model_name_or_path, self.server)
        with trials(self.config, connection) as some:
            for site in connection.sites:
                if self._known:  # it may be restarting between two steps of a run
                    await connection.until_there(site, self._heard + self.server.patience_s)
                with connection.first_contact(site):
                    facts = await some.facts(site)
                    can = self._known["can"] if self._known else await some.abilities(site)
                    now = {"mode": "fast", "static": self._static, "facts": facts, "can": can}
                    now["trial"] = await some.trial(site, can)
                if self._known:
                    self._same(site, self._known, now, some)
                else:
                    self._is(now)
                    self._is(self._remembered() or now)  # another process may have met another server just now
                    self._same(site, self._known, now, some)
                site.verified = site.losses
        self._can = self._known["can"]
        connection.answers_as = self._can["answers_as"]
        connection.verify = self._verify
        self._messages = Messages(self.config.prompt_format, self.images, self._can["images"])
        self._connection = connection

    async def _verify(self, site: Site) -> None:
        """Raises where a server that was lost is another one now."""
        with trials(self.config, self._connection) as some:
            facts, trial = await some.facts(site), await some.trial(site, self._can)
            self._same(site, self._known, {"facts": facts, "trial": trial, "can": self._can}, some)

    def _same(self, site: Site, before: dict[str, Any], now: dict[str, Any], some: Trials) -> None:
        reasons = [
            f"{key} {before['facts'][key]!r} before, {now['facts'][key]!r} now"
            for key in before["facts"]
            if before["facts"][key] != now["facts"].get(key)
        ]
        if before["can"]["answers_as"] != now["can"]["answers_as"]:
            reasons.append(f"answers as {now['can']['answers_as']!r}, before as {before['can']['answers_as']!r}")
        reasons = reasons or [text for text in [some.differs(before["trial"], now["trial"])] if text]
        if reasons:
            raise UsageError(
                f"{self.name}: {site.url} is not the server that answered before ({'; '.join(reasons)}). Start that "
                "one again, or give this one a `backend` of its own in the YAML (then everything is asked of it)"
            )

    # What is asked

    def _check_asked(self, lacking: Sequence[Request], generation: GenerationSettings | None) -> None:
        """Refuse what the server cannot do, before anything is paid for."""
        if generation is not None and generation.num_beams > 1 and not self._can["beams"]:
            raise UsageError(
                f"{self.name}: {self.device} does not search with beams (NUM_BEAMS={generation.num_beams}); set "
                "NUM_BEAMS=1 in every stage, or use vLLM"
            )
        scored = [request for request in lacking if request.scores]
        if not scored:
            return
        if self._can["scores"] == "none":
            raise UsageError(
                f"{self.name}: {self.device} gives no log-probabilities of given tokens"
                + (" (scores: none in its YAML)" if self.server.scores == "none" else "")
                + ": InfoScore needs our own engine or vLLM; V2_MODE=labels and RL data (scores: none) do without"
            )
        if not self.server.reference:
            raise UsageError(
                f"{self.name}: scores need server.reference in its YAML: the same model for our own engine"
            )
        check = entry_key(self.key.encode(), "check", (self.server.reference, self.server.bound(self.config.dtype)))
        if self.cache is None:
            self._compare(scored[: self.server.check_prompts], check)
            return
        while not self.cache.claim(check):  # another process is comparing
            time.sleep(WAIT_SECONDS)
        try:
            if not self.cache.get([check]):
                self._compare(scored[: self.server.check_prompts], check)
        finally:
            self.cache.release(check)

    def _answer_tokens(self) -> scoring.AnswerTokens:
        if self._tokens is None:
            self._tokens = scoring.AnswerTokens(self.config.own_engine())
        return self._tokens

    def _compare(self, some: Sequence[Request], check: bytes) -> None:
        """Compare the server's scores of the first prompts with our own engine's; they are kept where they agree."""
        log.info("%s: comparing scores of %d prompts with our own engine", self.name, len(some))
        own = self._own(self.config.own_engine(), device=self._own_device)
        pairs = [list(request.scores) for request in some]
        ours = [reply.scores for reply in own.ask([request.prompt for request in some], None, pairs)]
        own.close()
        del own
        gc.collect()
        theirs = self._run(self._scores_of_all(some))
        both = [(a, b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True)]
        apart, bound = max(abs(a.log_prob - b.log_prob) for a, b in both), self.server.bound(self.config.dtype)
        self.apart = apart
        if not apart <= bound or any(a.n_tokens != b.n_tokens for a, b in both):
            raise UsageError(
                f"{self.name}: the server's log-probabilities differ from our own engine's by up to {apart:.3g} nats "
                f"on {len(both)} answers (allowed: {bound:g}, server.score_bound): other weights, precision, image "
                "processing or chat template. No score was kept; scores: none goes without them"
            )
        log.info("%s: %d scores within %.2g nats of our own engine's (allowed: %g)", self.name, len(both), apart, bound)
        if self.cache:
            rows = zip(some, theirs, strict=True)
            kept = [entry for request, row in rows for entry in score_entries(self.name, request, row)]
            self.cache.put(self._model_row, kept)
            self.cache.put(self._model_row, [("check", check, [apart, len(both)])])

    async def _scores_of_all(self, some: Sequence[Request]) -> list[list[AnswerScore]]:
        return await _all_or_error([self._scores(request.prompt, list(request.scores)) for request in some])

    def _find(
        self,
        requests: list[Request],
        lacking: list[int],
        found: dict[bytes, list],
        generation: GenerationSettings | None,
        progress: str | None,
    ) -> None:
        asked = [requests[i] for i in lacking]
        self._check_asked(asked, generation)
        self._run(self._all(asked, found, generation, progress))

    async def _all(
        self, lacking: Sequence[Request], found: dict[bytes, list], generation: Any, progress: str | None
    ) -> None:
        """Every request asked. After an error nothing new is asked, but what is under way is waited for and kept."""
        waiting, connection = deque(lacking), self._connection
        with tqdm(total=len(waiting), desc=progress, unit="prompt", disable=progress is None) as bar:

            async def work() -> None:
                while waiting:
                    await self._settle(waiting.popleft(), found, generation)
                    bar.update()

            count = min(len(waiting), connection.in_flight * len(connection.sites))
            tasks = [asyncio.create_task(work()) for _ in range(count)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            waiting.clear()
            connection.stopping = True
            await asyncio.wait(tasks)
        connection.stopping = False
        errors = [error for task in tasks if not task.cancelled() and (error := task.exception())]
        if errors:
            raise errors[0]

    async def _settle(self, request: Request, found: dict[bytes, list], generation: Any) -> None:
        """Find or ask what a request lacks; one that another process is asking is waited for."""
        if self.cache is None:
            await self._answer(request.missing(found), found, generation)
            return
        claim = entry_key(b"".join(request.keys()), "claim", ())
        while not self.cache.claim(claim):
            self._connection.check_stop()
            await asyncio.sleep(WAIT_SECONDS)
        try:
            for left in self._look_up({0: request}, found).values():
                await self._answer(left, found, generation)
        finally:
            self.cache.release(claim)

    async def _answer(self, request: Request, found: dict[bytes, list], generation: Any) -> None:
        self.stats.computed += 1
        if request.text is not None:  # first, so that the server has the prompt's prefix when the scores come
            self._keep([("generate", request.text, [await self._text(request.prompt, generation)])], found)
        if request.scores:
            scores = await self._scores(request.prompt, list(request.scores))
            self._keep(score_entries(self.name, request, scores), found)

    async def _text(self, prompt: Prompt, generation: GenerationSettings) -> str:
        more: dict[str, Any] = {}
        if generation.num_beams > 1:
            penalty = float(generation.length_penalty)
            more = {"n": generation.num_beams, "use_beam_search": True, "length_penalty": penalty}
        answer = await self._request(prompt, None, generation.max_new_tokens, more)
        return answer.choices[0].message.content or ""

    async def _scores(self, prompt: Prompt, asked: Sequence[tuple[str, bool]]) -> list[AnswerScore]:
        if self._can["scores"] == "prompt_logprobs":
            return await self._scores_of_prompts(prompt, asked)
        nodes = scoring.tree(asked, self._answer_tokens())

        async def node(beginning: tuple[int, ...]) -> dict[int, float]:
            text = self._answer_tokens().beginning(beginning) if beginning else None
            answer = await self._request(prompt, text, 1, scoring.node_fields(nodes[beginning]))
            values = scoring.node_values(answer, nodes[beginning])
            if values is None:
                raise UsageError(f"{self.name}: {self.device} left out log-probabilities that were asked for")
            return values

        first, *others = nodes
        values = {first: await node(first)}
        values |= zip(others, await _all_or_error([node(beginning) for beginning in others]), strict=True)
        return scoring.sums(asked, self._answer_tokens(), values)

    async def _scores_of_prompts(self, prompt: Prompt, asked: Sequence[tuple[str, bool]]) -> list[AnswerScore]:
        async def one(text: str) -> list[float]:
            answer = await self._request(prompt, text, 1, {"prompt_logprobs": 0}, closed=True)
            return scoring.prompt_values(answer, self._answer_tokens().closed(text)) or []

        distinct = list(dict.fromkeys(text for text, _ in asked))
        values = dict(zip(distinct, await _all_or_error([one(text) for text in distinct]), strict=True))
        scores = []
        for text, end in asked:
            count = len(self._answer_tokens().of(text, end))
            if len(values[text]) < count:
                raise UsageError(f"{self.name}: {self.device} left out log-probabilities that were asked for")
            scores.append(AnswerScore(sum(values[text][:count]), count))
        return scores

    async def _request(
        self, prompt: Prompt, text: str | None, new_tokens: int, more: dict[str, Any], closed: bool = False
    ) -> Any:
        """One request for a prompt, with ``text`` in an assistant turn behind it, ``closed`` or to be continued."""
        if text is not None:
            more = {**more, "add_generation_prompt": False, "continue_final_message": not closed}
        fields = request_fields(self.config, self._can, new_tokens, more)
        whole = False  # whether images that the server should have are sent all the same

        def make(site: Site) -> tuple[dict[str, Any], list[str], list[str]]:
            turns, sent, left_out = self._messages.of(prompt, text, frozenset() if whole else site.held)
            self.stats.images_encoded += len(sent)
            return {"messages": turns, **fields}, sent, left_out

        while True:
            try:
                return await self._connection.chat(make)
            except Refused as error:
                if whole or self._can["images"] != "uuid":
                    raise UsageError(f"{self.name}: the server refuses a prompt of {prompt.image}: {error}") from error
                whole = True

    def _work(self) -> tuple[int, int, int, int]:
        return self._connection.requests, 0, self._connection.tokens, 0  # images are counted as they are sent


async def _all_or_error(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Results of all; where one fails, the first error, once all have ended."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)
