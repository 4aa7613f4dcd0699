"""Processors of chat models on machines with and without torchvision.

Without torchvision, transformers cannot build a video processor, and so none of the processors that hold one; the
images of a prompt need only the image processor, which has a PIL form.
"""

import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from open_mmicl.errors import foreign

_IMAGE_PARTS = ["image_processor", "tokenizer"]


class _WithoutVideo(ProcessorMixin):
    """Stands behind a processor class that hands its video processor on, and leaves it out."""

    video_processor = SimpleNamespace(num_frames=None, fps=None)  # SmolVLM's chat template wants to see these

    def __init__(self, *parts: Any, **options: Any):
        image_processor, tokenizer = parts[:2]
        super().__init__(image_processor, tokenizer, **options)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return _IMAGE_PARTS


def image_only(processor_class: type) -> type:
    """The same processor without its video part."""
    module = sys.modules[processor_class.__module__]
    if getattr(module, "num2words", "") is None:
        module.num2words = str  # SmolVLM spells a video's number of frames with it, and is not built without
    return type(f"{processor_class.__name__}ImageOnly", (processor_class, _WithoutVideo), {"get_attributes": _parts})


@classmethod
def _parts(cls: type) -> list[str]:
    return _IMAGE_PARTS


def load_processor(folder: Path, model: Any, tokenizer: Any, settings: dict[str, Any]) -> Any:
    """The processor of a model folder, without a say in which chat template counts; ``settings`` go to its image
    processor.

    Raises:
        DamagedInputError: its files are missing or it cannot be built here.
    """
    with foreign("processor in", folder, "cannot be loaded"):
        processor_class = PROCESSOR_MAPPING[type(model.config)]
        files = {"trust_remote_code": False, "local_files_only": True, **settings}
        if is_torchvision_available() or "video_processor" not in processor_class.get_attributes():
            processor = AutoProcessor.from_pretrained(str(folder), **files)
        else:
            image_processor = AutoImageProcessor.from_pretrained(str(folder), **files)
            own = _own_settings(folder, processor_class)
            processor = image_only(processor_class)(image_processor, tokenizer, video_processor=None, **own)
    return processor


def _own_settings(folder: Path, processor_class: type) -> dict[str, Any]:
    """What processor_config.json says about the processor itself."""
    other = {*_IMAGE_PARTS, "self", "kwargs", "video_processor"}
    known = set(inspect.signature(processor_class.__init__).parameters) - other
    file = folder / "processor_config.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {key: value for key, value in found.items() if key in known}
