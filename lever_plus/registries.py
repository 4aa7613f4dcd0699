"""What can be added without touching the package: one registry per kind (docs/extending.md). No torch."""

import os
from collections.abc import Mapping
from typing import Any

from open_mmicl.errors import expand
from open_mmicl.interface.config import INTERFACES
from open_mmicl.registry import Registry, load_file, plugins_in

RCE_LOSSES = Registry("RCE loss", "RCE_LOSSES", "lever_plus.rl.losses")
REWARDS = Registry("reward", "REWARDS", "lever_plus.rl.rewards")
SCORERS = Registry("scorer", "SCORERS", "lever_plus.selectors.parts")
RIVALS = Registry("rival", "RIVALS", "lever_plus.data.rivals")
SAMPLER_CLASSES = {
    "rand_sampler": "RandSampler",
    "text_sim_sampler": "TextSimSampler",
    "img_sim_sampler": "ImgSimSampler",
    "mix_sampler": "MixSampler",
    "channel_sim_sampler": "ChannelSimSampler",
}
"""What files and stamps call the package's samplers; settings take both names."""
SAMPLERS = Registry(
    "sampler", "SAMPLERS", "lever_plus.data.samplers", also={name: word for word, name in SAMPLER_CLASSES.items()}
)
READERS = Registry("reader", "READERS", "lever_plus.data.readers", "lever_plus.data.parquet")

ALL = (RCE_LOSSES, REWARDS, SCORERS, SAMPLERS, RIVALS, INTERFACES, READERS)


def load_plugins(given: str) -> None:
    """Load the user's files of LEVER_PLUGINS (paths with ":" between).

    Raises:
        MissingInputError: one is not there. UsageError: one fails.
    """
    for path in filter(None, given.split(os.pathsep)):
        load_file(expand(path.strip(), "LEVER_PLUGINS"))


def plugins_of(values: Mapping[str, Any]) -> dict[str, str]:
    """{name: SHA-256 of its file} of what comes from the user's files among the values of some settings."""
    words = [word for value in values.values() if isinstance(value, str) for word in value.split()]
    return plugins_in(words, ALL)


def tables() -> str:
    """The package's own choices as Markdown tables."""
    parts = []
    for registry in ALL:
        own = {name: text for name, text in registry.helps().items() if registry.file_of(name) is None}
        rows = [f"| `{name}` | {text} |" for name, text in own.items()]
        parts.append("\n".join([f"| {registry.kind} | |", "| --- | --- |", *rows]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(tables())
