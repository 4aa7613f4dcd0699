"""No name that a user sets is passed over in silence: read, told of, or refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lever_plus import config
from lever_plus.data import catalog
from lever_plus.settings import elsewhere, former, names
from lever_plus.settings.loading import load
from lever_plus.settings.registry import STAGE_SETTINGS
from open_mmicl.errors import UsageError

V3, INFERENCE = STAGE_SETTINGS["train_v3"], STAGE_SETTINGS["inference"]
READS = names.fields_of([V3])
NAMES = sorted(names.known())


@pytest.mark.parametrize(
    ("name", "meant"),
    [("BATCHSIZE", "BATCH_SIZE"), ("RCELR", "RCE_LR"), ("BATCH_SIZ", "BATCH_SIZE"), ("SAMPEL_NUM", "SAMPLE_NUM"),
     ("RCE_EPOCH", "RCE_EPOCHS"), ("klbeta", "KL_BETA"), ("OKVQA_PTH", "OKVQA_PATH"),
     ("CUDA_VISIBLE_DEVICE", "CUDA_VISIBLE_DEVICES"), ("HF_HUB_OFLINE", "HF_HUB_OFFLINE"),
     ("WANDB_PROJEKT", "WANDB_PROJECT"), ("BATCH", "BATCH_SIZE")],
)  # fmt: skip
def test_a_misspelt_name_is_told_with_the_nearest(name: str, meant: str) -> None:
    (line,) = names.lines(READS, {name: "4"}, {})
    assert name in line and line.endswith(f"did you mean {meant}?")


@given(st.sampled_from(NAMES), st.integers(0, 40), st.sampled_from("drop swap double bare".split()))
def test_any_small_slip_is_told(name: str, place: int, how: str) -> None:
    place %= max(1, len(name) - 1)
    slipped = {
        "drop": name[:place] + name[place + 1 :],
        "swap": name[:place] + name[place + 1] + name[place] + name[place + 2 :],
        "double": name[: place + 1] + name[place:],
        "bare": name.replace("_", ""),
    }[how]
    told = names.lines(READS, {slipped: "1"}, {slipped: "1"})
    own = slipped in READS or (slipped in former.FORMER and not told)
    assert own or (told and slipped in told[0]) or elsewhere.of_a_library(slipped)


def test_a_setting_of_other_steps_is_told_and_ones_own_are_not() -> None:
    (line,) = names.lines(READS, {"SEEDS": "1 2", "RCE_LR": "1e-4", "V2_EPOCHS": "3", "PATH": "/bin"}, {})
    assert "SEEDS, V2_EPOCHS" in line and "read by no step" in line and "RCE_LR" not in line
    assert names.lines(READS, {"SEEDS": "", "PATH": "/bin", "SHELL": "x", "QWEN2_5_VL_3B_PATH": "/m"}, {}) == []


def test_an_unknown_name_of_dotenv_is_told_whatever_it_is() -> None:
    dotenv = {"FROBNICATE": "1", "HF_HOME": "/x", "QWEN2_5_VL_3B_PATH": "/m", "QWEN_PATH": "/m", "http_proxy": "p"}
    told = names.lines(READS, dotenv, dotenv)
    assert ["FROBNICATE" in told[0], "QWEN_PATH" in told[1], len(told)] == [True, True, 2]
    assert names.lines(READS, {"FROBNICATE": "1"}, {}) == []  # the environment is everybody's


def test_names_in_files_of_settings_are_closed() -> None:
    with pytest.raises(UsageError, match="SAMPEL_NUM is not a setting; did you mean SAMPLE_NUM"):
        names.check_file({"RCE_LR": 1, "SAMPEL_NUM": 5}, "x.yaml")


def test_a_misspelt_name_in_a_data_sets_yaml_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (config.CONFIG_DIR / "dataset" / "mini_okvqa.yaml").read_text(encoding="utf-8")
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path)
    (tmp_path / "dataset").mkdir()
    for old, new, says in (("SAMPLE_NUM", "SAMPEL_NUM", "SAMPLE_NUM"), ("settings:", "setings:", "settings")):
        for file in ("mini_okvqa", "okvqa_local"):
            (tmp_path / "dataset" / f"{file}.yaml").write_text(source.replace(old, new), encoding="utf-8")
        with pytest.raises(UsageError, match=says):
            load(STAGE_SETTINGS["generate_data"], {}, {"DATASET": "mini_okvqa"})
    assert {"settings", "stand_in", "clip"} <= set(catalog.KEYS)


# ---- the original Lever-Plus's names ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "made"),
    [
        ({"RCE_TEMP_START": "0.5", "RCE_TEMP_END": "0.1"}, {"rce_tau_start": 0.5, "rce_tau_end": 0.1}),
        ({"CLIP_EPSILON": "0.3"}, {"eps_low": 0.3, "eps_high": 0.3}),
        ({"USE_PPO_CLIP_ONLY": "true", "KL_BETA": "0.0"}, {"kl_beta": 0.0}),
        ({"RCE_USE_NORMALIZED_REWARD": "true"}, {"rce_rewards": "zscore"}),
        ({"RCE_USE_RAW_REWARD": "true", "HARD_WEIGHT": "1.0", "SOFT_WEIGHT": "1"}, {"rce_rewards": "raw"}),
        ({"REWARD_MODE": "hard_plus_soft_v2"}, {"reward_mode": "separated"}),
        ({"FREEZE_BACKBONE_IN_GRPO": "false", "REQUIRE_POSITIVE_QUERY": "false", "USE_RANK_ADVANTAGE": "false",
          "SKIP_FALLBACK_REWARD": "true"}, {}),
        ({"GPU_ID": "[4]"}, {"gpu_id": "4"}),
        ({"GPU_ID": "[0,1]"}, {"gpu_id": "0,1"}),
        ({"GPU_ID": "cuda:2"}, {"gpu_id": "2"}),
        ({"BEAM_MODEL": "qwen2_5_vl_3B"}, {"beam_model": "qwen2.5_vl_3B"}),
    ],
)  # fmt: skip
def test_names_of_the_same_meaning_are_taken_over(given_: dict, made: dict) -> None:
    loaded = load(V3, {}, {"DATASET": "mini_okvqa", **given_})
    default = load(V3, {}, {"DATASET": "mini_okvqa"})
    changed = {k: v for k, v in vars(loaded).items() if v != vars(default)[k]}
    assert changed == {k: v for k, v in made.items() if v != vars(default)[k]}
    assert {k: getattr(loaded, k) for k in made} == made


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("USE_RANK_ADVANTAGE", "true", "ADVANTAGE_SCALE"),
        ("FREEZE_BACKBONE_IN_GRPO", "true", "KL_BETA"),
        ("REQUIRE_POSITIVE_QUERY", "true", "RL_DATA_PATH"),
        ("SKIP_FALLBACK_REWARD", "false", "left out"),
        ("HARD_WEIGHT", "2.0", "REWARD_MODE"),
        ("SOFT_WEIGHT", "0.5", "REWARD_MODE"),
        ("REL_WEIGHT", "0.1", "relevance"),
        ("REWARD_MODE", "legacy", "REWARD_MODE=plan"),
        ("REWARD_MODE", "hard_plus_gtprob_plus_rel", "gt_prob"),
        ("BEAM_MODEL", "flamingo_3B", "qwen2.5_vl_3B"),
        ("LEVER_LM_MODEL_TYPE", "v4_2", "v4"),
    ],
)
def test_names_of_another_meaning_are_refused_with_what_to_use(name: str, value: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as error:
        load(V3, {}, {"DATASET": "mini_okvqa", name: value})
    assert name in str(error.value) and value in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("env", "line"),
    [({"RCE_TEMP_START": "1", "RCE_TAU_START": "2"}, "RCE_TAU_START=2 is set too"),
     ({"CLIP_EPSILON": "0.2", "PPO_CLIP_RATIO": "0.3"}, "PPO_CLIP_RATIO=0.3 means .* CLIP_EPSILON=0.2 is set too"),
     ({"RCE_USE_RAW_REWARD": "1", "RCE_USE_NORMALIZED_REWARD": "1"}, "RCE_USE_RAW_REWARD=1 is set too"),
     ({"CLIP_EPSILON": "-1"}, r"EPS_LOW=-1 \(from CLIP_EPSILON=-1\) is not allowed: number"),
     ({"NORMALIZE_METHOD": "minmax"}, "NORMALIZE_METHOD=minmax .*: set RCE_REWARDS"),
     ({"USE_PPO_CLIP": "maybe"}, "USE_PPO_CLIP=maybe .*: it takes true | ")],
)  # fmt: skip
def test_names_of_the_original_are_refused_by_the_name_that_was_set(env: dict[str, str], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        load(V3, {}, {"DATASET": "mini_okvqa", **env})


@pytest.mark.parametrize("stage", sorted(STAGE_SETTINGS))
def test_every_former_name_is_taken_over_told_or_refused(stage: str) -> None:
    """With any value: a change that is told, a refusal, a note, or what happens anyway."""
    reads = names.fields_of([STAGE_SETTINGS[stage]])
    for name, entry in former.FORMER.items():
        for value in ("true", "false", "0.25", "1.0", "v4_2"):
            told = names.lines(reads, {name: value}, {})
            try:
                made = former.translate({name: value}, reads)
            except UsageError:
                continue
            harmless = value.lower() in entry.values and not entry.values[value.lower()]
            assert told or harmless, (name, value)
            assert set(made) <= {name} or ("is read as" in told[0] and set(made) <= names.known()), (name, value)


@pytest.mark.parametrize("value", ["foo", "RCE_EPOCHS=3", "0 1", "0;1", "-1", "1.5", "gpu0", ","])
def test_what_is_no_gpus_number_is_refused_on_every_machine(value: str) -> None:
    with pytest.raises(UsageError, match="GPU_ID=.* is not allowed: the number of a GPU"):
        load(V3, {}, {"DATASET": "mini_okvqa", "GPU_ID": value})


@pytest.mark.parametrize("name", ["TEST_DATA_NUM", "CHOICE_QUERIES"])
def test_no_queries_at_all_are_refused_before_the_first_step(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}=0 is not allowed: whole number >= -1, not 0"):
        load(INFERENCE, {}, {"DATASET": "mini_okvqa", name: "0"})
    assert getattr(load(INFERENCE, {}, {"DATASET": "mini_okvqa", name: "-1"}), name.lower()) == -1
