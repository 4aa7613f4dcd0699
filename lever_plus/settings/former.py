"""Names and values of the original Lever-Plus's settings, and what they are here (former.yaml; docs/migration.md
lists them).

A name whose meaning is the same is taken over, one that asks for what this project does anyway passes, any other is
refused with what to use instead. Where a command reads nothing of what a name is about, the name is only told of
(:mod:`lever_plus.settings.names`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lever_plus import config
from open_mmicl.errors import UsageError

_ON, _OFF = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
Values = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Former:
    """A name of the original.

    ``about``: the settings here that it concerns. ``same``: it has their meaning, and its value is theirs.
    ``values``: what single values are here ({}: what happens anyway). ``instead``: what to use for the others.
    """

    about: tuple[str, ...]
    same: bool = False
    values: Values = field(default_factory=dict)
    instead: str = ""


class Taken(str):
    """A value under our name that the user set under the original's; ``origin``: what was set, for an error line."""

    origin: str

    def __new__(cls, value: str, origin: str) -> "Taken":
        made = super().__new__(cls, value)
        made.origin = origin
        return made


def _former(entry: Mapping[str, Any]) -> Former:
    switch = {word: entry[key] for key, words in (("on", _ON), ("off", _OFF)) if key in entry for word in words}
    values = {**switch, **entry.get("values", {})}
    return Former(tuple(entry["about"]), entry.get("same", False), values, entry.get("instead", ""))


_TABLE = config.read_yaml(Path(__file__).with_suffix(".yaml"))
FORMER = {name: _former(entry) for entry in _TABLE["names"] for name in entry["names"]}
VALUES: Values = _TABLE["values"]
"""Values of settings that have the same name here."""
_INSTEAD: Values = _TABLE["instead"]


def translate(layer: Mapping[str, object], reads: Collection[str]) -> dict[str, object]:
    """A layer of settings with the original's names and values put into ours.

    Args:
        layer: values by name (an environment, a file, a command line).
        reads: names of the settings that the command reads; what concerns none of them is left alone.

    Raises:
        UsageError: a name or value whose meaning nothing here has, or two names that contradict each other.
    """
    made: dict[str, object] = {}
    for name, value in layer.items():
        text = str(value).strip()
        if name in FORMER and text and not reads.isdisjoint(FORMER[name].about):
            taken = {one: there for one, there in made.items() if isinstance(there, Taken)}
            made |= _of(name, text, {**layer, **taken})
            continue
        made.setdefault(name, value)
        if name in reads and name in VALUES:
            made[name] = VALUES[name].get(text, value)
        if name in reads and text in _INSTEAD.get(name, {}):
            raise UsageError(f"{name}={text} is the original Lever-Plus's; here: {_INSTEAD[name][text]}")
        if name == "GPU_ID":
            made[name] = text.replace("cuda:", "").strip("\"'[]() ") if text.strip("\"' ") else value
    return made


def _of(name: str, text: str, layer: Mapping[str, object]) -> dict[str, str]:
    former, said = FORMER[name], f"{name}={text[:40]}"
    if former.same:
        meant = dict.fromkeys(former.about, text)
    elif text.lower() in former.values:
        meant = former.values[text.lower()]
    else:
        raise UsageError(f"{said} is a setting of the original Lever-Plus: {former.instead or _either(former)}")
    for ours, value in meant.items():
        other = layer.get(ours, "")
        there = str(other).strip()
        if there and not _equal(there, value):
            also = getattr(other, "origin", f"{ours}={there[:40]}")
            raise UsageError(f"{said} means {ours}={value[:40]} here, but {also} is set too: unset one")
    return {ours: Taken(value, said) for ours, value in meant.items()}


def _either(former: Former) -> str:
    return f"it takes {' | '.join(former.values)}"


def _equal(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def meaning(name: str, text: str) -> str:
    """What a name that is taken over is here, for a line on the screen; "" for one that changes nothing."""
    former = FORMER[name]
    meant = dict.fromkeys(former.about, text) if former.same else former.values.get(text.lower(), {})
    return " ".join(f"{ours}={value}" for ours, value in meant.items())
