"""Interfaces to LVLMs: configuration, prompts, and one class per way of asking a model."""

from typing import Any

from open_mmicl.errors import UsageError
from open_mmicl.interface.config import InferModelConfig


def load_interface(config: InferModelConfig, device: str = "auto", precision: str = "auto") -> Any:
    """Load the model of a configuration; returns a :class:`~open_mmicl.interface.base.LvlmInterface`.

    Raises:
        MissingInputError: its files are not to be had. DamagedInputError: they are damaged.
        UsageError: device or precision cannot be used here, or a server has the model.
    """
    if config.interface == "openai":
        raise UsageError(f"{config.name}: the model is on a server (interface: openai); this needs it on this machine")
    from open_mmicl.interface import hf_chat, loading, qwen_vl
    from open_mmicl.interface.fingerprint import folder_fingerprint

    chosen, dtype_name = loading.resolve_device(device), loading.precision_name(config, precision)
    folder = loading.model_dir(config)
    fingerprint = folder_fingerprint(folder, [config.chat_template] if config.chat_template else [])
    tokenizer = loading.load_tokenizer(folder)
    model = loading.load_model(config, folder, chosen, hf_chat.torch_dtype(dtype_name))
    if config.interface == "qwen_vl":
        return qwen_vl.load_qwen(config, folder, model, tokenizer, fingerprint, dtype_name)
    return hf_chat.load_chat(config, folder, model, tokenizer, fingerprint, dtype_name)
