"""metrics.json's numbers against hand-computed ones."""

import numpy as np
import pytest

from lever_plus.experiments.samples import Samples
from lever_plus.experiments.stats import Resampling
from lever_plus.stages.inference_metrics import official_results, summarize, table
from open_mmicl.errors import DamagedInputError

ANSWERS = ["red"] * 10


def line(
    question: int, method: str, shot: int, score: float, seed: int | None = None, icds: tuple = (), answer: str = "x"
) -> dict:
    return {
        "question_id": question, "image_id": question // 2, "method": method, "shot": shot, "seed": seed,
        "score": score,
        "icd_answers": list(icds), "answers": ANSWERS, "answer": answer, "cut_answer": answer,
    }  # fmt: skip


@pytest.fixture
def samples() -> Samples:
    rows = []
    for q in range(4):
        rows += [
            line(q, "v3", 1, [1, 1, 0.3, 0][q], None, ("red",), "red"),
            line(q, "v2", 1, [1, 0, 0.3, 0][q], None, ("blue",), "red"),
        ]
        rows += [
            line(q, "random", 1, [0, 0.6, 0, 0][q], 0, ("green",)),
            line(q, "random", 1, [1, 0, 0, 0][q], 1, ("x",)),
        ]
        rows.append(line(q, "zero_shot", 0, 0.3))
    return Samples(rows)


def test_accuracies_are_means_in_points_and_random_is_averaged_over_seeds(samples) -> None:
    metrics = summarize(samples, Resampling(1000))
    accuracy = metrics["accuracy"]
    assert accuracy["v3"]["1"] == pytest.approx(100 * 2.3 / 4) and accuracy["v2"]["1"] == pytest.approx(100 * 1.3 / 4)
    assert accuracy["random"]["1"] == pytest.approx(100 * 1.6 / 8)
    assert metrics["random_sd"]["1"] == pytest.approx(100 * np.std([0.15, 0.25], ddof=1))
    assert accuracy["oracle"]["1"] == pytest.approx(100 * 2.3 / 4)  # best of v3, v2 and both random seeds
    assert accuracy["majority_vote_v3"]["1"] == 100 and accuracy["majority_vote_v2"]["1"] == 0
    assert metrics["copy_rate"]["v3"]["1"] == 100 and metrics["copy_rate"]["v2"]["1"] == 0
    assert metrics["copy_rate"]["random"]["1"] == 50 and metrics["icds_hold_answer"]["random"]["1"] == 0


def test_comparisons_are_paired_and_zero_shot_meets_every_shot(samples) -> None:
    found = {(c["a"], c["b"], c["shot"]): c for c in summarize(samples, Resampling(1000))["comparisons"]}
    assert found["v3", "v2", 1]["diff"] == pytest.approx(25.0) and found["v3", "v2", 1]["n"] == 4
    assert found["v3", "zero_shot", 1]["diff"] == pytest.approx(100 * (2.3 / 4 - 0.3))
    assert ("v3", "similarity", 1) not in found


def test_the_order_of_the_lines_does_not_matter(samples) -> None:
    shuffled = Samples([samples.rows[i] for i in np.random.default_rng(0).permutation(len(samples.rows))])
    a, b = summarize(samples, Resampling(1000))["accuracy"], summarize(shuffled, Resampling(1000))["accuracy"]
    assert {m: {k: pytest.approx(v) for k, v in by.items()} for m, by in a.items()} == b


def test_a_method_that_misses_a_query_is_an_error(samples) -> None:
    with pytest.raises(DamagedInputError, match="v2, shot 1 has 3 of the run's 4 queries"):
        summarize(Samples([s for s in samples.rows if (s["method"], s["question_id"]) != ("v2", 3)]), Resampling(1000))


def test_official_files_and_table(samples) -> None:
    files = official_results(samples)
    assert set(files) == {
        "vqa_result_v3_shot1.json", "vqa_result_v2_shot1.json", "vqa_result_zero_shot_shot0.json",
        "vqa_result_random_shot1_seed0.json", "vqa_result_random_shot1_seed1.json",
    }  # fmt: skip
    assert files["vqa_result_v3_shot1.json"][0] == {"question_id": 0, "answer": "red"}
    text = table({**summarize(samples, Resampling(1000))})
    assert "v3 - v2, shot 1: +25.0" in text and "57.5" in text
