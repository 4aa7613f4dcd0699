"""Requests to the servers of one model: many at once, retried, paced, and never answered by another model.

Retries with back-off are the OpenAI client's own (408, 409, 429, 5xx, time-outs, cut connections; ``Retry-After`` is
honoured). What lies beyond them is here: a server that stays away is waited for, several servers share the requests,
and a server that was lost for a moment is asked again who it is before anything it says is used.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import httpx2
import openai
from openai.types.chat import ChatCompletion

from open_mmicl.errors import DamagedInputError, LeverError, MissingInputError, UsageError
from open_mmicl.server.config import ServerConfig

log = logging.getLogger("lever_plus.engine")
_LOOKS = (0.5, 1, 2, 4, 8, 15)  # seconds between two looks for a server that is away; the last one repeats
_ROUNDS = 3  # times that the client's retries are used up by errors of one request before it is given up
_IDLE_SECONDS = 10  # a server that nothing was asked of may have been restarted unseen
_AWAY = (502, 503, 504)
_PASSING = (408, 409, 429)  # and what is above 500


class Refused(Exception):
    """The server does not take a request as it is (400, 422): a field that it does not know, or a value."""


class _Http(openai.DefaultAsyncHttpxClient):
    """Counts broken connections, which the client's retries hide."""

    losses = 0

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        try:
            return await super().send(request, **options)
        except httpx2.TransportError:
            self.losses += 1
            raise


class Site:
    """One server."""

    def __init__(self, url: str, config: ServerConfig, in_flight: int):
        self.url = url
        limits = httpx2.Limits(max_connections=in_flight + 4, max_keepalive_connections=in_flight + 4)
        self._http = _Http(limits=limits)
        self.client = openai.AsyncOpenAI(
            base_url=url,
            api_key=config.api_key(),
            timeout=httpx2.Timeout(config.timeout_s, connect=min(10, config.timeout_s)),
            max_retries=config.retries,
            http_client=self._http,
        )
        self.slots, self.busy = asyncio.Semaphore(in_flight), 0
        self.held: set[str] = set()  # digests of the images that it has been sent
        self.verified = -1  # losses when it was last asked who it is
        self.heard = 0.0  # when it last answered
        self.away: asyncio.Task | None = None
        self.verifying = asyncio.Lock()

    @property
    def losses(self) -> int:
        """Broken connections so far."""
        return self._http.losses


