"""Selector files: this project's format and the original Lever-Plus's, loaded strictly.

Known containers:

* native: ``{"format": "lever_plus.selector/1", "config": …, "model_state_dict": …, …}``
* v2 of the original Lever-Plus (Lightning ``.ckpt``, ``*_v2format.ckpt``): ``{"state_dict": {"lever_lm.…": …}}``
* v3 of the original Lever-Plus (``.pt``): ``{"epoch", "phase", "model_state_dict", "kl_beta", "metrics"}``
* a bare state dict
* safetensors with ``format`` and ``config`` (JSON) in its metadata, as release bundles have it

Names are mapped by the two tables below and by nothing else; CLIP's weights inside a v2 file are left out by
name; every other name and every shape must be the selector's own. Files with objects besides tensors and
plain data are refused, with the command that converts them.
"""

import dataclasses
import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from lever_plus import io
from open_mmicl.errors import DamagedInputError, LeverError, foreign

log = logging.getLogger("lever_plus")

FORMAT = "lever_plus.selector/1"
MAKE = "bash scripts/train_lever_lm.sh"
WRAPPERS = ("module.", "_forward_module.", "lever_lm.", "pointer_selector.")  # prefixes that only say who holds it
RENAMED = {"cross_attn.": "cross_attn_layers.0.", "attn_norm.": "attn_norms.0."}  # one-layer form -> layered form
CLIP_PARTS = ("img_model.", "sen_model.")  # CLIP's image and text encoder inside a v2 file
OLD_TEMPERATURE = 0.1
_LIMITS = {"input_dim": (1, 1 << 16), "hidden_dim": (1, 1 << 14), "num_layers": (0, 64), "query_dim": (0, 1 << 16)}


@dataclass
class LoadInfo:
    """Where a selector came from: ``form`` (native, v2, v3 or state_dict), and what was mapped and left out."""

    form: str
    lines: list[str] = field(default_factory=list)
    phase: str | None = None
    epoch: int | None = None


class LoadedSelector(NamedTuple):
    """A state dict under today's names, the keyword arguments of its SelectorConfig, and how it came about."""

    state_dict: dict[str, Tensor]
    config: dict[str, Any]
    info: LoadInfo


def load_selector(path: Path, kind: type) -> LoadedSelector:
    """Load a selector file of any known form; ``kind``: the selector's class, whose weights it has to hold.

    What was mapped and left out of an older file is logged.

    Raises:
        MissingInputError: no such file.
        DamagedInputError: truncated, unsafe, of an unknown form, a name or shape that does not fit, or a
            weight that is not finite.
    """
    path = Path(path)
    loaded = migrate(_content(path), kind, path)
    for line in loaded.info.lines:
        log.info(f"{path.name}: {line}")
    return loaded


def _content(path: Path) -> Any:
    if path.suffix != ".safetensors" or not path.is_file():
        return io.load_torch(path, "selector checkpoint", MAKE)
    with foreign("selector checkpoint", path, "is truncated or not a safetensors file"):
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        config = json.loads(said.get("config", "null"))
    return {"format": said.get("format", "none"), "config": config, "model_state_dict": state}


