"""Settings of ICL inference and of the record."""

from dataclasses import dataclass

from lever_plus.config import INPUT, PLACE, setting
from lever_plus.settings.data import RlDataSettings


@dataclass(frozen=True)
class InferenceSettings(RlDataSettings):
    """ICL inference: v3, v2 and the baselines on the same queries, shots 1 to MAX_EVAL_SHOT."""

    test_data_num: int = setting(
        200, "queries to evaluate; -1: all", lo=-1, not_zero=True, affects="inference", often=True
    )
    eval_split: str = setting(
        "val",
        "val: the validation queries; train_val: the part of the train split held out for model selection (for tuning)",
        choices=("val", "train_val"),
        affects="inference",
    )
    max_eval_shot: int = setting(
        4, "evaluate 1 to this many demonstrations", lo=1, hi=16, affects="inference", often=True
    )
    methods: str = setting(
        "auto",
        "what to compare, separated by spaces; auto: the selectors and every rival, with STOP=1 v3_adaptive too, with "
        "CASCADE=1 v3_cascade and those of v2, label and similarity (docs/evidence.md)",
        affects="inference",
        often=True,
    )
    cascade: bool = setting(
        False,
        "beside v3, v2, label and similarity their cascades: one demonstration more while the LVLM is unsure",
        affects="inference",
        before=False,
    )
    choice_queries: int = setting(
        200,
        "held-out train queries on which the best fixed number of demonstrations, the rival of v3_adaptive and of a "
        "cascade, and a cascade's rule are chosen; -1: all",
        lo=-1,
        not_zero=True,
        affects="adaptive",
    )
    random_seeds: int = setting(
        5, "random pointers per query for the random baseline", lo=1, hi=1000, affects="inference"
    )
    checkpoint_phase: str = setting(
        "auto",
        "v3 checkpoint: the best of all by the validation metric, or of one phase",
        choices=("auto", "rce", "grpo"),
        affects=INPUT,
        often=True,
    )
    lever_lm_checkpoint_path: str = setting(
        "",
        "v3 checkpoint to evaluate; empty: the best by the validation metric (CHECKPOINT_PHASE)",
        affects=INPUT,
        often=True,
    )
    v2_checkpoint_path: str = setting("", "v2 checkpoint to compare with; empty: the standard name", affects=INPUT)
    run_name: str = setting(
        "",
        "folder under icl_inference; empty: made from experiment, split and number of queries",
        is_name=True,
        affects=PLACE,
    )
    bootstrap: int = setting(10000, "bootstrap resamples of every interval", lo=1000, hi=1_000_000, affects="inference")
