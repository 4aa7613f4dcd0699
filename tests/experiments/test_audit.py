"""The data audit against hand-counted data, and its warnings on data with planted faults."""

import numpy as np
import pytest

from lever_plus.data.rl_data import RlCandidate, RlData, RlQuery
from lever_plus.experiments import audit, findings, words
from lever_plus.rl.rewards import RewardRule
from open_mmicl.errors import DamagedInputError

POOL = np.arange(100, 108)


def candidate(pointer, correct, method="beam", rank=None, beam_score=0.0, logprob=-1.0, answer="dog", accuracy=None):
    score = float(correct) if accuracy is None else accuracy
    return RlCandidate(
        pointer, method, rank, beam_score, logprob, None, answer, int(correct), score, None, "vqa_official"
    )


def data_of(*groups, notes=()):
    return RlData([RlQuery(i, POOL, list(group)) for i, group in enumerate(groups)], "best_last", "local", list(notes))


HAND = data_of(
    [candidate((0, 1), 1, rank=0, beam_score=1.0), candidate((1, 0), 0, "sample", beam_score=2.0),
     candidate((2, 3), 0, "random", beam_score=-1.0)],
    [candidate((0, 2), 0, rank=0, beam_score=0.5), candidate((0, 3), 0, "sample", beam_score=0.5)],
    [candidate((0, 4), 1, rank=0, accuracy=0.3), candidate((4, 5), 1, "random", accuracy=1.0)],
    [candidate((0, 7), 0, rank=0)],
)  # fmt: skip


def test_hand_counted():
    found = audit.audit(HAND, RewardRule("plan", 0.5, 0.8, "pm1"))
    assert (found["n_queries"], found["n_pointers"], found["pool_size"], found["shots"]) == (4, 8, 8, 2)
    assert found["correct"]["all"] == {"n": 8, "correct": 37.5, "accuracy": pytest.approx(100 * 2.3 / 8)}
    assert found["correct"]["beam"]["correct"] == 50 and found["correct"]["random"]["n"] == 2
    assert found["queries"] == {"none": 50, "some": 25, "only": 25, "group_size": 2}
    assert found["per_query"]["counts"] == [2, 0, 0, 1, 0, 0, 0, 0, 0, 1] and found["per_query"]["edges"][-1] == 100
    # group 1: rewards 1.3, 0.2, -1.3; group 2: -0.55 twice; group 3: 0.8 twice; group 4: one member
    assert found["ties"] == {"zero_variance": 75, "single": 25, "tied_pairs": pytest.approx(100 * 2 / 5)}
    assert found["reward"]["max"] == pytest.approx(1.3) and found["reward"]["inverted"] == 0
    assert found["duplicates"] == {"exact": 0, "reordered": 12.5}
    assert found["positions"]["counts"] == [6, 2, 1, 1, 1, 0, 0, 1]
    assert found["oracle"]["own_choice"] == pytest.approx(100 * 1.3 / 4)
    assert found["oracle"]["best"] == pytest.approx(100 * 2.0 / 4)
    assert found["oracle"]["queries_with_better"] == 25
    assert found["scores"]["beam_score"]["auc"] == pytest.approx(0.5)  # 1.0 against 2.0 and -1.0
    assert "answers" not in found


def test_quality_can_overrule_correctness():
    found = audit.audit(HAND, RewardRule("plan", 4.0, 0.8, "pm1"))
    # 4 + 0.8 = 4.8 for the right one, 8 - 0.8 = 7.2 clipped to 5 and -4.8 for the wrong ones
    assert found["reward"]["inverted"] == 50
    assert found["reward"]["clipped"] == pytest.approx(100 / 8)


def test_rce_weights_by_hand():
    found = audit.audit(
        data_of([candidate((0, 1), 1), candidate((1, 2), 0)]), RewardRule("plan", 0.0, 0.8), taus=(2.0, 0.5)
    )
    on_wrong = [100 / (1 + np.exp(1.6 / tau)) for tau in (2.0, 0.5)]
    assert found["rce"]["on_wrong"] == pytest.approx(on_wrong)
    weights = np.array([1 - on_wrong[0] / 100, on_wrong[0] / 100])
    assert found["rce"]["effective"][0] == pytest.approx(1 / (weights**2).sum())