def as_safetensors(path: Path, kind: type) -> bytes:
    """A selector file of any known form as safetensors, which :func:`load_selector` reads too.

    Raises:
        MissingInputError, DamagedInputError.
    """
    state, config, _ = load_selector(path, kind)
    tensors = {name: value.contiguous().clone() for name, value in state.items()}
    return _in_order(safetensors.torch.save(tensors, {"format": FORMAT, "config": json.dumps(config, sort_keys=True)}))


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library's order changes from one process to the next, and equal
    selectors are to be equal bytes.
    """
    size = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + size])
    head["__metadata__"] = dict(sorted(head["__metadata__"].items()))
    text = json.dumps(head, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def migrate(content: Any, kind: type, path: Path) -> LoadedSelector:
    """Bring a file's content to today's names; strict.

    Args:
        content: what ``torch.load`` gave; kind: the selector's class; path: for messages.

    Raises:
        DamagedInputError: see :func:`load_selector`.
    """
    if not isinstance(content, Mapping):
        raise _damaged(path, f"holds a {type(content).__name__}, not a checkpoint")
    if "format" in content:
        return _native(content, kind, path)
    info, named = _container(content, path)
    state = _rename(_tensors(named, path), info, path)
    config = _infer_config(state, path)
    _check_config(config, kind, path)
    _check_heads(content, path)
    _check_shapes(state, config, kind, path)
    return LoadedSelector(state, config, info)


def _native(content: Mapping[str, Any], kind: type, path: Path) -> LoadedSelector:
    if content["format"] != FORMAT:
        raise _damaged(path, f"format {str(content['format'])[:60]!r}; this version reads {FORMAT!r}")
    for name in ("config", "model_state_dict"):
        if not isinstance(content.get(name), Mapping):
            raise _damaged(path, f"{name} is missing or no mapping")
    config, state = dict(content["config"]), _tensors(content["model_state_dict"], path)
    _check_config(config, kind, path)
    _check_shapes(state, config, kind, path)
    return LoadedSelector(state, config, LoadInfo("native", [], *_origin(content)))


def _origin(content: Mapping[str, Any]) -> tuple[str | None, int | None]:
    """(phase, epoch) that a file says it is from; None where it says nothing that could be one."""
    phase, epoch = content.get("phase"), content.get("epoch")
    return phase if isinstance(phase, str) else None, epoch if type(epoch) is int else None


def _container(content: Mapping[str, Any], path: Path) -> tuple[LoadInfo, Any]:
    origin = _origin(content)
    if "model_state_dict" in content:
        beside = ["state_dict left out: the file holds model_state_dict too"] if "state_dict" in content else []
        return LoadInfo("v3", beside, *origin), content["model_state_dict"]
    if "state_dict" in content:
        return LoadInfo("v2", [], *origin), content["state_dict"]
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return LoadInfo("state_dict"), content
    raise _damaged(path, f"of an unknown form: its keys are {_listed(sorted(map(str, content)))}")


def _tensors(named: Any, path: Path) -> dict[str, Tensor]:
    """The named tensors as float32.

    Raises:
        DamagedInputError: not a mapping of names to dense float tensors. Values that are not finite are
        looked for only in the selector's own part, after renaming.
    """
    if not isinstance(named, Mapping) or not named:
        raise _damaged(path, "its state dict is empty or no mapping")
    for name, value in named.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise _damaged(path, f"state dict entry {str(name)[:80]!r} is a {type(value).__name__}, not a tensor")
    return dict(named)


def _rename(named: dict[str, Tensor], info: LoadInfo, path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    mapped, ignored = Counter(), Counter()
    for old in named:
        name, wrapper = old, ""
        while prefix := next((p for p in WRAPPERS if name.startswith(p)), None):
            name, wrapper = name.removeprefix(prefix), wrapper + prefix
        part = next((p for p in CLIP_PARTS if name.startswith(p)), None)
        if part:
            ignored[wrapper + part + "*" + (" (LoRA)" if "lora_" in name else "")] += 1
            continue
        renamed = next((prefix for prefix in RENAMED if name.startswith(prefix)), "")
        new = RENAMED[renamed] + name.removeprefix(renamed) if renamed else name
        if new == "temperature":
            _check_temperature(named[old], path)
            ignored[f"{wrapper}temperature (it is {OLD_TEMPERATURE})"] += 1
            continue
        if new in state:
            raise _damaged(path, f"{old!r} and another name both stand for {new!r}")
        if wrapper or renamed:
            mapped[f"{wrapper}{renamed}* -> {RENAMED.get(renamed, '')}*"] += 1
        state[new] = named[old]
    info.lines += [f"mapped {what} ({count} tensors)" for what, count in sorted(mapped.items())]
    info.lines += [f"left out {what} ({count} tensors)" for what, count in sorted(ignored.items())]
    if any("LoRA" in what for what in ignored):
        info.lines.append("its CLIP was tuned with LoRA: use the embeddings exported with it, not those of plain CLIP")
    return state


def _infer_config(state: dict[str, Tensor], path: Path) -> dict[str, Any]:
    """The SelectorConfig of a file of the original Lever-Plus, from its names and shapes."""
    if any(name.startswith("query_proj.0.") for name in state):
        raise _damaged(path, "a v1 bi-encoder with MLP projections; only v2 and v3 selectors can be read")
    query_proj = state.get("query_proj.weight")
    if query_proj is None or query_proj.dim() != 2:
        there = _listed(sorted(state)) or "nothing"
        raise _damaged(path, f"no query_proj.weight in it, so no selector (it holds {there})")
    hidden = query_proj.shape[0]
    input_proj = state.get("input_proj.weight")
    if input_proj is not None and input_proj.dim() != 2:
        raise _damaged(path, f"input_proj.weight has shape {list(input_proj.shape)}")
    layers = {int(found.group(1)) for name in state if (found := re.match(r"cross_attn_layers\.(\d{1,3})\.", name))}
    return {
        "input_dim": hidden if input_proj is None else input_proj.shape[1],
        "hidden_dim": hidden,
        "num_layers": len(layers),
        "attn_bias": any(name.endswith(".in_proj_bias") for name in state),
        "query_update_gate": any(name.startswith("query_update_gate.") for name in state),
    }


def _check_config(config: dict[str, Any], kind: type, path: Path) -> None:
    known = {f.name: f.type for f in dataclasses.fields(kind.config_class)}
    for name, value in config.items():
        if name not in known:
            raise _damaged(path, f"config: unknown option {str(name)[:60]!r}")
        kind = known[name] if isinstance(known[name], str) else known[name].__name__
        if type(value).__name__ != kind and not (kind == "float" and type(value) is int):
            raise _damaged(path, f"config: {name}={str(value)[:60]!r} should be of type {kind}")
        low, high = _LIMITS.get(name, (None, None))
        if low is not None and not low <= value <= high:
            raise _damaged(path, f"config: {name}={value} is outside {low}..{high}")


def _check_shapes(state: dict[str, Tensor], config: dict[str, Any], kind: type, path: Path) -> None:
    """Names and shapes must be exactly those of the selector that ``config`` describes; values finite."""
    try:
        with torch.device("meta"):
            expected = kind(kind.config_class(**config), init="random").state_dict()
    except (LeverError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, f"config: {str(error).splitlines()[0]}") from error
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        parts = [f"missing {_listed(missing)}" if missing else "", f"unknown {_listed(unknown)}" if unknown else ""]
        raise _damaged(path, f"not this selector's weights: {'; '.join(filter(None, parts))}")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            shapes = f"{list(value.shape)}, expected {list(expected[name].shape)}"
            raise _damaged(path, f"{name} has shape {shapes}")
        if not io.is_dense(value):
            raise _damaged(path, f"{name} is no dense float tensor")
        if not torch.isfinite(value).all():
            raise _damaged(path, f"{name} holds values that are not finite")
        state[name] = value.detach().float()
    query_proj = state.get("query_proj.weight")
    if config.get("tied") and query_proj is not None and not torch.equal(query_proj, state["cand_proj.weight"]):
        raise _damaged(path, "config says tied, but query_proj.weight and cand_proj.weight differ")


def _check_heads(content: Mapping[str, Any], path: Path) -> None:
    """The number of attention heads does not show in the weights; where the file states it, it must be 1."""
    for place in ("model_config", "config", "hyper_parameters"):
        stated = content.get(place)
        heads = stated.get("num_heads", 1) if isinstance(stated, Mapping) else 1
        if heads != 1:
            raise _damaged(path, f"{place}: num_heads={str(heads)[:20]}; only single-head selectors can be read")


def _check_temperature(value: Tensor, path: Path) -> None:
    if value.numel() != 1 or abs(float(value.reshape(())) - OLD_TEMPERATURE) > 1e-6:
        raise _damaged(path, f"its temperature is not {OLD_TEMPERATURE}")


def _listed(names: list[str]) -> str:
    shown = [name if name.isprintable() else ascii(name) for name in names[:4]]
    return ", ".join(name[:80] for name in shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _damaged(path: Path, problem: str) -> DamagedInputError:
    return DamagedInputError(f"selector checkpoint {path}: {problem}")
