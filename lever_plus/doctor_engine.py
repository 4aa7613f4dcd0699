"""The doctor's questions to the loaded model: is the fast path exact, do answers depend on others, how fast is it."""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lever_plus.devices import matmul_rate, synchronise
from lever_plus.stages.flops import Architecture
from open_mmicl.engine import Engine, GenerationSettings, Reply
from open_mmicl.errors import NumericError
from open_mmicl.interface import load_interface
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.prompts import Prompt

EXACT = {"cpu": 1e-4, "cuda": 1e-3}  # between log-probabilities of the two paths in fp32
SAME = 1e-4  # between scores of one prompt asked in different company
Asked = Sequence[Sequence[tuple[str, bool]]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two sides of the same questions: the largest difference between log-probabilities, answers that differ."""

    largest: float
    answers: int
    prompts: int

    def words(self) -> str:
        """In words."""
        return f"log-probabilities within {self.largest:.1e}, {self.answers} of {self.prompts} answers differ"


def difference(some: Sequence[Reply], others: Sequence[Reply]) -> Difference:
    """Compare replies to the same questions; scores that are -inf on both sides are equal."""
    pairs = [(a.log_prob, b.log_prob) for x, y in zip(some, others, strict=True) for a, b in zip(x.scores, y.scores, strict=True)]  # fmt: skip  # noqa: E501
    largest = max((abs(a - b) for a, b in pairs if a != b), default=0.0)
    return Difference(largest, sum(x.text != y.text for x, y in zip(some, others, strict=True)), len(some))


def load(cfg: InferModelConfig, device: str, precision: str) -> Any:
    """The model's wrapper for both paths; the naive one then asks one prompt at a time.

    Raises: as :func:`open_mmicl.interface.load_interface`.
    """
    return load_interface(dataclasses.replace(cfg, naive_batch=1), device, precision)


def server(cfg: InferModelConfig) -> tuple[list[str], dict[str, Any]]:
    """Who answers and what it can, as lines and as found; asks the trial prompts.

    Raises: as :meth:`open_mmicl.server.engine.ServerEngine.load`.
    """
    engine = Engine.load(cfg)
    found = engine.said()
    engine.close()
    who = ", ".join(f"{key} {value}" for key, value in found["facts"].items() if value)
    can = found["can"]
    return [
        f"{cfg.model_name_or_path} on {engine.device} ({who or 'says nothing of itself'})",
        f"log-probabilities: {can['scores']}; beam search: {'yes' if can['beams'] else 'no'}; images: {can['images']}",
    ], found


def shown_prompt(lvlm: Any, prompt: Prompt, answer: str) -> list[str]:
    """The prompt as the chat template writes it, and the tokens that are scored as its answer, decoded.

    Raises:
        NumericError: they decode to something else.
    """
    ids = lvlm.layout.answer_ids(answer)
    decoded = lvlm.tokenizer.decode(list(ids), skip_special_tokens=False)
    if decoded.strip() != answer.strip():
        raise NumericError(f"the scored span decodes to {decoded!r}, not to the answer {answer!r}")
    text = lvlm.layout.text(prompt)
    return [*text.splitlines(), f"scored as its answer: {len(ids)} token(s) that decode to {decoded!r}"]


def exactness(lvlm: Any, prompts: Sequence[Prompt], asked: Asked, generation: GenerationSettings, budget: int) -> tuple[Difference, Engine]:  # fmt: skip  # noqa: E501
    """The fast path against transformers' own forward pass and ``generate``, one prompt at a time.

    Returns: (what differs, the fast engine). Asked first: the fast path changes the model's patch projection.
    """
    truth = Engine(lvlm, "naive", None, budget, 0).ask(prompts, generation, asked, "transformers alone")
    fast = Engine(lvlm, "fast", None, budget, 0)
    return difference(truth, fast.ask(prompts, generation, asked, "fast path")), fast


def promise(lvlm: Any, fast: Engine, prompts: Sequence[Prompt], asked: Asked, generation: GenerationSettings) -> dict[str, Difference]:  # fmt: skip  # noqa: E501
    """Whether a prompt's answer and scores depend on the other prompts of a call, their order, or the cache."""
    together = fast.ask(prompts, generation, asked)
    alone = [fast.ask([p], generation, [a])[0] for p, a in zip(prompts, asked, strict=True)]
    backwards = fast.ask(prompts[::-1], generation, asked[::-1])[::-1]
    with tempfile.TemporaryDirectory(prefix="lever_doctor_") as folder:
        cached = Engine(lvlm, "fast", Path(folder) / "answers.sqlite", fast.token_budget, 0)
        cached.ask(prompts[::3], generation, asked[::3])
        filled = cached.ask(prompts, generation, asked)
        cached.close()
    return {
        "alone": difference(together, alone),
        "in reverse order": difference(together, backwards),
        "with every third in the cache": difference(together, filled),
    }


def speed(fast: Engine, prompts: Sequence[Prompt], asked: Asked, generation: GenerationSettings, sizes: Architecture | None) -> dict[str, float]:  # fmt: skip  # noqa: E501
    """Prompts, tokens and operations per second over these prompts, and the share of the machine's matmul rate.

    Images count as encoded afresh; ``sizes`` None: no operations.
    """
    stats = dataclasses.replace(fast.stats)
    started = time.perf_counter()
    fast.ask(prompts, generation, asked, "speed")
    synchronise(fast.device)
    seconds = time.perf_counter() - started
    tokens = fast.stats.tokens_computed - stats.tokens_computed
    found = {"prompts_per_second": len(prompts) / seconds, "tokens_per_second": tokens / seconds}
    if sizes is not None:
        images = fast.stats.images_encoded - stats.images_encoded
        lengths = fast.lvlm.prompt_lengths(list(prompts))
        visual = images * sum(lengths) / max(1, sum(len(p.images) for p in prompts))
        done = sizes.decoder(tokens, sum(lengths) / len(lengths), len(prompts)) + sizes.vision(visual)
        matmul = matmul_rate(fast.device, fast.lvlm.model.dtype)
        found |= {"flops": done / seconds, "matmul_flops": matmul, "share": done / seconds / matmul}
    return found