def test_histograms_count_everything_once():
    found = audit.audit(HAND, RewardRule())
    for histogram in found["histograms"].values():
        assert len(histogram["edges"]) == audit.BINS + 1
        assert sum(histogram["correct"]) == 3 and sum(histogram["wrong"]) == 5


def test_copy_rate_by_hand():
    answers = {100: "a dog", 101: "Dog.", 102: "cat", 103: "cat", 104: "emu", 105: "emu", 107: "cat"}
    found = audit.audit(HAND, RewardRule(), answer_of=answers.__getitem__)["answers"]
    # every answer is "dog"; shown in all pointers with 100 or 101: all but (2, 3) and (4, 5)
    assert found["copied"] == 75
    assert found["correct_if_copied"] == pytest.approx(100 * 2 / 6) and found["correct_if_not"] == 50


def test_plain_beam_data_is_refused():
    data = data_of([RlCandidate((0, 1), "beam", 0, 1.0)])
    with pytest.raises(DamagedInputError, match="plain beam data"):
        audit.audit(data, RewardRule())


def random_data(rng, queries=400, members=8, correct=0.4, position=None, knows=True):
    """Sound data: pointers anywhere, beam score that tells right from wrong."""
    groups = []
    for _ in range(queries):
        group = []
        for rank in range(members):
            ok = rng.random() < (correct if rank else min(1.0, correct + 0.1))
            pointer = (
                tuple(int(x) for x in rng.permutation(8)[:2])
                if position is None
                else (position, int(rng.choice([i for i in range(8) if i != position])))
            )
            method = "random" if rank == members - 1 else "beam"
            ok = ok and not (method == "random" and rng.random() < 0.6)
            score = float(rng.normal(0.8 * ok * knows, 0.8))
            group.append(
                candidate(
                    pointer, ok, method, rank if method == "beam" else None, score, answer=("dog" if ok else "no")
                )
            )
        groups.append({c.pointer: c for c in group}.values())
    return data_of(*groups)


def warned(data, rule=None, **kwargs):
    rule = rule or RewardRule("plan", 0.5, 0.8)
    return {f.key for f in findings.findings(audit.audit(data, rule, **kwargs), "en") if f.warning}


def test_sound_data_raises_no_warning():
    answers = {i: "dog" for i in POOL.tolist()}
    assert warned(random_data(np.random.default_rng(0)), answer_of=answers.__getitem__) == set()


@pytest.mark.parametrize(
    ("name", "change", "rule"),
    [
        ("amount", {"queries": 100}, None),
        ("correct", {"correct": 0.02}, None),
        ("kinds", {"correct": 0.01}, None),
        ("rce", {"correct": 0.03}, None),
        ("inverted", {"knows": False}, RewardRule("plan", 2.0, 0.2)),
        ("scale", {}, RewardRule("plan", 0.5, 0.0)),
        ("clipped", {}, RewardRule("plan", 5.0, 0.8)),
        ("quality", {"knows": False}, None),
        ("ties", {"correct": 0.01}, RewardRule("hard_only")),
        ("positions", {"position": 3}, None),
        ("oracle", {"members": 1}, None),
    ],
)
def test_planted_faults_are_warned_about(name, change, rule):
    assert name in warned(random_data(np.random.default_rng(1), **change), rule)


def test_notes_are_warned_about():
    data = random_data(np.random.default_rng(2))
    data.notes.append("repeated pointers left out: 7")
    found = [f for f in findings.findings(audit.audit(data, RewardRule()), "zh") if f.key == "notes"]
    assert found[0].warning and "7" in found[0].value


def test_every_finding_speaks_of_rce_and_grpo_in_both_languages():
    data = random_data(np.random.default_rng(3))
    data.notes.append("x")
    found = audit.audit(data, RewardRule(), answer_of=lambda _: "dog")
    both = [findings.findings(found, lang) for lang in ("zh", "en")]
    texts = list(words.texts("findings"))
    assert texts == list(findings.MAKERS) == [f.key for f in both[0]] == [f.key for f in both[1]]
    for chinese, english in zip(*both, strict=True):
        assert any("一" <= char <= "鿿" for char in chinese.meaning)
        assert not any("一" <= char <= "鿿" for char in english.meaning + english.value + english.name)
        for finding in (chinese, english):
            assert "RCE" in finding.meaning or "GRPO" in finding.meaning or "RL" in finding.meaning
            assert "{" not in finding.value + finding.threshold
