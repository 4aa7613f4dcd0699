"""What experiments would cost: ``--dry-run`` lists the steps, the price of each, and what of it is there already."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lever_plus import paths
from lever_plus.cli import log
from lever_plus.data import methods
from lever_plus.experiments.arms import Arm
from lever_plus.experiments.prices import fair_rivals
from lever_plus.experiments.runner import Runner
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from lever_plus.settings.selector import OnlineSettings, TrainV3Settings
from lever_plus.stages import cost, work


def print_tree(runner: Runner, arms: Mapping[str, Sequence[Arm]]) -> int:
    """The whole plan as a tree with costs. Returns 0."""
    s = runner.settings
    below = "if 1 and 2 are clearly below v2: 4a, 4b"
    tree = [
        "5   audit of the RL data; no LVLM, seconds",
        "1   RCE alone",
        f"├── v3 - v2 > -{s.delta:g} points: 3",
        f"└── else: 2; {below}; then 3",
        "3   RCE and GRPO against 1: the verdict on GRPO",
        "    then the fair rival against the best recipe by validation",
    ]
    lines = [_head(runner), *_data(runner), "tree:", *(f"  {line}" for line in tree), "arms:"]
    lines += [_arm(runner, arm) for group in arms.values() for arm in group]
    lines += [_evaluation(runner), *_rivals(runner), *_totals(runner, arms)]
    log.info("\n".join(lines))
    return 0


def print_arms(runner: Runner, arms: Mapping[str, Sequence[Arm]]) -> int:
    """One experiment with its costs; without arms, the audit. Returns 0."""
    lines = [_head(runner), *_data(runner)]
    lines += [_arm(runner, arm) for group in arms.values() for arm in group]
    lines.append(_evaluation(runner) if arms else "  audit of the RL data; no LVLM, seconds")
    log.info("\n".join(lines))
    return 0


def _head(runner: Runner) -> str:
    s = runner.settings
    queries = f"{s.test_data_num:,}" if s.test_data_num > 0 else "all"
    return (
        f"dry run: {s.dataset}, seeds {' '.join(map(str, runner.seeds))}, {queries} queries, delta {s.delta:g} points"
    )


def _data(runner: Runner) -> list[str]:
    s = runner.settings
    sizes = cost.sizes(s)
    beam, rl = (cost.price(s, step, sizes) for step in (work.beam_data(s), work.rl_data(s)))
    beams = [
        f"  beam data (v2): {beam.prompts:,} LVLM prompts{_there(paths.beam_data(s))}",
        f"    {cost.operations_line(beam.operations, cost.cards(s))}",
    ]
    return [
        *([] if s.v2_mode == "labels" else beams),
        f"  RL data (v3): at most {rl.prompts:,} LVLM prompts{_there(paths.rl_data(s))}",
        f"    {cost.operations_line(rl.operations, cost.cards(s))}",
        f"  {cost.image_memory_line(s, rl, sizes)}",
    ]


def _rl_prompts(runner: Runner) -> int:
    step = work.rl_data(runner.settings)
    return step.queries * step.per_query


def _arm(runner: Runner, arm: Arm) -> str:
    s, given, steps = runner.settings, {**arm.settings, **arm.overridden}, _steps(runner, arm)
    done = sum((paths.inference_dir(s, arm.run_name(seed)) / "metrics.json").is_file() for seed in runner.seeds)
    told = ", ".join(f"{name}={value}" for name, value in given.items())
    asked = _training_prompts(runner, arm)
    training = f" and at most {asked:,} LVLM prompts" if asked else ""
    return (
        f"  {arm.name}: {told}\n    a seed: {steps:,} optimiser steps{training}, {s.max_eval_shot} LVLM prompts per "
        f"evaluated query; {done} of {len(runner.seeds)} seeds there"
    )


def _training_prompts(runner: Runner, arm: Arm) -> int:
    """What a seed of an arm asks the LVLM while it trains: fresh pointers, picks on held-out queries."""
    own = load(OnlineSettings, {}, {**runner.env, **arm.environment(runner.seeds[0])})
    return sum(step.queries * step.per_query for step in work.training(own))


def _evaluation(runner: Runner) -> str:
    told = f"  v2 and baselines: {_once(runner)} LVLM prompts per evaluated query, once"
    return told + "; repeated ones come from the answer cache"


def _totals(runner: Runner, arms: Mapping[str, Sequence[Arm]]) -> list[str]:
    """What the shortest and the longest way through the tree cost from nothing."""
    s, more = runner.settings, _more_anchors(runner)
    data = (_anchors(runner) + (more or 0)) * _per_anchor(runner) + _rl_prompts(runner)
    lines = []
    for name, way in (("shortest", ("1", "3")), ("longest", ("1", "2", "4a", "4b", "3"))):
        walked = [arm for experiment in way for arm in arms[experiment]]
        steps = len(runner.seeds) * sum(_steps(runner, arm) for arm in walked)
        asked = _asked(runner, walked, more is not None)
        trained = len(runner.seeds) * sum(_training_prompts(runner, arm) for arm in walked)
        evaluated = f"{asked * s.test_data_num:,}" if s.test_data_num > 0 else f"{asked} per evaluated query"
        lines.append(
            f"  in all, {name} way ({', '.join(way)}): at most {data + trained:,} LVLM prompts for data and "
            f"{evaluated} for evaluation, {steps:,} optimiser steps"
        )
    return lines


def total(runner: Runner, arms: Sequence[Arm], sizes: cost.Sizes, rival: bool) -> tuple[int, float | None]:
    """(LVLM prompts, operations) of arms with all their seeds from nothing: data, evaluation, and the fair rival's data
    with ``rival``. Operations are None where the model's sizes are not known.
    """
    s = runner.settings
    beam, rl = (cost.price(s, step, sizes) for step in (work.beam_data(s), work.rl_data(s)))
    one = cost.price(s, _evaluated(runner, methods.SELECTORS[:1]), sizes)
    asked = _asked(runner, arms, rival) * one.queries
    more = (_more_anchors(runner) or 0) * _per_anchor(runner) if rival else 0
    trained = len(runner.seeds) * sum(_training_prompts(runner, arm) for arm in arms)
    searched = beam.prompts if _anchors(runner) else 0
    prompts = searched + rl.prompts + trained + more + asked
    if beam.operations is None or rl.operations is None or one.operations is None:
        return prompts, None
    of_beam, of_one = (part.operations / max(1, part.prompts) for part in (beam, one))
    return prompts, rl.operations + (searched + more) * of_beam + (trained + asked) * of_one


def _anchors(runner: Runner) -> int:
    """Anchors that v2 is trained on: none where it learns from annotations alone."""
    return 0 if runner.settings.v2_mode == "labels" else runner.settings.sample_num


def _steps(runner: Runner, arm: Arm) -> int:
    own = load(TrainV3Settings, {}, {**runner.env, **arm.environment(runner.seeds[0])})
    return (own.rce_epochs + own.grpo_epochs) * -(-runner.settings.rl_query_num // own.batch_size)


def _asked(runner: Runner, arms: Sequence[Arm], rival: bool) -> int:
    """LVLM prompts per evaluated query of arms with all their seeds, the fair rival, v2 and the baselines."""
    return runner.settings.max_eval_shot * (len(arms) * len(runner.seeds) + rival) + _once(runner)


def _more_anchors(runner: Runner) -> int | None:
    """The fair rival's anchors beyond v2's, with which they begin (their answers are cached); None without a rival."""
    rival = _rival_anchors(runner).get(runner.settings.rival)
    return None if rival is None else max(0, rival["anchors"] - runner.settings.sample_num)


def _per_anchor(runner: Runner) -> int:
    return work.beam_data(runner.settings).per_query


def _once(runner: Runner) -> int:
    """LVLM prompts of v2 and the baselines per evaluated query."""
    return _evaluated(runner).per_query


def _evaluated(runner: Runner, also: Sequence[str] = ()) -> work.Work:
    """An evaluation of what is the same for every arm, and of the methods ``also``."""
    own = load(InferenceSettings, {}, {**runner.env, "EXP_NAME": "any"})
    once = [name for name in methods.chosen(own) if name != "v3" and not methods.decides(name)]
    return work.inference(own, [*also, *once])


def _rival_anchors(runner: Runner) -> dict[str, dict[str, int]]:
    return fair_rivals(runner.settings, {"rl_data": _rl_prompts(runner), "training": 0})


def _rivals(runner: Runner) -> list[str]:
    chosen = {kind: "run" if kind == runner.settings.rival else "not run" for kind in ("prompts", "queries")}
    return [
        f"  fair rival, v2 on as many {kind}: {r['anchors']:,} anchors, {r['prompts']:,} LVLM prompts ({chosen[kind]})"
        for kind, r in _rival_anchors(runner).items()
    ]


def _there(path: Path) -> str:
    return " (there)" if path.is_file() else ""
