"""One side of benchmarks/peers.sh: does the jobs and says how long they took.

    python -m benchmarks.sides ours|generic|batches|naive|vllm JOBS.json OUT.json

Runs in vLLM's own environment, too: nothing but the chosen side's library is imported. Loading and warming up are not
timed. An answer's score is the sum of its tokens' log-probabilities in fp32.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus.infoscore import beam_search
from open_mmicl.interface.prompts import Demo, Prompt, PromptFormat

BATCH = 16
NEW_TOKENS = 5


class Library:
    """Our engine, the same with the generic interface, its naive path, or transformers in batches sorted by length."""

    def __init__(self, side: str, jobs: dict[str, Any]):
        import torch

        from open_mmicl.engine import Engine, GenerationSettings
        from open_mmicl.interface import load_interface
        from open_mmicl.interface.config import InferModelConfig

        torch.set_num_threads(1)
        config = InferModelConfig(
            name="peer", model_name_or_path=jobs["model"], dtype=jobs["precision"], token_budget=2048,
            image_cache_mb=512, kv_cache_mb=256, interface="hf_chat" if side == "generic" else "qwen_vl",
        )  # fmt: skip
        self.lvlm, self.side = load_interface(config, "cpu"), side
        self.settings = GenerationSettings(NEW_TOKENS, 1)
        self.engine = Engine(self.lvlm, "naive" if side == "naive" else "fast", None, 0, 0)
        self.lvlm.full_logits = side == "naive"

    def ask(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[tuple[str, bool]]], generates: bool
    ) -> list[tuple[str, list[float]]]:
        """Texts ("" where none is wanted) and log-probabilities."""
        if self.side != "batches":
            replies = self.engine.ask(prompts, self.settings if generates else None, answers)
            return [(reply.text or "", [score.log_prob for score in reply.scores]) for reply in replies]
        lengths = self.lvlm.prompt_lengths(prompts)
        order = sorted(range(len(prompts)), key=lengths.__getitem__)
        texts, scores = [""] * len(prompts), [[0.0] * len(some) for some in answers]
        for start in range(0, len(order) if generates else 0, BATCH):
            some = order[start : start + BATCH]
            for i, text in zip(some, self.lvlm.generate_batch([prompts[i] for i in some], self.settings), strict=True):
                texts[i] = text
        for end in (False, True):
            flat = [(i, j) for i in order for j, pair in enumerate(answers[i]) if pair[1] == end]
            for start in range(0, len(flat), BATCH):
                some = flat[start : start + BATCH]
                found = self.lvlm.score_batch([prompts[i] for i, _ in some], [answers[i][j][0] for i, j in some], end)
                for (i, j), score in zip(some, found, strict=True):
                    scores[i][j] = score.log_prob
        return list(zip(texts, scores, strict=True))

    def work(self) -> tuple[int | None, float]:
        """(tokens, floating-point operations of the decoder's linear layers) so far."""
        if self.side not in ("ours", "generic"):
            return None, 0.0
        decoder = sum(p.numel() for p in self.lvlm.model.model.language_model.layers.parameters())
        return self.engine.stats.tokens_computed, 2.0 * decoder * self.engine.stats.tokens_computed

    def fewest(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[tuple[str, bool]]], texts: Sequence[str | None]
    ) -> tuple[int, int]:
        """Tokens of distinct beginnings, each once, and of whole prompts for everything asked of them.

        Generated tokens count in both, but for each text's last, which nothing is computed from.
        """
        seen: dict[tuple, int] = {}
        total, further = 0, {}
        for some, pieces, text in zip(answers, self.lvlm.pieces(prompts), texts, strict=True):
            behind_text = min(len(self.lvlm.layout.encode(text)), NEW_TOKENS - 1) if text is not None else 0
            further[tuple(piece.key for piece in pieces)] = behind_text
            for end in range(1, len(pieces) + 1):
                seen[tuple(piece.key for piece in pieces[:end])] = pieces[end - 1].length
            lengths = {(answer, end): len(self.lvlm.answer_ids(answer)) + end for answer, end in some}
            behind = {(answer, i) for (answer, _), length in lengths.items() for i in range(1, length)}
            seen.update({(tuple(piece.key for piece in pieces), place): 1 for place in behind})
            total += (len(some) + (text is not None)) * sum(piece.length for piece in pieces)
            total += sum(length - 1 for length in lengths.values()) + behind_text
        return sum(seen.values()) + sum(further.values()), total


