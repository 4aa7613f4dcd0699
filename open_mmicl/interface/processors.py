"""Processors of chat models on machines with and without torchvision.

Without torchvision, transformers cannot build a video processor, and so none of the processors that hold one; the
images of a prompt need only the image processor, which has a PIL form.
"""

import inspect
import json
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from open_mmicl.errors import DamagedInputError

_IMAGE_PARTS = ["image_processor", "tokenizer"]


class _WithoutVideo(ProcessorMixin):
    """Stands behind a processor class that hands its video processor on, and leaves it out."""

    def __init__(self, *parts: Any, **settings: Any):
        image_processor, tokenizer = parts[:2]
        super().__init__(image_processor, tokenizer, **settings)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return _IMAGE_PARTS


def image_only(processor_class: type) -> type:
    """The same processor without its video part."""
    return type(f"{processor_class.__name__}ImageOnly", (processor_class, _WithoutVideo), {"get_attributes": _parts})


@classmethod
def _parts(cls: type) -> list[str]:
    return _IMAGE_PARTS


def load_processor(folder: Path, model: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    """The processor of a model folder; ``settings`` go to its image processor.

    Raises:
        DamagedInputError: its files are missing or it cannot be built here.
    """
    try:
        processor_class = PROCESSOR_MAPPING[type(model.config)]
        if is_torchvision_available() or "video_processor" not in processor_class.get_attributes():
            return AutoProcessor.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, **settings
            )
        image_processor = AutoImageProcessor.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, **settings
        )
        return image_only(processor_class)(image_processor, tokenizer, **_own_settings(folder, processor_class))
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DamagedInputError(f"processor in {folder} cannot be loaded: {line[:300]}") from error


def _own_settings(folder: Path, processor_class: type) -> dict[str, Any]:
    """What processor_config.json says about the processor itself, and the chat template."""
    file, template = folder / "processor_config.json", folder / "chat_template.jinja"
    other = {*_IMAGE_PARTS, "self", "kwargs", "video_processor"}
    known = set(inspect.signature(processor_class.__init__).parameters) - other
    raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings = {key: value for key, value in raw.items() if key in known}
    if "chat_template" not in settings and template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return settings
