"""Loads a model, its tokenizer and its image processor from a folder or from the hub. No remote code, no unpickling."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError, foreign
from open_mmicl.interface import templates
from open_mmicl.interface.config import DTYPES, InferModelConfig
from open_mmicl.interface.fingerprint import folder_fingerprint
from open_mmicl.lazy import lazy

errors = lazy("huggingface_hub.errors")
httpx2 = lazy("httpx2")
huggingface_hub = lazy("huggingface_hub")
transformers = lazy("transformers")
transformers_utils = lazy("transformers.utils")
utils = lazy("huggingface_hub.utils")

_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]


def model_dir(config: InferModelConfig) -> Path:
    """The local folder of the model's files; fetched from the hub where it is not there yet.

    Raises:
        MissingInputError: not there and not to be had; one line with what to download, the variable to set.
    """
    folder = config.local_dir()
    if folder is not None:
        return folder

    where = {"revision": config.revision or None, "local_files_only": not hub_answers()}
    try:
        return Path(huggingface_hub.snapshot_download(config.model_name_or_path, allow_patterns=_FILES, **where))
    except (
        errors.HfHubHTTPError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        httpx2.HTTPError,
        OSError,
    ) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        hint = f" and set {config.path_variable} to the folder" if config.path_variable else ""
        raise MissingInputError(
            f"{config.name} is not on this machine and could not be fetched{offline}: download it with "
            f"`hf download {config.model_name_or_path}`{hint} ({type(error).__name__})"
        ) from error


class Parts(NamedTuple):
    """A model's files, loaded: its folder, the model on its device, the tokenizer, the files' hash, the data type."""

    folder: Path
    model: Any
    tokenizer: Any
    fingerprint: str
    dtype_name: str


def load_parts(config: InferModelConfig, device: str, precision: str) -> Parts:
    """Load what every interface needs of a model.

    Raises:
        MissingInputError: its files are not to be had. DamagedInputError: they are damaged.
        UsageError: device or precision cannot be used here.
    """
    chosen, dtype_name = resolve_device(device), precision_name(config, precision)
    folder = model_dir(config)
    fingerprint = folder_fingerprint(folder, [config.chat_template] if config.chat_template else [])
    tokenizer = load_tokenizer(folder)
    model = load_model(config, folder, chosen, getattr(torch, DTYPES[dtype_name]))
    return Parts(folder, model, tokenizer, fingerprint, dtype_name)


def hub_answers() -> bool:
    """Whether the model hub can be reached: one request, where the library would retry for a minute per file."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except httpx2.HTTPError:
        return False
    return True


def precision_name(config: InferModelConfig, precision: str) -> str:
    """``auto`` is the configuration's dtype."""
    name = config.dtype if precision == "auto" else precision
    if name not in DTYPES:
        raise UsageError(f"PRECISION={precision} is not allowed: auto | {' | '.join(DTYPES)}")
    return name


def resolve_device(device: str) -> torch.device:
    """``auto`` is the (first visible) GPU where there is one.

    Raises:
        UsageError: a GPU is asked for and none is usable.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"DEVICE={device} is not allowed: auto | cpu | cuda | cuda:<n>") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"DEVICE={device}: no usable GPU on this machine")
    return chosen


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer. Its chat template may not be the model's, see :mod:`open_mmicl.interface.templates`.

    Raises:
        MissingInputError: a folder without tokenizer_config.json, which would be read as another tokenizer.
        DamagedInputError: its files are missing or damaged.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise MissingInputError(f"{folder}: tokenizer_config.json not found; put the model's own file there")
    templates.check_files(folder)
    with foreign("tokenizer in", folder, "cannot be loaded"):
        return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def load_model(config: InferModelConfig, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """The model in evaluation mode, without gradients.

    Raises:
        DamagedInputError: its files are damaged, incomplete or of a model type this transformers does not know.
    """
    transformers_utils.logging.disable_progress_bar()
    placement: dict[str, Any] = {"device_map": "auto"} if config.device_map == "auto" and device.type == "cuda" else {}
    with foreign("model in", folder, "cannot be loaded"):
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True,
            attn_implementation=attention(config, device, dtype), output_loading_info=True, **placement,
        )  # fmt: skip
    missing = sorted(info["missing_keys"]) + sorted(info["mismatched_keys"])
    if missing:
        raise DamagedInputError(
            f"weights in {folder} do not fit the model: {len(missing)} tensors missing or misshapen, e.g. {missing[0]}"
        )
    if not placement:
        model.to(device)
    return model.eval().requires_grad_(False)


def attention(config: InferModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """SDPA for the language model (it takes tree masks); flash attention in the vision tower where installed."""
    if config.attn != "auto":
        return config.attn

    if (
        device.type == "cuda"
        and dtype != torch.float32
        and config.interface == "qwen_vl"
        and transformers_utils.is_flash_attn_2_available()
    ):
        return {"": "sdpa", "text_config": "sdpa", "vision_config": "flash_attention_2"}
    return "sdpa"


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Ids that end a generated answer: the model's own, else the tokenizer's."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    if found is None:
        raise DamagedInputError("neither the generation configuration nor the tokenizer names an end-of-text token")
    return [int(i) for i in (found if isinstance(found, (list, tuple)) else [found])]
