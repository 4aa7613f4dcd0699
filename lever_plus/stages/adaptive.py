"""The methods of ICL inference that decide how many demonstrations a query gets, 0 to S: the policy (v3_adaptive), or
the LVLM's certainty of its answers (cascades, :mod:`lever_plus.experiments.cascade`).

Their picks are those of the fixed shots and their answers are theirs, so beside them and the zero-shot prompt
v3_adaptive asks the LVLM nothing new, and a cascade for the probability of each answer. Their rival is the best fixed
shot, chosen on held-out train queries, which are answered for that; a cascade's rule is chosen on the same.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lever_plus.data import methods as methods_table
from lever_plus.experiments import adaptive, cascade, stats
from lever_plus.settings.inference import InferenceSettings
from lever_plus.stages import cost, lvlm
from open_mmicl.errors import UsageError
from open_mmicl.lazy import lazy

checkpoint = lazy("lever_plus.selectors.checkpoint")
selectors = lazy("lever_plus.selectors")

METHOD = methods_table.ADAPTIVE
CHOICE_FILE = "choice_samples.jsonl"


def price(settings: InferenceSettings, methods: Sequence[str]) -> str:
    """What the choice of the best fixed shot and of the cascades' rules costs, for a dry run."""
    queries = "all" if settings.choice_queries < 0 else f"at most {settings.choice_queries}"
    fixed = {methods_table.fixed_of(method) for method in methods if methods_table.decides(method)}
    prompts = 1 + len(fixed) * settings.max_eval_shot
    cascades = sum(method in methods_table.CASCADES for method in methods)
    prompts += (1 + cascades * settings.max_eval_shot) if cascades else 0
    what = "the best fixed shot is chosen" + (", and when a cascade asks again" if cascades else "")
    return f"  and {queries} held-out train queries x {prompts} prompts, on which {what}"


def check(settings: InferenceSettings, methods: Sequence[str], v3: str) -> None:
    """See that the v3 checkpoint can stop, where it is asked to, and that lengths and probabilities are known.

    Raises:
        UsageError: not so. DamagedInputError, MissingInputError: see :func:`.checkpoint.load_selector`.
    """
    asked = [method for method in methods if methods_table.decides(method)]
    if METHOD in asked and not checkpoint.load_selector(Path(v3), selectors.PointerSelector).config.get("stop_shots"):
        raise UsageError(
            f"{METHOD}: {v3} was trained without STOP and always picks as many as it is asked for; train it with "
            f"STOP=1, or leave {METHOD} out of METHODS and unset STOP"
        )
    if asked and lvlm.model_config(settings).interface == "openai":
        told = ", ".join(asked) + (" reports" if len(asked) == 1 else " report")
        raise UsageError(
            f"{told} prompt tokens, which a server does not tell before it is asked: leave out of METHODS what decides "
            "how many demonstrations and unset STOP, or take a model that runs here"
        )


def with_lengths(
    answered: list[dict[str, Any]], wanted: Sequence[tuple[int, dict[str, Any]]], engine: Any, prompts: Sequence[Any]
) -> list[dict[str, Any]]:
    """The samples with ``prompt_tokens`` and, where the policy decided, P(STOP) before each pick (``stop_probs``)."""
    lengths = engine.lvlm.prompt_lengths(prompts)
    return [
        {**row, "prompt_tokens": int(tokens), **({"stop_probs": job["stop_probs"][q]} if "stop_probs" in job else {})}
        for row, tokens, (q, job) in zip(answered, lengths, wanted, strict=True)
    ]


def with_certainty(
    answered: list[dict[str, Any]], engine: Any, prompts: Sequence[Any], methods: Sequence[str]
) -> list[dict[str, Any]]:
    """The samples with ``answer_prob``, the LVLM's probability of the words that it answered, where a cascade among
    ``methods`` may take them. An answer that cannot be scored (empty) has probability 0.
    """
    fixed = {methods_table.fixed_of(m) for m in methods if m in methods_table.CASCADES}
    places = [i for i, row in enumerate(answered) if fixed and row["method"] in {*fixed, "zero_shot"}]
    scores = engine.score([prompts[i] for i in places], [[answered[i]["raw_answer"]] for i in places])
    found = {i: round(math.exp(score.log_prob), 6) for i, (score,) in zip(places, scores, strict=True)}
    return [{**row, "answer_prob": found[i]} if i in found else row for i, row in enumerate(answered)]


def metrics(
    settings: InferenceSettings, samples: Any, choice: Any, engine: Any, comparisons: list[dict[str, Any]]
) -> dict[str, Any]:
    """``adaptive`` and ``cascades``, where they were asked for, and the longer ``comparisons`` of metrics.json."""
    rate, drawn = tokens_per_second(settings, engine), stats.Resampling(settings.bootstrap, settings.data_seed)
    made: dict[str, Any] = {}
    own: list[dict[str, Any]] = []
    if METHOD in samples.methods:
        made["adaptive"] = adaptive.summarize(samples, choice, rate)
        own += adaptive.comparisons([samples], [made["adaptive"]["best_fixed"]["shot"]], drawn)
    for method in (m for m in methods_table.CASCADES if m in samples.methods):
        found = cascade.summarize(samples, choice, rate, method)
        made.setdefault("cascades", {})[method] = found
        own += adaptive.comparisons([samples], [found["best_fixed"]["shot"]], drawn, method)
    kept = ("a", "b", "shot", *(comparisons[0] if comparisons else own[0]))
    own = [{k: v for k, v in row.items() if k in kept} for row in own]
    return {**made, "comparisons": comparisons + own}


def as_text(found: dict[str, Any], method: str = METHOD) -> str:
    """The part of metrics.json about a method that decides how many, as lines for the terminal."""
    best = found["best_fixed"]
    lines = [
        f"{method} (0 to {found['shots']} demonstrations): {found['accuracy']:.1f}, best fixed shot {best['shot']} "
        f"{best['test_accuracy']:.1f} (chosen on {best['n_queries']} held-out train queries), zero-shot "
        f"{found['zero_shot']:.1f}, a perfect choice of the number {found['perfect_choice']:.1f}",
        f"  {found['mean_demonstrations']:.2f} demonstrations a query, none for {found['abstentions']:.0f} % of them",
    ]
    if "rule" in found:
        start, enough = found["rule"]["start"], found["rule"]["threshold"]
        lines.append(
            f"  from {start} demonstrations on, one more while the LVLM's probability of its answer is below "
            f"{enough:.2f}: {found['prompts']:.2f} prompts a query"
        )
    tokens, rate = found["prompt_tokens"], found["tokens_per_second"]
    mine = tokens[method][str(found["shots"])]
    fixed = tokens[methods_table.fixed_of(method)][str(best["shot"])]
    told = f"  {mine:.0f} prompt tokens a query, {fixed:.0f} with the best fixed number"
    if rate:
        told += f"; {1000 * mine / rate:.0f} ms against {1000 * fixed / rate:.0f} ms at the measured rate"
    lines.append(told)
    return "\n".join(lines)


def tokens_per_second(settings: InferenceSettings, engine: Any) -> float | None:
    """Prompt tokens a second in this model's generations on this device so far; None where none was measured."""
    measured = cost.rates_of(settings, engine.name, "generate")
    rates = [rate for device, rate in measured if engine.device.startswith(device)]
    seconds = sum(rate.seconds for rate in rates)
    return sum(rate.tokens for rate in rates) / seconds if seconds > 0 else None
