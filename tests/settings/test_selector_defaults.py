"""What auto means of the selector's shape and of what v2 imitates."""

import pytest

from lever_plus.settings.loading import load
from lever_plus.settings.selector import TrainV2Settings, TrainV3Settings
from open_mmicl.errors import UsageError


@pytest.mark.parametrize(
    ("given", "state", "credit"),
    [
        ({}, True, "all"),
        ({"V2_MODE": "labels"}, True, "all"),
        ({"V2_MODE": "lora"}, False, "first"),
        ({"V2_MODE": "v1"}, False, "first"),
        ({"QUERY_UPDATE_GATE": "1"}, False, "first"),
        ({"GRU_STATE": "true"}, False, "first"),
        ({"SUM_STATE": "0"}, False, "first"),
        ({"SUM_STATE": "AUTO", "V2_CREDIT": "first"}, True, "first"),
        ({"V2_MODE": "lora", "SUM_STATE": "1"}, True, "all"),
        ({"SUM_STATE": "off", "V2_CREDIT": "all"}, False, "all"),
    ],
)
def test_auto_is_what_held_out_train_queries_chose(given, state, credit):
    found = load(TrainV2Settings, {"DATASET": "mini_okvqa", **given}, {})
    assert (found.sum_state, found.v2_credit) == (state, credit)
    of_v3 = {name: value for name, value in given.items() if name != "V2_CREDIT"}
    assert load(TrainV3Settings, {"DATASET": "mini_okvqa", **of_v3}, {}).sum_state is state


def test_what_a_switch_with_a_further_word_takes():
    with pytest.raises(UsageError, match=r"SUM_STATE=maybe is not allowed: auto \| 0 \| 1"):
        load(TrainV2Settings, {"DATASET": "mini_okvqa", "SUM_STATE": "maybe"}, {})
