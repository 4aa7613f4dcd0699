"""CLIP embeddings of a split's images and questions (transformers' CLIPModel; no torchvision needed)."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lever_plus.data.dataset import VqaSplit
from lever_plus.data.embeddings import ModalityFile
from open_mmicl.errors import DamagedInputError, MissingInputError, NumericError, UsageError, foreign
from open_mmicl.interface.images import load_rgb as open_image
from open_mmicl.interface.loading import hub_answers
from open_mmicl.lazy import lazy

image_processing_pil_clip = lazy("transformers.models.clip.image_processing_pil_clip")
transformers = lazy("transformers")
utils = lazy("transformers.utils")

_HOW = (
    "download openai/clip-vit-base-patch32 (or openai/clip-vit-large-patch14) with `hf download` to a folder and set "
    "CLIP_PATH to it"
)


def embed_split(split: VqaSplit, clip_path: str, device: Any, batch: int) -> dict[str, torch.Tensor]:
    """Embed every item of a split.

    Each distinct image is decoded once, each distinct question encoded once. Single precision on the CPU,
    bfloat16 autocast on a GPU; the results are float32 either way.

    Args:
        clip_path: a local folder or a name on the Hugging Face hub (its cache is used first).
        batch: images or texts per forward.

    Returns: {"image": [N, d], "text": [N, d]}, each row L2-normalised, on the CPU.

    Raises:
        MissingInputError: the model or an image is not there. DamagedInputError: an image cannot be decoded.
        NumericError: an embedding is not finite.
    """
    encoder = ClipEncoder(clip_path, device, batch)
    _, first, inverse = np.unique(split.image_ids, return_index=True, return_inverse=True)
    paths = [split.image_path(int(row)) for row in first]  # all of them, before the work begins
    questions = [split.question(row) for row in range(len(split))]
    images = encoder.images(paths, "CLIP images")
    return {"image": images[torch.from_numpy(inverse)], "text": encoder.texts(questions, "CLIP questions")}


def embed_texts(texts: list[str], clip_path: str, device: Any, batch: int) -> torch.Tensor:
    """Embed texts as :func:`embed_split` does questions: float32 [N, d], L2-normalised, on the CPU.

    Raises:
        MissingInputError, DamagedInputError: the model. NumericError: an embedding is not finite.
    """
    return ClipEncoder(clip_path, device, batch).texts(texts, "CLIP answers")


class ClipEncoder:
    """A CLIP model that embeds images and texts, ``batch`` per forward; rows are L2-normalised, on the CPU."""

    def __init__(self, clip_path: str, device: Any, batch: int = 64) -> None:
        """Raises: as :func:`load_pretrained`."""
        self.device, self.batch = torch.device(device), batch
        self.model = load_pretrained(transformers.CLIPModel, clip_path).to(self.device).eval()
        self.tokenizer = load_pretrained(transformers.AutoTokenizer, clip_path)
        self.processor = load_pretrained(image_processing_pil_clip.CLIPImageProcessorPil, clip_path)

    def images(self, paths: Sequence[str], title: str) -> torch.Tensor:
        """float32 [N, d] of image files. Raises: MissingInputError, DamagedInputError, NumericError."""
        return self._all(self._images, list(paths), title)

    def texts(self, texts: Sequence[str], title: str) -> torch.Tensor:
        """float32 [N, d]; each distinct text is encoded once, with others of its length: little padding."""
        distinct = sorted(set(texts), key=lambda text: (len(text), text))
        number = {text: i for i, text in enumerate(distinct)}
        return self._all(self._texts, distinct, title)[torch.tensor([number[text] for text in texts])]

    def _images(self, paths: Sequence[str]) -> torch.Tensor:
        pixels = self.processor(images=[open_image(path) for path in paths], return_tensors="pt")["pixel_values"]
        return pooled(self.model.get_image_features(pixel_values=pixels.to(self.device)))

    def _texts(self, texts: Sequence[str]) -> torch.Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        tokens = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return pooled(self.model.get_text_features(**tokens))

    def _all(self, encode: Callable[[Sequence[str]], torch.Tensor], items: list[str], title: str) -> torch.Tensor:
        bf16 = self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return _all(encode, items, self.batch, title)


def combine_modalities(features: dict[str, torch.Tensor], embedding: str, lever_lm: str) -> torch.Tensor:
    """The item embedding that the selector sees.

    Args:
        features: {"image": [N, d], "text": [N, d]}, L2-normalised rows.
        embedding: ``mean`` (the mean of both, L2-normalised again, as the original Lever-Plus exports it: [N, d])
            or ``concat`` (side by side: [N, 2d]).
        lever_lm: ``query_img_text_icd_img_text`` for both, ``query_img_icd_img`` or ``query_text_icd_text`` for one.

    Returns: float32 [N, d] or [N, 2d].
    """
    image, text = features["image"].float(), features["text"].float()
    if lever_lm == "query_img_icd_img":
        return image
    if lever_lm == "query_text_icd_text":
        return text
    if lever_lm != "query_img_text_icd_img_text":
        raise UsageError(f"LEVER_LM={lever_lm} is not known")
    if embedding == "concat":
        return torch.cat([image, text], dim=1)
    if embedding == "mean":
        return torch.nn.functional.normalize((image + text) / 2, dim=1)
    raise UsageError(f"EMBEDDING={embedding} is not allowed: mean | concat")


def combine_file(features: ModalityFile, embedding: str, lever_lm: str) -> torch.Tensor:
    """As :func:`combine_modalities`, block by block from a file: in memory are the result and a block of each.

    Raises:
        MissingInputError, DamagedInputError: the file is missing or damaged.
    """
    features.check_shapes()
    combined, done = torch.empty(0), 0
    for image, text in zip(features.blocks("image"), features.blocks("text"), strict=True):
        block = combine_modalities({"image": image, "text": text}, embedding, lever_lm)
        if not done:
            combined = torch.empty(features.shape("image")[0], block.shape[1])
        combined[done : done + len(block)] = block
        done += len(block)
    return combined


def load_pretrained(cls: Any, clip_path: str) -> Any:
    """From a local folder, else from the hub's cache or the hub itself (HF_HUB_OFFLINE is honoured).

    Weights in the older pickled form (pytorch_model.bin) are read as tensors only.

    Raises:
        MissingInputError: it is not there and not to be had; says what to download and where to put it.
        DamagedInputError: a folder's file is damaged, or its weights are not the model's.
    """
    utils.logging.disable_progress_bar()
    utils.logging.set_verbosity_error()  # what it reports about weights is said by the errors below
    folder = Path(clip_path).expanduser()
    local, is_model = folder.is_dir(), issubclass(cls, transformers.PreTrainedModel)
    if local and is_model and not any((*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))):
        raise MissingInputError(f"CLIP model {folder}: no weights in it (model.safetensors); {_HOW}")
    if not local and (clip_path.count("/") != 1 or clip_path[0] in "./~"):
        raise MissingInputError(f"CLIP model {clip_path}: no such folder; {_HOW}")
    options = {"output_loading_info": True} if is_model else {}
    options["local_files_only"] = local or not hub_answers()
    try:
        with foreign("CLIP model", folder, "cannot be loaded"):
            loaded = cls.from_pretrained(str(folder) if local else clip_path, **options)
    except DamagedInputError as error:
        if isinstance(error.__cause__, UnpicklingError):
            raise DamagedInputError(
                f"CLIP model {folder} cannot be loaded: pickled weights that hold more than tensors"
            ) from error
        if local:
            raise
        said = (str(error.__cause__).splitlines() or [type(error.__cause__).__name__])[0][:160]
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE", "ON") else ""
        raise MissingInputError(f"CLIP model {clip_path!r} could not be loaded{offline}: {_HOW} ({said})") from error
    if not is_model:
        return loaded
    model, info = loaded
    if info["missing_keys"]:
        names = sorted(info["missing_keys"])
        raise DamagedInputError(f"CLIP model {clip_path}: {len(names)} weights are not in it, e.g. {names[0]}")
    return model


def _all(encode: Callable[[Sequence[str]], torch.Tensor], items: list[str], batch: int, title: str) -> torch.Tensor:
    with tqdm(
        list(_chunks(items, batch)), desc=title, unit="batch"
    ) as chunks:  # closed, and its line ended, on an error
        return torch.cat([_normalised(encode(chunk), title) for chunk in chunks])


def _normalised(values: torch.Tensor, title: str) -> torch.Tensor:
    values = values.float()
    norms = values.norm(dim=1, keepdim=True)
    if not torch.isfinite(norms).all() or (norms == 0).any():
        raise NumericError(f"{title}: an embedding is not finite or zero")
    return (values / norms).cpu()


def pooled(output: Any) -> torch.Tensor:
    """The projected embedding [B, d] of CLIP's image or text features: a tensor, or the output that holds it."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output  # transformers 4 | 5


def _chunks(items: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
