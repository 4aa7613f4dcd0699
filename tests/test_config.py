"""Settings: layers, ranges, errors, help."""

import os
from dataclasses import dataclass, fields

import pytest

from lever_plus import config
from lever_plus.config import setting
from lever_plus.settings import help  # noqa: A004 - what it is
from lever_plus.settings.loading import load
from lever_plus.settings.registry import STAGE_SETTINGS
from open_mmicl.errors import DamagedInputError, UsageError


@dataclass(frozen=True)
class Example:
    rce_epochs: int = setting(5, "epochs of RCE", lo=0)
    rce_lr: float = setting(1e-4, "learning rate", lo=0, open_lo=True)
    mode: str = setting("a", "a word", choices=("a", "b"))
    flag: bool = setting(False, "a switch")


def test_each_layer_wins_over_the_ones_below() -> None:
    layers = [{"RCE_EPOCHS": "1"}, {"RCE_EPOCHS": "2"}, {"RCE_EPOCHS": "3"}, {"RCE_EPOCHS": "4"}]  # yaml .env env cli
    for upto, expected in ((0, 5), (1, 1), (2, 2), (3, 3), (4, 4)):
        yaml_values, dotenv, env, cli = [layers[i] if i < upto else {} for i in range(4)]
        assert config.resolve(Example, cli, env, yaml_values, dotenv).rce_epochs == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RCE_EPOCHS", "-1"),
        ("RCE_EPOCHS", "1.5"),
        ("RCE_LR", "abc"),
        ("RCE_LR", "0"),
        ("RCE_LR", "nan"),
        ("RCE_LR", "inf"),
        ("MODE", "c"),
        ("FLAG", "maybe"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_with_name_value_and_what_is_allowed(name: str, value: str) -> None:
    with pytest.raises(UsageError) as error:
        config.resolve(Example, {}, {name: value}, {}, {})
    text = str(error.value)
    field = next(f for f in fields(Example) if config.env_name(f.name) == name)
    assert name in text and value in text and config.allowed(field) in text and "\n" not in text
    assert error.value.exit_code == 2


def test_an_empty_variable_counts_as_not_set() -> None:
    assert config.resolve(Example, {}, {"RCE_EPOCHS": ""}, {"RCE_EPOCHS": 7}, {}).rce_epochs == 7


def test_dotenv_lines(tmp_path) -> None:
    path = tmp_path / ".env"
    path.write_text("# note\nexport COCO_PATH=\"/a b/c\"\nKL_BETA=0.1 # comment\n\nX='y'\n")
    assert config.read_dotenv(path) == {"COCO_PATH": "/a b/c", "KL_BETA": "0.1", "X": "y"}
    path.write_bytes(b"\xef\xbb\xbfexport\tA='x y' # why\r\nB=1   \r\nC=a b\r\n")
    assert config.read_dotenv(path) == {"A": "x y", "B": "1", "C": "a b"}
    for content, says in ((b"what is this\n", "line 1"), ("A=1\n".encode("utf-16"), "UTF-8")):
        path.write_bytes(content)
        with pytest.raises(DamagedInputError, match=says):
            config.read_dotenv(path)


def test_dotenv_reaches_what_reads_the_environment_itself(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "read_dotenv", lambda: {"QWEN2_5_VL_3B_PATH": "/models/q", "HF_HOME": "/from/file"})
    monkeypatch.setenv("HF_HOME", "/from/environment")
    monkeypatch.setenv("QWEN2_5_VL_3B_PATH", "")  # so that it is taken away again at the end
    monkeypatch.delenv("QWEN2_5_VL_3B_PATH")
    config.export_dotenv()
    assert (os.environ["QWEN2_5_VL_3B_PATH"], os.environ["HF_HOME"]) == ("/models/q", "/from/environment")


@pytest.mark.parametrize("content", ["[" * 1_500, "a: 2024-99-99", "- 1", "a: [", "\x00"])
def test_damaged_yaml_is_one_error(content: str, tmp_path) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(DamagedInputError, match=r"x\.yaml"):
        config.load_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("stage", sorted(STAGE_SETTINGS))
def test_every_stage_prints_every_setting_in_its_help(stage: str) -> None:
    table = help.table([STAGE_SETTINGS[stage]])
    assert max(map(len, table.splitlines())) <= 100 and table.startswith("Often used:")
    for field in fields(STAGE_SETTINGS[stage]):
        rows = [line for line in table.splitlines() if line.startswith(f"  {config.env_name(field.name)} ")]
        assert len(rows) == 1
        assert field.metadata["help"] in " ".join(table.split())


def test_auto_takes_okvqa_where_its_files_are(tmp_path) -> None:
    shared = STAGE_SETTINGS["export_embeddings"]
    assert load(shared, {}, {}).dataset == "mini_okvqa"
    for split in ("train", "val"):
        (tmp_path / f"OpenEnded_mscoco_{split}2014_questions.json").write_text("{}")
        (tmp_path / f"mscoco_{split}2014_annotations.json").write_text("{}")
    assert load(shared, {}, {"OKVQA_PATH": str(tmp_path)}).dataset == "okvqa_local"


def test_an_unknown_data_set_names_the_known() -> None:
    with pytest.raises(UsageError, match="mini_okvqa, .*okvqa_local, .*vqav2_local"):
        load(STAGE_SETTINGS["generate_data"], {"DATASET": "okvq"}, {})
