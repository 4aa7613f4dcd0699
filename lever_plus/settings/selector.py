"""Settings of the selector's training: v2 (supervised on beams) and v3 (RCE, then GRPO)."""

from dataclasses import dataclass

from lever_plus.config import INPUT, PLACE, TOLD, setting
from lever_plus.registries import RCE_LOSSES, REWARDS, SCORERS
from lever_plus.settings.data import RlDataSettings
from lever_plus.settings.shared import BeamNames
from lever_plus.settings.word_lists import trackers


@dataclass(frozen=True)
class SelectorSettings(BeamNames):
    """The selector's shape (docs/training.md; every variant is an option of one class) and how it is trained."""

    num_layers: int = setting(1, "cross-attention layers of the query over the pool; 0: none (v1)", lo=0, hi=8)
    hidden_dim: int = setting(256, "width of the selector", lo=8, hi=8192)
    query_update_gate: bool = setting(
        False, "after each pick the query moves towards the picked candidate, through a gate"
    )
    gru_state: bool = setting(False, "the query state runs through a GRU over the picks")
    sum_state: bool | str = setting(
        "auto",
        "after each pick a learned projection of the picked candidate is added to the query, zero at first; auto: 1 "
        "with V2_MODE=frozen and labels, unless one of the two updates above is on",
        choices=("auto",),
    )
    mmr: bool = setting(False, "learned penalty on candidates like those picked (MMR)")
    scorer: str = setting("dot", "how query state and candidate are scored", choices=SCORERS)
    attn_bias: bool = setting(False, "biases in the cross-attention (files of the original Lever-Plus have them)")
    tied: bool = setting(
        False, "query and candidates share one projection (a symmetric similarity) instead of having one each"
    )
    encoder: str = setting(
        "towers",
        "of channels: a matrix each for queries and candidates (towers), or one for what both have (metric): it learns "
        "less of the train split's answers and keeps more of the similarity on answers that were never asked for",
        choices=("towers", "metric"),
        before="towers",
    )
    init: str = setting(
        "similarity",
        "first weights: score by similarity of the embeddings, or at random",
        choices=("similarity", "random"),
    )
    zero_stage: int = setting(0, "DeepSpeed ZeRO stage", lo=0, hi=3)
    precision: str = setting("auto", "data type of training; auto: fp32", choices=("auto", "fp32", "bf16"))
    weight_decay: float = setting(0.01, "AdamW's weight decay", lo=0)
    grad_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", lo=0)
    report_to: str = setting(
        "tensorboard",
        "where training curves and settings go: tensorboard, wandb, trackio, separated by commas; none",
        affects=TOLD,
        often=True,
    )
    image_ids_path: str = setting(
        "",
        "image id of every train item ([N] integers, .pt or .npy): the split by image; empty: the data set's",
        affects=INPUT,
    )
    query_emb_path: str = setting("", "embeddings [N, d] of the train items; empty: the standard file", affects=INPUT)

    @property
    def item_embeddings(self) -> str:
        """QUERY_EMB_PATH."""
        return self.query_emb_path

    def __post_init__(self) -> None:
        super().__post_init__()
        trackers(self.report_to)
        if self.sum_state == "auto":
            updated = self.query_update_gate or self.gru_state
            object.__setattr__(self, "sum_state", self.v2_mode in ("frozen", "labels") and not updated)


