"""From v3's settings to groups, options and phases."""

import math
from functools import partial

from lever_plus import paths, provenance
from lever_plus.data import channel_names
from lever_plus.data.channels import Tables, load_tables
from lever_plus.data.rl_data import RlData, load_rl_data
from lever_plus.rl.groups import Groups, build_groups, split
from lever_plus.rl.objectives import GrpoObjective, KlControl, RceObjective
from lever_plus.rl.online import OnlineRounds, Responder
from lever_plus.rl.rewards import RewardRule, reward
from lever_plus.rl.trainer import Options, Phase, Trainer
from lever_plus.selectors import PointerSelector
from lever_plus.settings.selector import TrainV3Settings
from lever_plus.stages import training_inputs
from open_mmicl.errors import UsageError

SCRATCH_DECAY, SCRATCH_BATCH = 50.0, 32  # START_DECAY of a selector that starts from scratch, and the batch it is for


def reward_rule(settings: TrainV3Settings) -> RewardRule:
    """The reward that the settings ask for."""
    s = settings
    return RewardRule(s.reward_mode, s.reward_alpha, s.reward_beta, s.reward_correctness, s.reward_shot_cost)


def read_groups(settings: TrainV3Settings, stop: bool = False) -> tuple[RlData, tuple[Groups, Groups], str, Tables]:
    """(the RL data, (training groups, validation groups), where the image ids come from, the embeddings).

    ``stop``: whether the policy may stop.
    """
    tables = load_tables(channel_names.table_files(settings), None)
    rows = len(tables.candidates)
    path = paths.rl_data(settings)
    beam_data = None if settings.rl_data_path else paths.beam_data(settings)
    data = load_rl_data(path, rows, beam_data if beam_data is not None and beam_data.is_file() else None)
    rule = partial(reward, rule=reward_rule(settings))
    groups = build_groups(data, tables.candidates, rule, f"RL data {path}", tables.queries, stop)
    images, images_from = training_inputs.image_ids(settings, rows)
    return data, split(groups, images, settings.val_fraction, settings.data_seed), images_from, tables


def start_decay(settings: TrainV3Settings) -> float:
    """START_DECAY, or where it is left to this project: what was measured to be best (results/LOG.md).

    It grows with the root of the batch: Adam's steps are all of one size, those of smaller batches point less in one
    direction, and the same pull would hold the weights nearer to their start.
    """
    if settings.start_decay >= 0:
        return settings.start_decay
    if settings.sft_ckpt != training_inputs.SCRATCH:
        return 0.0
    return SCRATCH_DECAY * math.sqrt(settings.batch_size / SCRATCH_BATCH)


def options(settings: TrainV3Settings, data: RlData) -> Options:
    """How to train."""
    return training_inputs.options(
        settings,
        batch_size=settings.batch_size,
        start_decay=start_decay(settings),
        warmup_steps=settings.warmup_steps,
        patience=settings.patience,
        keep_checkpoints=settings.keep_checkpoints,
        val_tau=settings.rce_tau_end,
        provenance={**provenance.provenance(), "prompt_order": data.prompt_order, "rl_data_form": data.form},
    )


def build(
    settings: TrainV3Settings, sft: PointerSelector, trainer: Trainer, responder: Responder | None
) -> list[Phase]:
    """RCE, then GRPO.

    Raises:
        UsageError: GRPO_MODE=online without anything that answers.
    """
    s = settings
    rce = RceObjective(s.rce_tau_start, s.rce_tau_end, s.rce_objective, s.rce_rewards)
    kl = KlControl(s.kl_beta, s.kl_adaptive, s.kl_target)
    weigh_kl = s.kl_estimator == "weighted" or (s.kl_estimator == "auto" and s.grpo_mode != "online")
    grpo = GrpoObjective(kl, s.grpo_mode, s.advantage_scale, s.eps_low, s.eps_high, s.exact_kl == "pool", weigh_kl)
    reference = None
    if s.kl_ref == "sft":
        reference = PointerSelector(sft.config)
        reference.load_state_dict(sft.state_dict(), strict=True)
    refresh = None
    if s.is_online:
        if responder is None:
            raise UsageError("GRPO_MODE=online needs the LVLM: run it through bash scripts/train_v3.sh")
        refresh = OnlineRounds(
            trainer.train,
            responder,
            partial(reward, rule=reward_rule(s)),
            trainer.state_folder,
            trainer.processes,
            samples=s.online_samples,
            temperature=s.online_temperature,
            epochs_per_round=s.online_epochs,
            seed=s.seed,
        )
    # GRPO at a constant rate overfits the scored pointers' noise and ends below its own best (docs/training.md).
    auto = s.lr_schedule == "auto"
    schedules = {"rce": "constant", "grpo": "linear"} if auto else dict.fromkeys(("rce", "grpo"), s.lr_schedule)
    return [
        Phase("rce", s.rce_epochs, s.rce_lr, rce, lr_schedule=schedules["rce"]),
        Phase("grpo", s.grpo_epochs, s.grpo_lr, grpo, reference, refresh, schedules["grpo"]),
    ]
