"""The method v3_adaptive of ICL inference: the policy decides how many demonstrations a query gets, 0 to S.

Its picks are those of the fixed shots and its answers are theirs, so beside them and the zero-shot prompt it asks the
LVLM nothing new. Its rival is the best fixed shot, chosen on held-out train queries, which are answered for that.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lever_plus.data import methods
from lever_plus.experiments import adaptive, stats
from lever_plus.settings.inference import InferenceSettings
from lever_plus.stages import cost, lvlm
from open_mmicl.errors import UsageError
from open_mmicl.lazy import lazy

checkpoint = lazy("lever_plus.selectors.checkpoint")
selectors = lazy("lever_plus.selectors")

METHOD = methods.ADAPTIVE
CHOICE_FILE = "choice_samples.jsonl"


def price(settings: InferenceSettings) -> str:
    """What the choice of the best fixed shot costs, for a dry run."""
    queries = "all" if settings.choice_queries < 0 else f"at most {settings.choice_queries}"
    prompts = settings.max_eval_shot + 1
    return f"  and {queries} held-out train queries x {prompts} prompts, on which the best fixed shot is chosen"


def check(settings: InferenceSettings, path: Path) -> None:
    """See that the v3 checkpoint can stop, and that the lengths of prompts are known.

    Raises:
        UsageError: not so. DamagedInputError, MissingInputError: see :func:`.checkpoint.load_selector`.
    """
    if not checkpoint.load_selector(path, selectors.PointerSelector).config.get("stop_shots"):
        raise UsageError(
            f"{METHOD}: {path} was trained without STOP and always picks as many as it is asked for; train it with "
            f"STOP=1, or leave {METHOD} out of METHODS and unset STOP"
        )
    if lvlm.model_config(settings).interface == "openai":
        raise UsageError(
            f"{METHOD} reports prompt tokens, which a server does not tell before it is asked: leave {METHOD} out of "
            "METHODS and unset STOP, or take a model that runs here"
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


def metrics(
    settings: InferenceSettings, samples: Any, choice: Any, engine: Any, comparisons: list[dict[str, Any]]
) -> dict[str, Any]:
    """``adaptive`` and the longer ``comparisons`` of metrics.json."""
    found = adaptive.summarize(samples, choice, tokens_per_second(settings, engine))
    drawn = stats.Resampling(settings.bootstrap, settings.data_seed)
    own = adaptive.comparisons([samples], [found["best_fixed"]["shot"]], drawn)
    kept = ("a", "b", "shot", *(comparisons[0] if comparisons else own[0]))
    own = [{k: v for k, v in row.items() if k in kept} for row in own]
    return {"adaptive": found, "comparisons": comparisons + own}


def as_text(found: dict[str, Any]) -> str:
    """The adaptive part of metrics.json as lines for the terminal."""
    best = found["best_fixed"]
    lines = [
        f"{METHOD} (0 to {found['shots']} demonstrations): {found['accuracy']:.1f}, best fixed shot {best['shot']} "
        f"{best['test_accuracy']:.1f} (chosen on {best['n_queries']} held-out train queries), zero-shot "
        f"{found['zero_shot']:.1f}, a perfect choice of the number {found['perfect_choice']:.1f}",
        f"  {found['mean_demonstrations']:.2f} demonstrations a query, none for {found['abstentions']:.0f} % of them",
    ]
    tokens, rate = found["prompt_tokens"], found["tokens_per_second"]
    mine, fixed = tokens[METHOD][str(found["shots"])], tokens["v3"][str(best["shot"])]
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
