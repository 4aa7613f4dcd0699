"""The benchmark's gates: is its in-context learning real, and does choosing demonstrations pay?

    python -m lever_plus.mini.gates [--n 400] [--dataset DIR]

measures the committed tiny models on the fixed world with plain transformers calls (no engine, no cache), and
prints a table. All accuracies are official VQA accuracies in points (0-100).
"""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import rankdata
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lever_plus.mini.render import rng_for
from lever_plus.mini.table import N_WORDS, answer_text
from lever_plus.mini.vocabulary import TYPE_NAMES
from lever_plus.mini.world import annotations_file, generate, image_name, questions_file
from open_mmicl.arguments import Parser, whole
from open_mmicl.errors import LeverError
from open_mmicl.interface.prompts import Demo, Prompt, PromptFormat
from open_mmicl.metrics.vqa import vqa_accuracy

WEIGHTS = Path(__file__).parent / "weights"
POOL = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One question with its hidden truth; ``answers`` are the ten annotators'."""

    image: str
    question: str
    answers: tuple[str, ...]
    shape: str
    color: str
    kind: str
    compositional: bool
    known: bool
    truth: str
    misleading: bool = False

    def demo(self, answer: str | None = None) -> Demo:
        """The row as a demonstration; ``answer`` replaces the true one."""
        return Demo(self.image, self.question, self.truth if answer is None else answer)

    def matches(self, other: "Row") -> bool:
        """Whether ``other`` shows this row's (shape, type) pair, and its answer."""
        return self.shape == other.shape and self.kind == other.kind and not other.misleading


def load_rows(folder: Path, split: str) -> list[Row]:
    """The split's questions (official files) joined with ``truth.json``."""
    questions = json.loads((folder / questions_file(split)).read_text())["questions"]
    notes = json.loads((folder / annotations_file(split)).read_text())["annotations"]
    truths = json.loads((folder / "truth.json").read_text())["questions"]
    rows = []
    for question, note in zip(questions, notes, strict=True):
        truth = truths[str(question["question_id"])]
        rows.append(
            Row(
                image=str(folder / "mscoco2014" / f"{split}2014" / image_name(split, question["image_id"])),
                question=question["question"],
                answers=tuple(answer["answer"] for answer in note["answers"]),
                shape=truth["shape"],
                color=truth["color"],
                kind=truth["type"],
                compositional=truth["compositional"],
                known=truth["known"],
                truth=truth["answer"],
                misleading=truth.get("misleading", False),
            )
        )
    return rows


