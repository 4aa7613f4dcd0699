"""The ``server`` part of configs/infer_model/*.yaml: where the servers are and how they may be asked."""

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from open_mmicl.errors import UsageError

IMAGES = ("auto", "data", "uuid", "file")
SCORES = ("auto", "token_ids", "prompt_logprobs", "none")
_LOOPBACK = ("127.0.0.1", "::1", "0.0.0.0")
_BOUNDS = {"fp32": 1e-3, "bf16": 0.25, "fp16": 0.05}  # nats; what one precision's own rounding explains, and more


@dataclass(frozen=True)
class ServerConfig:
    """One model on one or several servers of the same kind.

    ``urls``: base addresses (``http://host:8000/v1``), which the environment variable ``url_variable`` overrides (with
    spaces or commas between); ``api_key_variable``: the environment variable that holds the key, "" for none.

    What tells this backend from another, in every answer-cache key: ``label`` ("": the first URL's host), ``backend``
    (the user's own words for software, version and machine), ``body`` (further fields of every request), and what the
    servers say of themselves.

    ``in_flight``: requests at once for each URL, all processes together; ``requests_per_minute``: for all URLs and
    processes together, 0 for no limit; ``timeout_s`` [s]: one request; ``retries``: of one request on 408, 409, 429,
    5xx, time-outs and cut connections, with back-off; ``patience_s`` [s]: how long a server that answered before may be
    away. ``images``: how images are sent (docs/servers.md); ``scores``: how log-probabilities of given answers are got.
    ``reference``: the YAML (its name without ``.yaml``) of the same model for our own engine, which scores are compared
    with on the first ``check_prompts`` prompts and refused beyond ``score_bound`` [nats], 0 for the data type's.
    """

    urls: tuple[str, ...] = ()
    url_variable: str = ""
    api_key_variable: str = ""
    label: str = ""
    backend: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    in_flight: int = 32
    requests_per_minute: float = 0
    timeout_s: float = 300
    retries: int = 6
    patience_s: float = 1800
    images: str = "auto"
    scores: str = "auto"
    reference: str = ""
    check_prompts: int = 16
    score_bound: float = 0

    @classmethod
    def of(cls, raw: Mapping[str, Any], model: str) -> "ServerConfig":
        """The checked settings of a YAML's ``server`` mapping.

        Raises:
            UsageError: names the key, its value and what is allowed.
        """
        if not isinstance(raw, Mapping):
            raise UsageError(f"server of model {model!r} must be a mapping, got {raw!r}")
        known = {f.name: f for f in fields(cls)}
        values: dict[str, Any] = {}
        for key, value in raw.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                raise UsageError(
                    f"server of model {model!r}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else "")
                )
            values[key] = _checked(key, value, known[key].type, model)
        config = cls(**values)
        for key, allowed in (("images", IMAGES), ("scores", SCORES)):
            if getattr(config, key) not in allowed:
                raise UsageError(f"server.{key}={getattr(config, key)!r} is not allowed: {' | '.join(allowed)}")
        if not config.urls and not config.url_variable:
            raise UsageError(f"server.urls of model {model!r} is missing: a list of addresses like http://host:8000/v1")
        return config

    def addresses(self, env: Mapping[str, str] | None = None) -> tuple[str, ...]:
        """The servers' base addresses.

        Raises:
            UsageError: there is none, or one is no http address.
        """
        given = (os.environ if env is None else env).get(self.url_variable, "") if self.url_variable else ""
        urls = tuple(dict.fromkeys(given.replace(",", " ").split())) or self.urls
        if not urls:
            raise UsageError(f"set {self.url_variable} to the server's address (http://host:8000/v1)")
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UsageError(f"server address {url!r} is not allowed: http://host:port/v1 or https://…")
        return urls

    def identity(self) -> dict[str, Any]:
        """What tells this backend from another without asking it. Ports do not count, nor do further machines."""
        host = urlsplit(self.urls[0]).hostname if self.urls else "localhost"
        label = self.label or ("localhost" if host in _LOOPBACK else host)
        return {"server": label, "backend": self.backend, "body": self.body, "scores": self.scores}

    def api_key(self, env: Mapping[str, str] | None = None) -> str:
        """The key, or a word that servers without keys accept.

        Raises:
            UsageError: the variable is not set.
        """
        if not self.api_key_variable:
            return "none"
        key = (os.environ if env is None else env).get(self.api_key_variable, "").strip()
        if not key:
            raise UsageError(f"set {self.api_key_variable} to the server's API key")
        return key

    def bound(self, dtype: str) -> float:
        """How far [nats] a score may be from our own engine's."""
        return self.score_bound or _BOUNDS[dtype]


def _checked(key: str, value: Any, kind: Any, model: str) -> Any:
    refused = f"server.{key}={value!r} of model {model!r} is not allowed: "
    if key == "urls":
        urls = (value,) if isinstance(value, str) else value
        if not isinstance(urls, (list, tuple)) or not all(isinstance(url, str) for url in urls):
            raise UsageError(refused + "a list of addresses")
        return tuple(dict.fromkeys(urls))
    if key == "body":
        if not isinstance(value, dict):
            raise UsageError(refused + "a mapping of request fields")
        return value
    if kind is str:
        if not isinstance(value, str):
            raise UsageError(refused + "text")
        return value
    least = 1 if key in ("in_flight", "check_prompts") else 0
    numbers = (int,) if kind is int else (int, float)
    if not isinstance(value, numbers) or isinstance(value, bool) or not math.isfinite(value) or value < least:
        raise UsageError(refused + f"{'whole number' if kind is int else 'number'} >= {least}")
    if key in ("timeout_s",) and value == 0:
        raise UsageError(refused + "number > 0")
    return value
