"""configs/infer_model/*.yaml: which LVLM answers and how it is asked. No torch import."""

import copy
import dataclasses
import difflib
import functools
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError, expand, foreign
from open_mmicl.interface.prompts import PromptFormat
from open_mmicl.registry import Registry
from open_mmicl.server.config import ServerConfig

REPO_ROOT = Path(__file__).resolve().parents[2]
CONFIG_PLACES = ("configs", "lever_plus/configs")
"""Where below it model configurations are, in a copy of the repository and in an installed package."""
INTERFACES = Registry(
    "interface",
    "INTERFACES",
    "open_mmicl.interface.qwen_vl",
    "open_mmicl.interface.hf_chat",
    "open_mmicl.interface.on_server",
)
"""Each is a loader: (configuration, device, precision) -> :class:`.base.LvlmInterface`."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class _DistinctKeys(yaml.SafeLoader):
    """YAML of which the last of two equal keys would win without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping; refuses keys that are equal in Python, however they are written (``1`` and ``0x1``)."""
        seen: dict[Any, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            merged = key.tag == "tag:yaml.org,2002:merge"
            word, line = key.value if merged else self.construct_object(key, deep=True), key.start_mark.line + 1
            if not isinstance(word, Hashable):
                raise yaml.YAMLError(f"line {line}: a key is no text or number")
            if word in seen:
                raise yaml.YAMLError(f"line {line}: key {str(word)[:60]!r} is there twice (first in line {seen[word]})")
            seen[word] = line
        return super().construct_mapping(node, deep)


@functools.lru_cache(maxsize=256)
def _parsed(text: bytes) -> Any:
    """A YAML text's value; a process asks for the same few files many times, and parsing is slow."""
    try:
        return yaml.load(text.decode("utf-8"), _DistinctKeys)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:  # its first line does not say where
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise yaml.YAMLError(f"{place}{error.problem or error.context}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """A file's YAML mapping.

    Raises:
        DamagedInputError: it cannot be read, is not a YAML mapping, or has a key twice.
    """
    with foreign("YAML", path):
        values = copy.deepcopy(_parsed(path.read_bytes()))
    if not isinstance(values, dict):
        raise DamagedInputError(f"{path}: expected a YAML mapping")
    return values


@dataclass(frozen=True)
class InferModelConfig:
    """One LVLM and its settings.

    ``model_name_or_path`` is a folder (absolute, or relative to the repository root) or a name on the model hub;
    the environment variable named by ``path_variable`` overrides it with a local folder. ``processor`` is handed to
    the image processor (``min_pixels``, ``max_pixels``, …) and is part of every answer-cache key. ``token_budget``
    [tokens in one forward pass], ``image_cache_mb`` (0: as free memory allows, spilling to the host's) and
    ``kv_cache_mb`` [MiB] bound memory; ``naive_batch`` is the prompts in a batch of the naive path. ``attn`` is "auto"
    or a transformers attention implementation; ``device_map`` "" (one device) or "auto" (accelerate spreads the layers
    over the GPUs there are). ``architecture``: sizes as in the model's config.json, for prices where its files are not
    on this machine. ``interface: openai`` has a server answer: ``model_name_or_path`` is the model's name there,
    ``dtype`` what it is said to compute in, ``server`` the rest (:class:`open_mmicl.server.config.ServerConfig`).
    """

    name: str
    model_name_or_path: str
    path_variable: str = ""
    revision: str = ""
    interface: str = "qwen_vl"
    system: str = ""
    user_template: str = "Question:<Q> Short answer:"
    dtype: str = "bf16"
    attn: str = "auto"
    device_map: str = ""
    token_budget: int = 16384
    image_cache_mb: int = 0
    kv_cache_mb: int = 2048
    naive_batch: int = 4
    processor: dict[str, Any] = field(default_factory=dict)
    chat_template: str = ""
    architecture: dict[str, Any] = field(default_factory=dict)
    license: str = ""
    server: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _one_of("interface", self.interface, INTERFACES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("device_map", self.device_map, ("", "auto"))
        for name, low in (("token_budget", 1), ("image_cache_mb", 0), ("kv_cache_mb", 1), ("naive_batch", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UsageError(f"{name}={value!r} of model {self.name!r} is not allowed: whole number >= {low}")
        for name in ("processor", "architecture"):
            if not isinstance(getattr(self, name), dict):
                raise UsageError(f"{name} of model {self.name!r} must be a mapping, got {getattr(self, name)!r}")
        self.prompt_format  # noqa: B018 - raises where user_template is wrong
        if self.interface == "openai":
            self.server_config  # noqa: B018 - raises where it is wrong
            if self.chat_template:
                raise UsageError(f"chat_template of model {self.name!r}: a server has its own; give it one there")
        elif self.server:
            raise UsageError(f"server of model {self.name!r} is only read with interface: openai")

    @property
    def prompt_format(self) -> PromptFormat:
        """The words of the prompt."""
        return PromptFormat(system=self.system, user_template=self.user_template)

    @property
    def server_config(self) -> ServerConfig:
        """The server's part, checked."""
        return ServerConfig.of(self.server, self.name)

    @property
    def has_own_engine(self) -> bool:
        """Whether :meth:`own_engine` has a model to give: this one runs here, or its server names a reference."""
        return self.interface != "openai" or bool(self.server_config.reference)

    def own_engine(self) -> "InferModelConfig":
        """This model for our own engine: itself, or the ``server.reference`` of one on a server, in the same words.

        Raises:
            UsageError: a server without a reference, or whose reference is no model of our own engine.
        """
        if self.interface != "openai":
            return self
        named = Path(self.server_config.reference)
        if not named.name:
            raise UsageError(
                f"{self.name}: a server shows neither hidden states nor embeddings; name the same model for our own "
                "engine as server.reference in its YAML, or leave lvlm and answer out of EMBEDDING"
            )
        places = (REPO_ROOT / place / "infer_model" / f"{named}.yaml" for place in CONFIG_PLACES)
        inside = next((path for path in places if path.is_file()), Path(f"{named}.yaml"))
        reference = InferModelConfig.load(named if named.suffix == ".yaml" else inside)
        if reference.interface == "openai":
            raise UsageError(f"server.reference={str(named)!r} of {self.name} is a server itself")
        return dataclasses.replace(reference, system=self.system, user_template=self.user_template)

    @classmethod
    def load(cls, yaml_path: Path) -> "InferModelConfig":
        """Read one YAML file.

        Raises:
            UsageError: no such model (names those there are), an unknown key or a value out of range.
            DamagedInputError: not a YAML mapping.
        """
        yaml_path = Path(yaml_path)
        if not yaml_path.is_file():
            there = ", ".join(sorted(p.stem for p in yaml_path.parent.glob("*.yaml"))) or "none"
            raise UsageError(f"unknown LVLM {yaml_path.stem!r}; there are: {there}")
        raw = read_yaml(yaml_path)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in raw:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                raise UsageError(f"{yaml_path}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        for key in ("name", "model_name_or_path"):
            if not raw.get(key):
                raise UsageError(f"{yaml_path}: key {key!r} is missing")
        for key, value in raw.items():
            if known[key].type is str and not isinstance(value, str):
                raise UsageError(f"{yaml_path}: {key}={value!r} is not allowed: text")
        return cls(**raw)

    def local_dir(self, env: Mapping[str, str] | None = None) -> Path | None:
        """The model's folder where it is a local one, None where ``model_name_or_path`` is a name on the hub or server.

        Raises:
            MissingInputError: the folder that is named does not exist; says which variable to set.
        """
        if self.interface == "openai":
            return None
        env = os.environ if env is None else env
        override = env.get(self.path_variable, "") if self.path_variable else ""
        if override:
            folder = expand(override, self.path_variable)
            if not folder.is_dir():
                raise MissingInputError(
                    f"{self.path_variable}={override}: no such folder (expected the files of {self.name})"
                )
            return folder
        for folder in (REPO_ROOT / self.model_name_or_path, expand(self.model_name_or_path, "model_name_or_path")):
            if folder.is_dir():
                return folder
        looks_local = self.model_name_or_path.count("/") != 1 or self.model_name_or_path[0] in "./~"
        if looks_local:
            hint = f" or set {self.path_variable} to the folder that holds them" if self.path_variable else ""
            raise MissingInputError(
                f"files of {self.name} not found: {REPO_ROOT / self.model_name_or_path}; put them there{hint}"
            )
        return None


def _one_of(key: str, value: Any, allowed: Any) -> None:
    if value not in allowed:
        words = " | ".join(repr(word) for word in allowed)
        raise UsageError(f"{key}={value!r} is not allowed: {words}")