class Vllm:
    """vLLM with its prefix cache; scores as log-probabilities of given tokens, one request a token."""

    def __init__(self, jobs: dict[str, Any]):
        from transformers import AutoTokenizer
        from vllm import LLM, SamplingParams

        from open_mmicl.interface.layout import PromptLayout

        self.parameters = SamplingParams
        self.llm = LLM(
            model=jobs["model"], dtype={"fp32": "float32", "bf16": "bfloat16"}[jobs["precision"]], max_model_len=4096,
            enable_prefix_caching=True, limit_mm_per_prompt={"image": 8, "video": 0}, seed=0, enforce_eager=True,
        )  # fmt: skip
        self.tokenizer = AutoTokenizer.from_pretrained(jobs["model"])
        image = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.layout = PromptLayout(self.tokenizer, self._render, PromptFormat(), image)
        self.images: dict[str, Any] = {}

    def _render(self, messages: list[dict], generation: bool) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)

    def _request(self, prompt: Prompt, more: Sequence[int]) -> dict[str, Any]:
        from PIL import Image

        for path in prompt.images:
            if path not in self.images:
                self.images[path] = Image.open(path).convert("RGB")
        ids = [*self.layout.encode(self.layout.text(prompt)), *more]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": [self.images[path] for path in prompt.images]}}

    def ask(
        self, prompts: Sequence[Prompt], answers: Sequence[Sequence[tuple[str, bool]]], generates: bool
    ) -> list[tuple[str, list[float]]]:
        """Texts and log-probabilities."""
        requests, parameters, places = [], [], []
        for i, prompt in enumerate(prompts):
            if generates:
                requests.append(self._request(prompt, ()))
                parameters.append(self.parameters(max_tokens=NEW_TOKENS, temperature=0))
                places.append((i, -1, 0))
            for j, (answer, end) in enumerate(answers[i]):
                ids = [*self.layout.answer_ids(answer), *self.layout.closing_ids(answer)[: int(end)]]
                for place, token in enumerate(ids):
                    requests.append(self._request(prompt, ids[:place]))
                    parameters.append(self.parameters(max_tokens=1, temperature=0, logprob_token_ids=[token]))
                    places.append((i, j, token))
        texts, scores = [""] * len(prompts), [[0.0] * len(some) for some in answers]
        for output, (i, j, token) in zip(self.llm.generate(requests, parameters, use_tqdm=False), places, strict=True):
            if j < 0:
                texts[i] = output.outputs[0].text
            else:
                scores[i][j] += output.outputs[0].logprobs[0][token].logprob
        return list(zip(texts, scores, strict=True))

    def work(self) -> tuple[int | None, float]:
        """Not counted."""
        return None, 0.0


def main(argv: list[str]) -> int:
    """Do the jobs of one side."""
    side, jobs_file, out = argv[0], Path(argv[1]), Path(argv[2])
    jobs = json.loads(jobs_file.read_text(encoding="utf-8"))
    subject: Any = Vllm(jobs) if side == "vllm" else Library(side, jobs)
    rows = jobs["rows"]

    def prompt(query: str, demos: Sequence[str]) -> Prompt:
        return Prompt(tuple(Demo(*rows[d]) for d in demos), rows[query][0], rows[query][1])

    first = jobs["a"][0]
    subject.ask([prompt(first["query"], first["pool"][:k]) for k in range(3)], [[("red", True)]] * 3, True)
    report = {"parts": {}, "matmul_flops": _matmul_rate(jobs["precision"]) if side == "ours" else 0.0}
    for part in "abc":
        report["parts"][part] = _measure(subject, jobs, part, prompt)
    out.write_text(json.dumps(report), encoding="utf-8")
    return 0


def _measure(subject: Any, jobs: dict[str, Any], part: str, prompt: Callable[..., Prompt]) -> dict[str, Any]:
    asked: list[tuple[Prompt, list]] = []
    note, texts, log_probs = asked.extend, [], []
    tokens, flops = subject.work()
    wall, cpu = time.perf_counter(), time.process_time()
    for job in jobs[part]:
        if part == "a":
            truth = [[(jobs["rows"][job["query"]][2], False)]]

            def score(contexts: Sequence[tuple[int, ...]], job: dict = job, truth: list = truth) -> np.ndarray:
                prompts = [prompt(job["query"], [job["pool"][i] for i in context]) for context in contexts]
                note([(p, truth[0]) for p in prompts])
                found = subject.ask(prompts, truth * len(prompts), False)
                return np.array([scores[0] for _, scores in found])

            texts += [str(beam.pointer) for beam in beam_search(score, len(job["pool"]), jobs["beams"], 2)]
            continue
        prompts = [prompt(job["query"], demos) for demos in job["demos"]]
        answers = [[tuple(pair) for pair in job.get("answers", [])]] * len(prompts)
        asked += list(zip(prompts, answers, strict=True))
        for text, scores in subject.ask(prompts, answers, True):
            texts.append(text.strip())  # vLLM keeps the blank that a first token may begin with
            log_probs += scores
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    after, operations = subject.work()
    fewest, naive = 0, 0
    if isinstance(subject, Library) and subject.lvlm.fast:
        fewest, naive = subject.fewest(*zip(*asked, strict=True), [None] * len(asked) if part == "a" else texts)
    return {
        "cpu": cpu, "wall": wall, "texts": texts, "log_probs": log_probs, "flops": operations - flops,
        "tokens": None if after is None else after - tokens, "fewest_tokens": fewest, "naive_tokens": naive,
    }  # fmt: skip


def _matmul_rate(precision: str) -> float:
    """Operations a second of a large product in fp32, or in bf16 where that is faster."""
    import torch

    rates = []
    for dtype in [torch.float32] + ([torch.bfloat16] if precision == "bf16" else []):
        matrix = torch.randn(1024, 1024).to(dtype)
        started = time.process_time()
        for _ in range(3):
            matrix @ matrix
        rates.append(3 * 2.0 * 1024**3 / (time.process_time() - started))
    return max(rates)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
