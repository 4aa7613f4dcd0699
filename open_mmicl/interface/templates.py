"""Chat templates: which of a model folder's counts, and whether it says what a prompt must say."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_mmicl.errors import DamagedInputError, foreign
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.prompts import Demo, Prompt

_WORDS = ("firstquestion", "firstanswer", "lastquestion")
_ADVICE = "put the model's own file there, or give the template in the YAML (chat_template)"


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja chat template and where it comes from: a file, or the YAML's key."""

    text: str
    source: str


def find(config: InferModelConfig, folder: Path, own: Any) -> ChatTemplate:
    """The template of a model as transformers' processors take it: the YAML's, else that of processor_config.json,
    chat_template.jinja, chat_template.json, else the tokenizer's (``own``), which may be one for texts and tools only.

    Raises:
        DamagedInputError: a file cannot be read, or there is none.
    """
    if config.chat_template:
        return ChatTemplate(config.chat_template, f"chat_template of the YAML of {config.name}")
    inline, jinja, older = (folder / n for n in ("processor_config.json", "chat_template.jinja", "chat_template.json"))
    found: list[tuple[Any, Path]] = []
    if inline.is_file():
        found.append((_object(inline).get("chat_template"), inline))
    if jinja.is_file():
        found.append((_text(jinja), jinja))
    if older.is_file():
        found.append((_object(older).get("chat_template"), older))
    found.append((own, folder / "tokenizer_config.json"))
    for template, file in found:
        if isinstance(template, list):  # [{"name": …, "template": …}]
            template = {str(part.get("name")): part.get("template") for part in template if isinstance(part, dict)}
        if isinstance(template, dict):
            template = template.get("default")
        if template:
            if not isinstance(template, str):
                raise DamagedInputError(f"chat template in {file} is not text; {_ADVICE}")
            return ChatTemplate(template, str(file))
    raise DamagedInputError(f"{config.name}: {folder} has no chat template; {_ADVICE}")


def check_files(folder: Path) -> None:
    """See that the folder's template files are text, before a library reads them.

    Raises:
        DamagedInputError: one is not.
    """
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).is_file():
            _text(folder / name)


def check(
    template: ChatTemplate, render: Callable[[list[dict], bool], str], config: InferModelConfig, image_token: str
) -> None:
    """Render a conversation with one demonstration and see that nothing of it is lost.

    Args:
        render: (messages, with the generation prompt) -> text. image_token: what must stand once for each image.

    Raises:
        DamagedInputError: it fails, drops an image or a text, or has no generation prompt; names file and YAML key.
    """
    first, answer, last = _WORDS
    messages = config.prompt_format.messages(Prompt((Demo("", first, answer),), "", last))
    where = f"chat template in {template.source}"
    with foreign("chat template in", template.source, "fails on a prompt with images", _ADVICE):
        open_turn, bare = render(messages, True), render(messages, False)
    images = open_turn.count(image_token)
    if images != 2:
        raise DamagedInputError(
            f"{where} makes {images} image tokens of two images ({image_token}, as config.json names it); {_ADVICE}"
        )
    lost = [text for text in (*_WORDS, config.system.strip()) if text not in open_turn]
    if lost:
        raise DamagedInputError(f"{where} drops a text of the prompt ({lost[0][:40]!r}); {_ADVICE}")
    if not open_turn.startswith(bare) or len(open_turn) == len(bare):
        raise DamagedInputError(f"{where} has no generation prompt: answers cannot be placed; {_ADVICE}")


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        said = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise DamagedInputError(f"chat template in {file} cannot be read ({said}); {_ADVICE}") from error


def _object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DamagedInputError(f"chat template in {file} cannot be read (not JSON); {_ADVICE}") from error
    if not isinstance(content, dict):
        raise DamagedInputError(f"chat template in {file} cannot be read (not a JSON object); {_ADVICE}")
    return content
