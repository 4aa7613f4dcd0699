"""Prefixes held between calls save tokens and change no bit; passes are cut where padding costs more than a pass."""

import random

import pytest

from open_mmicl.engine import Engine
from open_mmicl.interface.prompts import Prompt
from open_mmicl.prefix_tree import PASS_TOKENS, fill
from tests.reference import tiny_lvlm


def test_the_second_step_of_a_search_begins_with_the_firsts_demonstrations(tmp_path) -> None:
    folder = tiny_lvlm.make_folder(tmp_path / "model")
    prompts = tiny_lvlm.make_prompts(tiny_lvlm.make_images(tmp_path / "images", 9), 60)
    demos = sorted({demo for prompt in prompts for demo in prompt.demos}, key=str)
    query = prompts[0]
    one = [Prompt((demo,), query.image, query.question) for demo in demos]
    two = [Prompt((a, b), query.image, query.question) for a in demos for b in demos[:3] if a != b]

    def search(subject: Engine, grows: bool) -> tuple[list, int]:
        first = subject.score(one, [["red"]] * len(one), grows=grows)
        before = subject.stats.tokens_computed
        second = subject.score(two, [["red"]] * len(two))
        return [first, second], subject.stats.tokens_computed - before

    def engine(cache: str | None = None) -> Engine:
        return Engine.load(tiny_lvlm.make_config(folder), "cpu", cache_path=cache and tmp_path / cache)

    (held, few), (apart, many) = search(engine(), True), search(engine(), False)
    assert few < 0.9 * many
    for ours, theirs in zip([*held[0], *held[1]], [*apart[0], *apart[1]], strict=True):
        assert ours[0].log_prob == pytest.approx(theirs[0].log_prob, abs=1e-5)
    engine("cut.sqlite").score(one, [["red"]] * len(one), grows=True)
    resumed = engine("cut.sqlite")  # the first step comes from the cache, so nothing is held
    assert search(resumed, True)[0] == held and resumed.stats.cache_hits == len(one)


def test_passes_are_cut_at_the_cheapest_places() -> None:
    def cost(cut: list[list[int]]) -> int:
        return sum(len(some) * max(some) + PASS_TOKENS for some in cut)

    def every(lengths: list[int]) -> list[list[list[int]]]:
        if not lengths:
            return [[]]
        return [[lengths[:n], *rest] for n in range(1, len(lengths) + 1) for rest in every(lengths[n:])]

    rng = random.Random(0)
    for _ in range(30):
        lengths = sorted(rng.choices(range(1, 900), k=rng.randint(1, 9)))
        budget = rng.randint(500, 3000)
        allowed = [c for c in every(lengths) if all(len(s) == 1 or len(s) * max(s) <= budget for s in c)]
        found = fill(lengths, lengths, budget)
        assert found in allowed and cost(found) == min(map(cost, allowed))
    assert fill([], [], 100) == []