@dataclass(frozen=True)
class TrainV2Settings(SelectorSettings):
    """v2: supervised on the best beams."""

    v2_epochs: int = setting(20, "most epochs over the anchors", lo=1, hi=100_000, often=True)
    v2_lr: float = setting(5e-4, "learning rate of AdamW", lo=0, open_lo=True)
    v2_batch_size: int = setting(32, "anchor queries per optimiser step", lo=1)
    v2_beam_tau: float = setting(
        0.5, "temperature of the beams' weights, softmax(score / tau)", lo=0, open_lo=True, affects="v2.beams"
    )
    v2_patience: int = setting(5, "epochs without a better validation loss before training stops; 0: never", lo=0)
    v2_dropout: float = setting(0.1, "dropout while training", lo=0, hi=0.9)
    v2_start_decay: float = setting(
        0.0,
        "pull of the weights towards the first ones: each step closes LR x V2_START_DECAY of the distance; 0: none",
        lo=0,
    )
    v2_credit: str = setting(
        "auto",
        "what of a beam is imitated: all its picks, or the first only, the one that InfoScore says most about; auto: "
        "all where SUM_STATE lets a pick depend on those before it, else first; with STOP=1 always all, their number "
        "is what STOP learns from",
        choices=("auto", "all", "first"),
        affects="v2.beams",
    )
    v2_min_score: float = setting(
        -1e9,
        "anchors whose best beam has no higher InfoScore are left out: nothing is to be learned there but, with "
        "STOP=1, when to stop, so none is left out then",
        unit="nats",
        affects="v2.beams",
    )
    v2_select: str = setting(
        "auto",
        "how epochs are compared: loss on the held-out anchors, or labels: whether the first pick's own answer "
        "would be right, over all held-out train queries; auto: labels where the data set's annotations are read and "
        "STOP=0",
        choices=("auto", "loss", "labels"),
        affects="v2.beams",
    )
    beam_data_path: str = setting("", "beam data file; empty: the standard name", affects=INPUT)
    lora_rank: int = setting(8, "rank of the LoRA matrices (V2_MODE=lora)", lo=1, hi=1024, affects="v2.lora")
    lora_alpha: int = setting(16, "scale of the LoRA matrices (V2_MODE=lora)", lo=1, affects="v2.lora")
    lora_pool: int = setting(
        16,
        "candidates per anchor encoded in a training step, the beams' own among them (V2_MODE=lora)",
        lo=2,
        affects="v2.lora",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.v2_credit == "auto":
            object.__setattr__(self, "v2_credit", "all" if self.sum_state else "first")


@dataclass(frozen=True)
class TrainV3Settings(SelectorSettings):
    """v3: RCE, then GRPO, on RL data (docs/training.md)."""

    rl_data_path: str = setting("", "RL data file; empty: the standard name", affects=INPUT)
    sft_ckpt: str = setting(
        "", "selector to start from: a file, or the word scratch; empty: the v2 checkpoint", affects=INPUT
    )
    output_dir: str = setting("", "folder of the v3 checkpoints; empty: the standard name", affects=PLACE)
    tied: bool = setting(
        True,
        "from scratch: query and candidates share one projection (a symmetric similarity) instead of having one each; "
        "a selector from a file keeps its own",
    )
    start_decay: float = setting(
        -1.0,
        "pull of the weights towards the phase's first ones: each step closes LR x START_DECAY of the distance "
        "(decoupled, as AdamW's weight decay); 0: none; -1: 50 x sqrt(BATCH_SIZE / 32) for a selector from scratch, "
        "0 for one from a file",
        lo=-1,
    )
    rce_epochs: int = setting(5, "epochs of RCE", lo=0, hi=100_000, often=True)
    grpo_epochs: int = setting(10, "epochs of GRPO", lo=0, hi=100_000, often=True)
    rce_lr: float = setting(1e-4, "learning rate of RCE", lo=0, open_lo=True, often=True)
    grpo_lr: float = setting(1e-4, "learning rate of GRPO", lo=0, open_lo=True, often=True)
    batch_size: int = setting(32, "query groups per optimiser step, over all processes", lo=1, often=True)
    kl_beta: float = setting(0.05, "weight of the KL to the reference policy", lo=0, often=True)
    kl_ref: str = setting(
        "phase_start",
        "reference policy: the one the phase began with, or the SFT selector",
        choices=("phase_start", "sft"),
    )
    kl_estimator: str = setting(
        "auto",
        "k3 over the scored pointers: weighted as the policy would pick them, or the published plain mean, which holds "
        "for pointers drawn from the policy; auto: plain for GRPO_MODE=online, else weighted",
        choices=("auto", "weighted", "plain"),
    )
    kl_adaptive: bool = setting(
        False, "let KL_BETA follow KL_TARGET (doubled above 1.5 x, halved below 1 / 1.5 x, once an epoch)"
    )
    kl_target: float = setting(0.1, "KL aimed at with KL_ADAPTIVE=1", unit="nats", lo=0, open_lo=True)
    reward_mode: str = setting("plan", "how a pointer is rewarded", choices=REWARDS, often=True)
    reward_alpha: float = setting(0.5, "weight of the trajectory's quality, its beam score", lo=0, often=True)
    reward_beta: float = setting(0.8, "weight of correctness", lo=0, often=True)
    reward_correctness: str = setting("pm1", "correctness as -1/+1 or 0/1", choices=("pm1", "01"))
    reward_shot_cost: float = setting(
        0.0,
        "what a demonstration costs, for a policy that may stop (STOP=1)",
        unit="reward per demonstration",
        lo=0,
        before=0.0,
    )
    rce_objective: str = setting("ce", "RCE's loss", choices=RCE_LOSSES)
    rce_rewards: str = setting(
        "raw",
        "rewards of RCE's weights: as they are, z-scored or ranked within the group",
        choices=("raw", "zscore", "rank"),
    )
    rce_tau_start: float = setting(2.0, "temperature of RCE's weights at the first step", lo=0, open_lo=True)
    rce_tau_end: float = setting(0.5, "temperature of RCE's weights at the last step", lo=0, open_lo=True)
    grpo_mode: str = setting(
        "clipped",
        "clipped: the plan's form; exact: the group as a fully observed bandit; online: fresh pointers answered by the "
        "LVLM",
        choices=("clipped", "exact", "online"),
        often=True,
    )
    advantage_scale: str = setting(
        "group", "advantages divided by the group's std, the batch's, or nothing", choices=("group", "batch", "none")
    )
    eps_low: float = setting(0.2, "ratio clip below 1", lo=0, hi=1)
    eps_high: float = setting(0.2, "ratio clip above 1", lo=0)
    exact_kl: str = setting(
        "scored",
        "GRPO_MODE=exact: KL over the scored pointers, or over the whole pool at each step",
        choices=("scored", "pool"),
    )
    online_samples: int = setting(12, "fresh pointers per query and round, GRPO_MODE=online", lo=2, hi=1024)
    online_temperature: float = setting(1.0, "sampling temperature of fresh pointers", lo=0, open_lo=True)
    online_epochs: int = setting(2, "epochs of updates on each round's fresh pointers, GRPO_MODE=online", lo=1)
    rl_rounds: int = setting(1, "rounds of RL data: from the second on, made by the improved policy", lo=1, hi=1000)
    lr_schedule: str = setting(
        "auto",
        "learning rate over a phase; auto: constant in RCE, falling linearly to 0 in GRPO",
        choices=("auto", "constant", "linear", "cosine"),
    )
    warmup_steps: int = setting(
        0, "optimiser steps over which the learning rate rises at a phase's start", unit="steps", lo=0
    )
    patience: int = setting(0, "epochs without a better validation metric before a phase stops; 0: never", lo=0)
    checkpoint_metric: str = setting(
        "scored",
        "by what the epochs of v3 are compared on held-out train queries: scored, the expected accuracy over the "
        "pointers that RL data hold, which costs no prompt; answers, the accuracy of the policy's own picks with 1 to "
        "RL_SHOT demonstrations, which the LVLM answers after each epoch and which alone sees picks that nobody scored",
        choices=("scored", "answers"),
        before="scored",
    )
    keep_checkpoints: int = setting(
        0, "newest checkpoints kept per phase, the best always besides; 0: all", lo=0, affects=PLACE
    )

    @property
    def is_online(self) -> bool:
        """Whether the LVLM answers fresh pointers while GRPO trains."""
        return self.grpo_mode == "online" and self.grpo_epochs > 0


@dataclass(frozen=True)
class OnlineSettings(TrainV3Settings, RlDataSettings):
    """v3's settings and those of asking the LVLM (GRPO_MODE=online)."""
