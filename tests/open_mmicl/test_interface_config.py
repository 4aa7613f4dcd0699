"""configs/infer_model/*.yaml: what is there loads; what is wrong is named."""

from pathlib import Path

import pytest

from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError
from open_mmicl.interface.config import InferModelConfig

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "infer_model").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_loads(path) -> None:
    config = InferModelConfig.load(path)
    variable = config.server_config.url_variable if config.interface == "openai" else config.path_variable
    assert variable.isupper() and config.prompt_format.user_template.count("<Q>") == 1


def test_names_of_models_differ() -> None:
    assert len({InferModelConfig.load(path).name for path in CONFIGS}) == len(CONFIGS) >= 2


@pytest.mark.parametrize(
    ("text", "error", "word"),
    [
        ("name: a", UsageError, "model_name_or_path"),
        ("name: a\nmodel_name_or_path: b\ndtyp: fp32", UsageError, "dtype"),
        ("name: a\nmodel_name_or_path: b\ndtype: int4", UsageError, "int4"),
        ("name: a\nmodel_name_or_path: b\ntoken_budget: 0", UsageError, "token_budget=0"),
        ("name: a\nmodel_name_or_path: b\ntoken_budget: many", UsageError, "token_budget='many'"),
        ("name: a\nmodel_name_or_path: b\nuser_template: no question", UsageError, "<Q>"),
        ("name: a\nmodel_name_or_path: b\nprocessor: [1]", UsageError, "processor"),
        ("name: 3\nmodel_name_or_path: b", UsageError, "name=3"),
        ("- a", DamagedInputError, "mapping"),
        ("a: [", DamagedInputError, "YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, error, word) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(error, match=word.replace("[", r"\[")) as caught:
        InferModelConfig.load(path)
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_model_names_the_known(tmp_path) -> None:
    (tmp_path / "known.yaml").write_text("name: a")
    with pytest.raises(UsageError, match="known"):
        InferModelConfig.load(tmp_path / "unknown.yaml")


def test_where_the_files_are(tmp_path) -> None:
    config = InferModelConfig(name="m", model_name_or_path="org/model", path_variable="M_PATH")
    assert config.local_dir({}) is None
    assert config.local_dir({"M_PATH": str(tmp_path)}) == tmp_path
    with pytest.raises(MissingInputError, match="M_PATH"):
        config.local_dir({"M_PATH": str(tmp_path / "absent")})
    with pytest.raises(MissingInputError, match="M_PATH"):
        InferModelConfig(name="m", model_name_or_path="some/local/folder", path_variable="M_PATH").local_dir({})
