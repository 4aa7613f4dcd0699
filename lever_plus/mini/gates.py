"""The benchmark's gates: is its in-context learning real, and does choosing demonstrations pay?

    python -m lever_plus.mini.gates [--n 400] [--dataset DIR]

measures the committed tiny models on the fixed world with transformers' own calls (the naive path, no cache), and
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
from scipy.stats import rankdata

from lever_plus.data.clip_features import ClipEncoder, combine_modalities
from lever_plus.mini.render import rng_for
from lever_plus.mini.table import N_WORDS, answer_text
from lever_plus.mini.vocabulary import TYPE_NAMES
from lever_plus.mini.world import annotations_file, generate, image_name, questions_file
from open_mmicl.arguments import Parser, whole
from open_mmicl.engine import Engine
from open_mmicl.errors import LeverError
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.prompts import Demo, Prompt
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


def load_lvlm(folder: Path) -> Engine:
    """The LVLM by transformers' own forward passes and ``generate``, nothing kept."""
    config = InferModelConfig(name=folder.name, model_name_or_path=str(folder), dtype="fp32", naive_batch=64)
    return Engine.load(config, device="cpu", mode="naive")


def log_prob(lvlm: Engine, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
    """Summed log-probability of each answer's tokens (end mark not counted), float [n]."""
    return np.array([scores[0].log_prob for scores in lvlm.score(prompts, [[answer] for answer in answers])])


def clip_embeddings(folder: Path, rows: Sequence[Row]) -> np.ndarray:
    """Mean of the unit image and question embeddings of each row, made unit again: float [n, d]."""
    encoder, paths = ClipEncoder(str(folder), "cpu", 256), sorted({row.image for row in rows})
    image_of = {path: i for i, path in enumerate(paths)}
    images = encoder.images(paths, "CLIP images")[[image_of[row.image] for row in rows]]
    features = {"image": images, "text": encoder.texts([row.question for row in rows], "CLIP questions")}
    return combine_modalities(features, "mean", "query_img_text_icd_img_text").numpy()


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
    lvlm = load_lvlm(lvlm_dir)

    def run(picks: Callable[[int], list[Demo]]) -> np.ndarray:
        prompts = [Prompt(tuple(reversed(picks(i))), row.image, row.question) for i, row in enumerate(queries)]
        return points(lvlm.generate(prompts), queries)

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
    zero_unknown = points(lvlm.generate([Prompt((), row.image, row.question) for row in unknown]), unknown)
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
    lvlm: Engine, queries: Sequence[Row], train: Sequence[Row], zero: np.ndarray, rng: np.random.RandomState
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
    base = log_prob(lvlm, [Prompt((), row.image, row.question) for row in wrong], truths[: len(wrong)])
    scores = log_prob(lvlm, prompts, truths) - np.concatenate([base, base])
    right = points(lvlm.generate(prompts), rows) > 0
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