class NaiveLvlm:
    """The LVLM by plain transformers calls: template, expanded image tokens, pixels, one forward or generate."""

    def __init__(self, folder: Path, batch: int = 64) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.format, self.batch = PromptFormat(), batch
        self._pixels: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def _picture(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        if path not in self._pixels:
            with Image.open(path) as image:
                out = self.processor(images=[image.convert("RGB")], return_tensors="pt")
            self._pixels[path] = (out["pixel_values"], out["image_grid_thw"])
        return self._pixels[path]

    def inputs(self, prompts: Sequence[Prompt], answers: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        """Model inputs, left-padded; with ``answers`` the assistant's answer and its end mark are appended."""
        pictures = [self._picture(path) for prompt in prompts for path in prompt.images]
        merged = self.processor.merge_size**2
        counts = iter([int(grid.prod()) // merged for _, grid in pictures])
        texts = []
        for index, prompt in enumerate(prompts):
            messages = self.format.messages(prompt)
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            head, *tails = text.split("<|image_pad|>")
            text = head + "".join("<|image_pad|>" * next(counts) + tail for tail in tails)
            texts.append(text if answers is None else f"{text}{answers[index]}<|im_end|>")
        self.tokenizer.padding_side = "left"
        encoded = self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        return {
            "input_ids": encoded["input_ids"],
            "attention_mask": encoded["attention_mask"],
            "mm_token_type_ids": (encoded["input_ids"] == self.model.config.image_token_id).int(),
            "pixel_values": torch.cat([pixels for pixels, _ in pictures]),
            "image_grid_thw": torch.cat([grid for _, grid in pictures]),
        }

    def _batches(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].demos))
        return [order[i : i + self.batch] for i in range(0, len(order), self.batch)]

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], num_beams: int = 3) -> list[str]:
        """Generated answers, with the benchmark's generation settings."""
        out = [""] * len(prompts)
        for rows in self._batches(prompts):
            inputs = self.inputs([prompts[i] for i in rows])
            self.model.model.rope_deltas = None
            ids = self.model.generate(
                **inputs, num_beams=num_beams, max_new_tokens=5, length_penalty=0.0, do_sample=False
            )
            texts = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                out[row] = text.strip()
        return out

    @torch.inference_mode()
    def log_prob(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """Summed log-probability of each answer's tokens (end mark not counted), float [n]."""
        out = np.zeros(len(prompts))
        for rows in self._batches(prompts):
            inputs = self.inputs([prompts[i] for i in rows], [answers[i] for i in rows])
            self.model.model.rope_deltas = None
            log_probs = self.model(**inputs).logits[:, :-1].log_softmax(-1)
            picked = log_probs.gather(2, inputs["input_ids"][:, 1:, None])[..., 0]  # [b, L - 1]
            for place, row in enumerate(rows):
                length = len(self.tokenizer(answers[row], add_special_tokens=False).input_ids)
                out[row] = picked[place, -1 - length : -1].sum().item()
        return out


@torch.inference_mode()
def clip_embeddings(folder: Path, rows: Sequence[Row]) -> np.ndarray:
    """Mean of the unit image and question embeddings of each row, made unit again: float [n, d]."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    processor = CLIPImageProcessorPil.from_pretrained(folder)

    def unit(output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(output, dim=-1)

    paths, questions = sorted({row.image for row in rows}), sorted({row.question for row in rows})
    texts = unit(model.get_text_features(**tokenizer(questions, padding=True, return_tensors="pt")).pooler_output)
    blocks = []
    for start in range(0, len(paths), 256):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + 256]]
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        blocks.append(unit(model.get_image_features(pixel_values=pixels).pooler_output))
    pictures = torch.cat(blocks)
    image_of, text_of = ({name: i for i, name in enumerate(names)} for names in (paths, questions))
    both = pictures[[image_of[row.image] for row in rows]] + texts[[text_of[row.question] for row in rows]]
    return unit(both).numpy()


def oracle_picks(query: Row, candidates: Sequence[Row], shots: int, rng: np.random.RandomState) -> list[int]:
    """The best ``shots`` candidates by the hidden truth, best first: those that show the pair, and for a
    compositional question next one that shows the colour's adjective. Where all is shown, further full matches,
    then random ones, and a compositional demonstration of another shape or colour (it would distract) last.
    """

    def gain(row: Row, needs: frozenset[str]) -> float:
        if row.kind != query.kind:
            return 0.0
        if row.misleading:
            return -2.0
        shows = {name for name in ("shape", "color") if getattr(row, name) == getattr(query, name)}
        if query.compositional and not shows & needs:
            return 1.0 if len(shows) == 2 else -1.0
        return len(shows & needs) + (0.5 if "shape" in shows else 0.0)

    needs = frozenset({"shape", "color"} if query.compositional else {"shape"})
    order, picks = list(rng.permutation(len(candidates))), []
    for _ in range(shots):
        best = max(order, key=lambda i: gain(candidates[i], needs))
        order.remove(best)
        picks.append(int(best))
        if candidates[best].kind == query.kind:
            needs -= {name for name in ("shape", "color") if getattr(candidates[best], name) == getattr(query, name)}
    return picks


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve of ``scores`` for boolean ``labels``; ties count half."""
    positive = int(labels.sum())
    negative = len(labels) - positive
    return float((rankdata(scores)[labels].sum() - positive * (positive + 1) / 2) / (positive * negative))


def points(answers: Sequence[str], rows: Sequence[Row]) -> np.ndarray:
    """Official accuracy of each answer, in points."""
    return np.array([100 * vqa_accuracy(text, list(row.answers)) for text, row in zip(answers, rows, strict=True)])


def measure(
    folder: Path, n: int = 400, seed: int = 0, lvlm_dir: Path = WEIGHTS / "lvlm", clip_dir: Path = WEIGHTS / "clip",
    shots: Sequence[int] = (1, 2),
) -> dict[str, float]:  # fmt: skip
    """Every number of the gates on ``n`` validation queries of the dataset in ``folder`` (``zero_shot_unknown`` on
    all that ask for an unknown plain pair); accuracies in points.

    Demonstrations are drawn by ``seed``; they stand best last (next to the query).
    """
    torch.set_num_threads(1)
    train, val = load_rows(folder, "train"), load_rows(folder, "val")
    rng = rng_for("gates", seed)
    chosen = np.sort(rng.permutation(len(val))[:n])
    queries = [val[i] for i in chosen]
    pools = np.stack([rng.permutation(len(train))[:POOL] for _ in queries])  # [n, 64]
    lvlm = NaiveLvlm(lvlm_dir)

    def run(picks: Callable[[int], list[Demo]]) -> np.ndarray:
        prompts = [Prompt(tuple(reversed(picks(i))), row.image, row.question) for i, row in enumerate(queries)]
        return points(lvlm.answer(prompts), queries)

    def mislead(row: Row) -> Demo:
        match = train[oracle_picks(row, train, 1, rng)[0]]
        kind = TYPE_NAMES.index(row.kind)
        allowed = [answer_text(kind, w, a) for w in range(N_WORDS) for a in range(N_WORDS if row.compositional else 1)]
        wrong = [answer for answer in allowed if answer not in row.answers]
        if row.compositional:
            wrong = [answer for answer in wrong if not set(answer.split()) & set(row.truth.split())]
        return match.demo(wrong[rng.randint(len(wrong))])

    embeddings = clip_embeddings(clip_dir, [*queries, *train])
    cosine = np.einsum("nd,npd->np", embeddings[:n], embeddings[n:][pools])  # [n, 64]
    nearest = np.argsort(-cosine, axis=1, kind="stable")
    match = np.array([[row.matches(train[j]) for j in pool] for row, pool in zip(queries, pools, strict=True)])
    zero = run(lambda i: [])
    unknown = [row for row in val if not row.known and not row.compositional]  # all of them: few pairs, cheap prompts
    zero_unknown = points(lvlm.answer([Prompt((), row.image, row.question) for row in unknown]), unknown)
    numbers: dict[str, float] = {
        "n": n,
        "pool_holds_match": 100 * match.any(1).mean(),
        "random_matches": 100 * match.mean(),
        "cosine_matches": 100 * np.take_along_axis(match, nearest[:, :1], 1).mean(),
        "zero_shot": zero.mean(),
        "zero_shot_unknown": zero_unknown.mean(),
        "misleading": run(lambda i: [mislead(queries[i])]).mean(),
        "misleading_share": 100 * np.mean([row.misleading for row in train]),
    }
    compositional = np.array([row.compositional for row in queries])
    for k in shots:
        conditions = {
            "random": run(lambda i, k=k: [train[j].demo() for j in pools[i, :k]]),
            "cosine": run(lambda i, k=k: [train[pools[i, j]].demo() for j in nearest[i, :k]]),
            "pool_oracle": run(
                lambda i, k=k: [
                    train[pools[i, j]].demo() for j in oracle_picks(queries[i], [train[p] for p in pools[i]], k, rng)
                ]
            ),
            "oracle": run(lambda i, k=k: [train[j].demo() for j in oracle_picks(queries[i], train, k, rng)]),
        }
        numbers |= {f"{name}_{k}": scores.mean() for name, scores in conditions.items()}
        numbers[f"pool_oracle_or_none_{k}"] = np.maximum(conditions["pool_oracle"], zero).mean()
        numbers[f"oracle_{k}_plain"] = conditions["oracle"][~compositional].mean()
        if compositional.any():
            numbers[f"oracle_{k}_compositional"] = conditions["oracle"][compositional].mean()
    numbers |= infoscore(lvlm, queries, train, zero, rng)
    return {name: round(float(value), 4) for name, value in numbers.items()}


def infoscore(
    lvlm: NaiveLvlm, queries: Sequence[Row], train: Sequence[Row], zero: np.ndarray, rng: np.random.RandomState
) -> dict[str, float]:
    """InfoScore of one matching and one random demonstration for each query that zero-shot gets wrong, and how
    well it tells which of them make the answer right (AUC).
    """
    wrong = [row for row, score in zip(queries, zero, strict=True) if score == 0]
    demos = [train[oracle_picks(row, train, 1, rng)[0]].demo() for row in wrong]
    demos += [train[rng.randint(len(train))].demo() for _ in wrong]
    rows = wrong + wrong
    prompts = [Prompt((demo,), row.image, row.question) for demo, row in zip(demos, rows, strict=True)]
    truths = [row.truth for row in rows]
    base = lvlm.log_prob([Prompt((), row.image, row.question) for row in wrong], truths[: len(wrong)])
    scores = lvlm.log_prob(prompts, truths) - np.concatenate([base, base])
    right = points(lvlm.answer(prompts), rows) > 0
    return {
        "infoscore_match": scores[: len(wrong)].mean(),
        "infoscore_random": scores[len(wrong) :].mean(),
        "infoscore_auc": auc(scores, right),
        "infoscore_n": len(rows),
    }


#: name, the measured value of it, its threshold, and whether it must lie above (+1) or below (-1).
GATES: tuple[tuple[str, Callable[[dict[str, float]], float], float, int], ...] = (
    ("oracle - random, 1 shot", lambda m: m["oracle_1"] - m["random_1"], 40.0, 1),
    ("oracle - random, 2 shots", lambda m: m["oracle_2"] - m["random_2"], 40.0, 1),
    ("misleading demonstration", lambda m: m["misleading"], 10.0, -1),
    ("zero-shot, unknown plain pairs", lambda m: m["zero_shot_unknown"], 10.0, -1),
    ("cosine - random, 1 shot", lambda m: m["cosine_1"] - m["random_1"], 10.0, 1),
    ("oracle in the pool - cosine, 1 shot", lambda m: m["pool_oracle_1"] - m["cosine_1"], 20.0, 1),
    ("random pool of 64 holds a match", lambda m: m["pool_holds_match"], 75.0, 1),
    ("InfoScore AUC where zero-shot is wrong", lambda m: m["infoscore_auc"], 0.9, 1),
)


#: The same for a world whose train split misleads: no demonstrations are better than those that come to hand.
MISLEADING_GATES: tuple[tuple[str, Callable[[dict[str, float]], float], float, int], ...] = (
    ("zero-shot", lambda m: m["zero_shot"], 75.0, 1),
    ("zero-shot - random, 1 shot", lambda m: m["zero_shot"] - m["random_1"], 10.0, 1),
    ("zero-shot - random, 2 shots", lambda m: m["zero_shot"] - m["random_2"], 10.0, 1),
    ("zero-shot - cosine, 1 shot", lambda m: m["zero_shot"] - m["cosine_1"], 10.0, 1),
    ("zero-shot - cosine, 2 shots", lambda m: m["zero_shot"] - m["cosine_2"], 10.0, 1),
    ("oracle in the pool or none - zero-shot", lambda m: m["pool_oracle_or_none_1"] - m["zero_shot"], 2.0, 1),
)


def gates_of(numbers: dict[str, float]) -> tuple[tuple[str, Callable[[dict[str, float]], float], float, int], ...]:
    """The gates that the measured world must pass."""
    return MISLEADING_GATES if numbers.get("misleading_share") else GATES


def failed_gates(numbers: dict[str, float]) -> list[str]:
    """One line for each gate that does not hold."""
    return [
        f"{name}: {value(numbers):.2f}, must be {'>=' if side > 0 else '<='} {threshold:g}"
        for name, value, threshold, side in gates_of(numbers)
        if side * value(numbers) < side * threshold
    ]


def main(argv: list[str] | None = None) -> int:
    """Command line; exit code 0 if every gate holds, else 1."""
    parser = Parser(prog="python -m lever_plus.mini.gates", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=whole(1), default=400, help="validation queries (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="queries, pools and demonstrations (%(default)s)")
    parser.add_argument("--shots", type=whole(0, 8), nargs="+", default=[1, 2], help="numbers of demonstrations")
    parser.add_argument("--dataset", type=Path, help="a miniature dataset (default: the fixed one, regenerated)")
    parser.add_argument("--lvlm", type=Path, default=WEIGHTS / "lvlm", help="folder of the tiny LVLM")
    parser.add_argument("--clip", type=Path, default=WEIGHTS / "clip", help="folder of the tiny CLIP")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.dataset or Path(temporary) / "mini_okvqa"
            if args.dataset is None:
                generate(folder)
            numbers = measure(folder, args.n, args.seed, args.lvlm, args.clip, sorted({1, 2, *args.shots}))
    except LeverError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, value in numbers.items():
        print(f"{name:28s} {value:8.2f}")
    for name, value, threshold, side in gates_of(numbers):
        verdict = "ok  " if side * value(numbers) >= side * threshold else "FAIL"
        print(f"{verdict} {name:42s} {value(numbers):7.2f} {'>=' if side > 0 else '<='} {threshold:g}")
    return 1 if failed_gates(numbers) else 0


if __name__ == "__main__":
    sys.exit(main())
