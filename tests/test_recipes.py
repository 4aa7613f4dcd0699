"""Done or stale follows from what each setting says of itself; stamps of lists kept by hand are still recognised.

``old_recipes.json`` holds, for each case of :mod:`recipe_book`, the recipe that the lists gave and the settings that
moved it, written before the lists were given up.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from lever_plus import cli, config, provenance
from lever_plus.provenance import Recipe
from lever_plus.settings.registry import STAGE_SETTINGS
from lever_plus.settings.selector import TrainV2Settings
from lever_plus.stages import train_v2, train_v3_online
from tests import recipe_book as book

OLD = json.loads((Path(__file__).parent / "old_recipes.json").read_text())
RETRAINED = ("v2, lora",)  # its stamps say neither LEVER_LM nor the data set
STEPS = {
    "beam_data", "items", "states", "v2", "v2.beams", "v2.pools", "v2.lora", "rl_data", "v3", "v3.answers", "inference",
    "adaptive", "record",
}  # fmt: skip
# The lists' faults: what changed a result and was not seen, and what was taken for a change and was none.
NOW_TOO = {case: {"image_ids_path"} for case in OLD if case.startswith("v2")}
NOW_TOO["v2, lora"] |= {"lever_lm"}
NOW_TOO |= {case: {"rl_balance", "positive_mining"} for case in OLD if case.startswith("rl_data")}
for made in ("v2", "v3"):
    NOW_TOO |= {case: NOW_TOO.get(case, set()) | {"encoder"} for case in OLD if case.startswith(made)}
NOW_TOO |= {case: NOW_TOO[case] | {"checkpoint_metric"} for case in OLD if case.startswith("v3")}
NOW_TOO |= {case: {"cascade"} for case in OLD if case.startswith("inference")}
MUCH_THE_SAME = (
    "beam_data, stop", "embeddings val", "v2, stop", "v2, by loss", "rl_data, stop", "v3 alone", "v3, shot cost",
    "inference, train_val",
)  # fmt: skip
ASKING = {
    "infoscore", "length_norm", "length_penalty", "max_new_tokens", "num_beams", "prompt_order", "engine",
}  # fmt: skip
OF_RL_DATA = {
    "rl_beams", "rl_prefixes", "rl_query_num", "rl_random", "rl_samples_high", "rl_samples_low", "rl_shot",
    "rl_temp_high", "rl_temp_low", "lever_lm_checkpoint_path", "rl_balance", "positive_mining",
}  # fmt: skip
NOTHING = {"answer_cache", "assume", "device_map", "image_cache_mb", "token_budget"}
NO_LONGER = {
    "v2, lora": {"embedding"},  # of channels, which it does not read: "concat" still counts
    "v3": ASKING | OF_RL_DATA | NOTHING,
    "v3, online": OF_RL_DATA | NOTHING,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    book.world(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def old_recipe(case, settings, root):
    """The recipe of the lists, with what this data set and this code are called filled in."""
    book.recipe_of(case, settings)  # makes the files that v3's needs
    names = book.hashes(settings)
    text = json.dumps(OLD[case])
    for hash_, name in names.items():
        text = text.replace(name, hash_)
    text = text.replace("<results>", settings.result_dir).replace("<root>", str(root))
    old = json.loads(text)
    return Recipe({role: Path(path) for role, path in old["files"].items()}, old["values"])


@pytest.mark.parametrize("case", [case for case in book.CASES if case not in MUCH_THE_SAME])
def test_every_setting_moves_exactly_the_steps_that_it_affects(case, root):
    expected = set(OLD[case]["moved_by"].split()) | NOW_TOO.get(case, set())
    assert set(book.moved_by(case, root)) == expected - NO_LONGER.get(case, set())


@pytest.mark.parametrize("case", book.CASES)
def test_stamps_of_the_lists_are_recognised(case, root, tmp_path):
    settings = book.settings_of(case, root)
    now, old = book.recipe_of(case, settings), old_recipe(case, settings, root)
    output = tmp_path / "output"
    output.write_text("made")
    provenance.stamp(output, old, 1.0)
    if case in RETRAINED:
        assert provenance.status(output, now) == "stale" and "LEVER_LM" in provenance.changed(output, now)
        return
    assert provenance.status(output, now) == "current" and provenance.changed(output, now) == []
    if not case.startswith(("v2", "v3")):  # unfinished parts belong to a fingerprint
        assert old.fingerprint() == now.fingerprint()
    for name, value in old.values.items():  # and a stamp that says otherwise in anything that counts is not
        if name in now.values:
            provenance.stamp(output, Recipe(old.files, {**old.values, name: [value]}), 1.0)
            assert provenance.status(output, now) == "stale" and provenance.changed(output, now) == [name]
    for role in old.files:
        other = {**old.files, role: output}
        provenance.stamp(output, Recipe(other, old.values), 1.0)
        assert provenance.status(output, now) == "stale" and provenance.changed(output, now) == [role]


def test_each_setting_says_what_it_affects_in_known_words():
    words = {config.INPUT, config.PLACE, config.SPEED, config.TOLD, config.PLAN}
    for cls in [*STAGE_SETTINGS.values(), train_v3_online.OnlineSettings]:
        for field in dataclasses.fields(cls):
            said = field.metadata["affects"]
            assert said in words or set(said.split()) <= STEPS, (cls.__name__, field.name, said)


def test_a_new_setting_makes_stale_unless_it_says_otherwise():
    @dataclasses.dataclass(frozen=True)
    class More(TrainV2Settings):
        plain: int = config.setting(1, "one that says nothing")
        quick: int = config.setting(1, "one of speed", affects=config.SPEED)
        young: int = config.setting(1, "one that outputs are older than", before=1)

    assert config.deciding(More(), "v2").keys() - config.deciding(TrainV2Settings(), "v2").keys() == {"plain"}
    assert config.deciding(More(young=2), "v2")["young"] == 2
    made = Recipe({}, {"A": 1, "YOUNG": 1}, frozenset({"QUICK"}), {"YOUNG": 1})
    assert made.made({"recipe": {"files": {}, "values": {"A": 1, "QUICK": 7}}})
    assert not made.made({"recipe": {"files": {}, "values": {"A": 1, "OTHER": 7}}})
    assert not made.made({"recipe": {"files": {}, "values": {"A": 1, "YOUNG": 2}}})
    assert not made.made({"recipe": {"files": [], "values": None}}) and not made.made({})


@pytest.mark.parametrize("mode", train_v2.VERSIONS)
def test_image_ids_that_are_nowhere_are_an_error(mode, root, capsys):
    words = [f"V2_MODE={mode}", "IMAGE_IDS_PATH=/nowhere", "DATASET=mine", f"RESULT_DIR={root / 'results'}", "-n"]
    settings = book.settings_of("v2", root, V2_MODE=mode)
    made_from = train_v2.recipe(settings)
    for path in made_from.files.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    output, of_version = train_v2._output(settings)
    made = train_v2.recipe(of_version)  # before the output is there: without its stamp it would be the user's own
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("")
    provenance.stamp(output, made, 1.0)
    assert train_v2.is_done(settings)
    assert cli.stage_main(TrainV2Settings, train_v2.run, train_v2.__doc__, words) == 3
    assert "image ids not found: /nowhere" in capsys.readouterr().err