class Connection:
    """The servers. ``verify``: raises where a server is not the one that answered before; set by the engine."""

    def __init__(self, name: str, model: str, config: ServerConfig):
        self.name, self.model, self.config = name, model, config
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self.in_flight = max(1, config.in_flight // world)
        self.sites = [Site(url, config, self.in_flight) for url in config.addresses()]
        self.verify: Callable[[Site], Awaitable[None]] | None = None
        self.answers_as = ""  # the name under which the model answers
        self.stopping = False
        self._gap = 60 * world / config.requests_per_minute if config.requests_per_minute else 0.0
        self._next = 0.0
        self.requests = self.tokens = 0

    async def chat(self, make: Callable[[Site], tuple[dict[str, Any], list[str], list[str]]]) -> ChatCompletion:
        """One answered request, by whichever server has room.

        Args:
            make: site -> (fields of the request, digests of the images that are sent in it, and of those that the
                server should have).

        Raises:
            Refused: the server does not take the request. UsageError, MissingInputError, DamagedInputError: nobody
                answers, or not as asked; one line that says what to do.
        """
        failures, deadline = 0.0, time.monotonic() + self.config.patience_s
        while True:
            site = await self._site()
            site.busy += 1
            try:
                async with site.slots:
                    await self._known(site)
                    answer = await self._asked(site, *make(site))
                    await self._known(site)  # it may have been lost, and another one be there now
                return answer
            except openai.APIConnectionError as error:
                failures += 1 if isinstance(error, openai.APITimeoutError) else 1 / _ROUNDS
                if failures >= _ROUNDS:
                    raise self._absent(site, error) from error
                self._lost(site, error)
            except openai.APIStatusError as error:
                failures += 1
                code, late = error.status_code, time.monotonic() > deadline
                passing = code in _PASSING or code >= 500
                given_up = failures >= _ROUNDS and (late or code not in (429, *_AWAY))
                if not passing or given_up or error.code == "insufficient_quota":
                    raise self._final(site, error) from error
                if code in _AWAY:
                    self._lost(site, error)
                else:
                    log.warning("%s: %s still answers %d; waiting", self.name, site.url, code)
                    await self._pause(_LOOKS[min(int(failures), len(_LOOKS) - 1)])
            finally:
                site.busy -= 1

    async def try_chat(self, site: Site, **fields: Any) -> ChatCompletion:
        """One request to one server, for finding out what it can and who it is. Raises: also the client's errors."""
        return await self._asked(site, fields)

    @contextlib.contextmanager
    def first_contact(self, site: Site) -> Iterator[None]:
        """The client's errors as ours, where nothing is waited for."""
        try:
            yield
        except openai.APIConnectionError as error:
            raise self._absent(site, error) from error
        except openai.APIStatusError as error:
            raise self._final(site, error) from error

    async def until_there(self, site: Site, until: float) -> None:
        """Wait for a server that is away, at the longest until a time [s since 1970]."""
        for looks in itertools.count():
            try:
                await self.get(site, "/models", waiting=False)
                return
            except MissingInputError:
                if time.time() > until:
                    return  # what is asked next says so
                if looks == 0:
                    clock = time.strftime("%H:%M", time.localtime(until))
                    log.warning("%s: %s is away; waiting for it until %s (patience_s)", self.name, site.url, clock)
                await self._pause(_LOOKS[min(looks, len(_LOOKS) - 1)])

    async def get(self, site: Site, address: str, waiting: bool = True) -> Any:
        """JSON of a GET request ("" base for ``/v1``, an absolute one otherwise), None where there is no such page."""
        client = site.client if waiting else site.client.with_options(max_retries=0, timeout=10)
        try:
            return await client.get(address, cast_to=object)
        except openai.APIConnectionError as error:
            raise self._absent(site, error) from error
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):
                raise self._final(site, error) from error
            if error.status_code >= 500:
                raise self._absent(site, error) from error
            return None
        except ValueError:
            return None

    async def close(self) -> None:
        """Close the connections."""
        for site in self.sites:
            if site.away:
                site.away.cancel()
            await site.client.close()

    async def _asked(
        self, site: Site, fields: dict[str, Any], sent: Sequence[str] = (), left_out: Sequence[str] = ()
    ) -> ChatCompletion:
        await self._pace()
        self.requests += 1
        # An image that the server has dropped may be any error, so such a request is not retried but sent whole.
        client = site.client.with_options(max_retries=0) if left_out else site.client
        try:
            answer = await client.chat.completions.create(model=self.model, **fields)
        except openai.APIStatusError as error:
            if error.status_code in (400, 422) or left_out and error.status_code >= 500:
                site.held.difference_update(left_out)
                raise Refused(_words(error)) from error
            raise
        except (ValueError, openai.APIResponseValidationError) as error:
            raise DamagedInputError(f"{self.name}: {site.url} answers with what is no JSON: {error}") from error
        if not isinstance(answer, ChatCompletion) or not answer.choices:
            raise DamagedInputError(
                f"{self.name}: what answers at {site.url} is no chat-completions server: {str(answer)[:80]!r}"
            )
        if self.answers_as and answer.model != self.answers_as:
            raise UsageError(
                f"{self.name}: {site.url} answers as {answer.model!r} now, before it was {self.answers_as!r}; nothing "
                "of it was kept. Start the model that answered before, or give the new one a `backend` of its own"
            )
        site.heard = time.monotonic()
        site.held.update(sent)
        if answer.usage:
            self.tokens += answer.usage.total_tokens or 0
        return answer

    async def _site(self) -> Site:
        """The server with the fewest requests among those that are there; waits for one where all are away."""
        while True:
            self.check_stop()
            here = [site for site in self.sites if site.away is None or site.away.done()]
            for site in here:
                if site.away is not None:
                    site.away.result()  # it was not to be had, or is another one now
                    site.away = None
            if here:
                return min(here, key=lambda site: site.busy)
            await asyncio.wait([s.away for s in self.sites if s.away], timeout=1, return_when="FIRST_COMPLETED")

    def _lost(self, site: Site, error: Exception) -> None:
        if site.away is None:
            log.warning("%s: %s is away (%s); waiting for it", self.name, site.url, _words(error))
            site.away = asyncio.create_task(self._until_back(site, error))

    async def _until_back(self, site: Site, error: Exception) -> None:
        deadline = time.monotonic() + self.config.patience_s
        looks = 0
        while True:
            await self._pause(_LOOKS[min(looks, len(_LOOKS) - 1)])
            looks += 1
            try:
                await self.get(site, "/models", waiting=False)
                break
            except MissingInputError:
                if time.monotonic() > deadline:
                    raise self._absent(site, error) from error
        log.info("%s: %s is back", self.name, site.url)
        site.held.clear()
        site.verified = -1

    async def _known(self, site: Site) -> None:
        """Ask a server that was lost, or not heard of for a while, who it is, once."""
        if self.verify is None:
            return
        if site.busy <= 1 and time.monotonic() - site.heard > _IDLE_SECONDS:
            site.verified = -1
        if site.verified == site.losses:
            return
        async with site.verifying:
            while site.verified != site.losses:
                losses = site.losses
                site.held.clear()
                await self.verify(site)
                site.verified = losses

    async def _pace(self) -> None:
        if self._gap:
            now = time.monotonic()
            self._next = max(self._next, now) + self._gap
            await asyncio.sleep(self._next - self._gap - now)

    async def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check_stop()
            await asyncio.sleep(min(left, 0.5))

    def check_stop(self) -> None:
        """Raises ``CancelledError`` where nothing new is to be asked any more."""
        if self.stopping:
            raise asyncio.CancelledError

    def _absent(self, site: Site, error: Exception) -> LeverError:
        return MissingInputError(
            f"{self.name}: no server answers at {site.url} ({_words(error)}); what is done is kept: start it and run "
            "the same command again"
        )

    def _final(self, site: Site, error: openai.APIStatusError) -> LeverError:
        words, code = _words(error), error.status_code
        if code in (401, 403):
            variable = self.config.api_key_variable or "server.api_key_variable in its YAML"
            return UsageError(f"{self.name}: {site.url} refuses the API key ({words}); see {variable}")
        if code == 404:
            return UsageError(f"{self.name}: {site.url} has no model {self.model!r} ({words})")
        if code == 429:
            return UsageError(
                f"{self.name}: {site.url} refuses more requests ({words}); what is done is kept: set "
                "requests_per_minute in its YAML, or run the same command again later"
            )
        return MissingInputError(
            f"{self.name}: {site.url} fails with {code} ({words}); what is done is kept: see its log, then run the "
            "same command again"
        )


def _words(error: Exception) -> str:
    """An error in one short line."""
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        text = str(body.get("message") or body.get("detail") or error.message)
    else:
        cause = error.__cause__
        text = f"{type(cause).__name__}: {cause}" if cause is not None and str(cause) else str(error)
    return " ".join(text.split())[:200]
