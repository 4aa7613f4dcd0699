"""Interfaces to LVLMs: configuration, prompts, and one class per way of asking a model."""

from typing import Any

from open_mmicl.interface.config import INTERFACES, InferModelConfig


def load_interface(config: InferModelConfig, device: str = "auto", precision: str = "auto") -> Any:
    """Load the model of a configuration; returns a :class:`~open_mmicl.interface.base.LvlmInterface`.

    Raises:
        MissingInputError: its files are not to be had. DamagedInputError: they are damaged.
        UsageError: device or precision cannot be used here, or a server has the model.
    """
    return INTERFACES.get(config.interface)(config, device, precision)
