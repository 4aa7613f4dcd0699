"""Which chat template counts, and that one which loses something is named before anything is asked."""

import json
from pathlib import Path

import pytest

from open_mmicl.engine import Engine
from open_mmicl.errors import DamagedInputError
from tests.reference import tiny_lvlm
from tests.reference.tiny_lvlm import BARE_TEMPLATE, QWEN_TEMPLATE

TEXT_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_IMAGE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
WRONG = {
    "text only": (TEXT_ONLY, "TypeError"),
    "drops images": (NO_IMAGE, "0 image tokens of two images"),
    "drops texts": (QWEN_TEMPLATE.replace("{{ part['text'] }}", ""), "drops a text"),
    "refuses": ("{{ raise_exception('no images please') }}", "no images please"),
    "not Jinja": ("{% for %}", "TemplateSyntaxError"),
    "no generation prompt": (QWEN_TEMPLATE.split("{% if add_generation_prompt %}")[0], "no generation prompt"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder without any chat template."""
    made = tiny_lvlm.make_folder(tmp_path / "model")
    (made / "chat_template.jinja").unlink()
    return made


def put(folder: Path, **places: str) -> None:
    """Write templates where published folders hold them."""
    for place, template in places.items():
        if place == "jinja":
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        elif place == "json":
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
        else:
            file = folder / {"tokenizer": "tokenizer_config.json", "processor": "processor_config.json"}[place]
            content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            file.write_text(json.dumps({**content, "chat_template": template}), encoding="utf-8")


def rendered(folder: Path, **changes: str) -> str:
    layout = Engine.load(tiny_lvlm.make_config(folder, **changes), device="cpu").lvlm.layout
    return layout.text(tiny_lvlm.Prompt((), "", "what?"))


@pytest.mark.parametrize(
    "places",
    [
        {"json": QWEN_TEMPLATE, "tokenizer": TEXT_ONLY},
        {"jinja": QWEN_TEMPLATE, "tokenizer": TEXT_ONLY},
        {"jinja": QWEN_TEMPLATE, "json": BARE_TEMPLATE, "tokenizer": TEXT_ONLY},
        {"processor": QWEN_TEMPLATE, "tokenizer": TEXT_ONLY},
        {"tokenizer": QWEN_TEMPLATE},
    ],
    ids=lambda places: " ".join(places),
)
def test_the_models_own_template_counts(places: dict[str, str], folder: Path) -> None:
    put(folder, **places)
    assert rendered(folder).startswith("<|im_start|>system\nBe brief.")


def test_named_templates_the_default_counts(folder: Path) -> None:
    named = [{"name": "tool_use", "template": TEXT_ONLY}, {"name": "default", "template": QWEN_TEMPLATE}]
    put(folder, tokenizer=named)  # type: ignore[arg-type]
    assert rendered(folder).startswith("<|im_start|>system\nBe brief.")


def test_the_yaml_wins(folder: Path) -> None:
    put(folder, json=TEXT_ONLY)
    assert rendered(folder, chat_template=BARE_TEMPLATE).startswith("<|im_start|>user")


@pytest.mark.parametrize("place", ["jinja", "json", "tokenizer"])
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_template_is_one_line_with_file_and_key(fault: str, place: str, folder: Path) -> None:
    template, said = WRONG[fault]
    put(folder, **{place: template})
    with pytest.raises(DamagedInputError, match=said) as error:
        rendered(folder)
    file = {"jinja": "chat_template.jinja", "json": "chat_template.json", "tokenizer": "tokenizer_config.json"}[place]
    assert file in str(error.value) and "YAML (chat_template)" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", "[1]", '{"chat_template": 7}', ""])
def test_a_template_file_that_cannot_be_read(content: str, folder: Path) -> None:
    (folder / "chat_template.json").write_text(content, encoding="utf-8")
    with pytest.raises(DamagedInputError, match="chat_template.json"):
        rendered(folder)


def test_a_template_file_that_is_not_text(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedInputError, match="chat_template.jinja.*chat_template"):
        rendered(folder)


def test_no_template_at_all(folder: Path) -> None:
    with pytest.raises(DamagedInputError, match="no chat template"):
        rendered(folder)
