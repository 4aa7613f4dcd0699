"""In 16 bit an answer and a score depend on the prompt alone: on a deep, narrow model with a vocabulary of real size.

Depth and random weights multiply every rounding, so that a pass of another shape gives other answers.
"""

import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from open_mmicl import beam
from open_mmicl.engine import Engine, GenerationSettings
from open_mmicl.engine_fixed import FixedRunner
from open_mmicl.interface.prompts import Prompt
from tests.open_mmicl.test_engine import ANSWERS, WORKER
from tests.reference import tiny_lvlm
from tests.reference.naive_lvlm import NaiveLvlm

BEAMS = GenerationSettings(num_beams=3, length_penalty=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of the model, prompts, (answer, end) pairs of each, replies to all at once)."""
    root = tmp_path_factory.mktemp("deep")
    folder = tiny_lvlm.make_folder(root / "model", num_hidden_layers=24, vocab_size=151_936)
    prompts = list(dict.fromkeys(tiny_lvlm.make_prompts(tiny_lvlm.make_images(root / "images", 9), 24, seed=3)))
    rng = random.Random(5)
    asked = [[(a, rng.random() < 0.5) for a in rng.sample(ANSWERS, rng.randint(1, 3))] for _ in prompts]
    return folder, prompts, asked, engine(folder).ask(prompts, BEAMS, asked)


def engine(folder: Path, cache: Path | None = None, **changes: object) -> Engine:
    config = tiny_lvlm.make_config(folder, **{"dtype": "bf16", **changes})
    return Engine.load(config, device="cpu", cache_path=cache)


def test_company_order_caches_and_what_else_is_asked_do_not_matter(world, tmp_path) -> None:
    folder, prompts, asked, whole = world
    assert len({reply.text for reply in whole}) > 10 and len(prompts) > 20
    subject = engine(folder, kv_cache_mb=1, image_cache_mb=1)
    assert isinstance(subject._runner, FixedRunner) and not any(subject._runner._place_matters.values())
    some = random.Random(1).sample(range(len(prompts)), 6)
    assert [subject.ask([prompts[i]], BEAMS, [asked[i]])[0] for i in some] == [whole[i] for i in some]
    assert [reply.scores for reply in subject.ask(prompts[:10], None, asked[:10])] == [r.scores for r in whole[:10]]
    pairs = [(i, pair) for i in some for pair in asked[i]]
    alone = subject.ask([prompts[i] for i, _ in pairs], None, [[pair] for _, pair in pairs])
    assert [r.scores[0] for r in alone] == [whole[i].scores[asked[i].index(pair)] for i, pair in pairs]
    cached = engine(folder, tmp_path / "a.sqlite")
    for i in range(0, len(prompts), 7):
        cached.generate([prompts[i]], BEAMS)
    order = random.Random(2).sample(range(len(prompts)), len(prompts))
    mixed = cached.ask([prompts[i] for i in order], BEAMS, [asked[i] for i in order])
    assert mixed == [whole[i] for i in order]
    assert cached.stats.cache_hits == 0 and cached.stats.computed > len(prompts)  # scores were lacking everywhere


def test_two_processes_give_the_bits_of_one(world, tmp_path) -> None:
    folder, prompts, asked, whole = world
    root = Path(__file__).resolve().parents[2]
    worker = WORKER.replace("make_config(folder)", "make_config(folder, dtype='bf16')")
    said = json.dumps([asdict(BEAMS), [asdict(p) for p in prompts[:12]], asked[:12]])
    (tmp_path / "said.json").write_text(said)
    command = [sys.executable, "-c", worker, str(root), str(folder), str(tmp_path / "pair.sqlite")]
    pair = []
    for _ in range(2):
        with (tmp_path / "said.json").open() as handle:
            pair.append(subprocess.Popen(command, cwd=root, stdin=handle, stdout=subprocess.PIPE, text=True))
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in pair]
    assert sum(computed for computed, _ in found) == 12
    assert [replies for _, replies in found] == [[asdict(reply) for reply in whole[:12]]] * 2


def test_memory_that_runs_out_changes_no_answer(world) -> None:
    folder, prompts, asked, whole = world
    subject = engine(folder)
    real = subject._runner._chains

    def tight(ends):
        if len(ends) > 5:
            raise torch.OutOfMemoryError("too much")
        return real(ends)

    subject._runner._chains = tight
    assert subject.ask(prompts[:8], BEAMS, asked[:8]) == whole[:8]


def test_rows_whose_place_matters_are_computed_alone(world) -> None:
    folder, prompts, asked, _ = world
    subject = engine(folder)
    subject._runner._try = lambda shape: True
    subject.ask(prompts[:3], BEAMS, asked[:3])
    assert subject._runner._place_matters and subject.stats.tokens_padded == subject.stats.tokens_computed


def test_the_budget_and_the_device_are_part_of_the_key_in_16_bit_only(world, tmp_path) -> None:
    folder, prompts, _, _ = world
    keys = {budget: engine(folder, token_budget=budget).key for budget in (700, 1500)}
    assert keys[700] != keys[1500] == engine(folder).key
    single = [engine(folder, dtype="fp32", token_budget=budget).key for budget in (700, 1500)]
    assert single[0] == single[1]
    first, second = (engine(folder, tmp_path / "b.sqlite", token_budget=budget) for budget in (700, 1500))
    for subject in (first, second):
        subject.generate(prompts[:2])
        assert (subject.stats.computed, subject.stats.cache_hits) == (2, 0)


def test_close_to_fp32(world) -> None:
    """16 bit is noise around fp32, and nothing else: scores within a small part of their spread."""
    folder, prompts, asked, whole = world
    truth = NaiveLvlm(folder, tiny_lvlm.make_config(folder).prompt_format)
    for prompt, pairs, reply in list(zip(prompts, asked, whole, strict=True))[:6]:
        for (answer, end), score in zip(pairs, reply.scores, strict=True):
            log_prob, ids = truth.score(prompt, answer, end)
            assert score.n_tokens == len(ids) and abs(score.log_prob - log_prob) < 0.1 * abs(log_prob)


def test_prefixes_are_held_within_their_budget(world) -> None:
    folder, prompts, _, _ = world
    subject = engine(folder)
    demos = sorted({demo for prompt in prompts for demo in prompt.demos}, key=str)
    query = prompts[0]
    one = [Prompt((demo,), query.image, query.question) for demo in demos]
    subject.score(one, [["red"]] * len(one))
    before = subject.stats.tokens_computed
    two = [Prompt((demo, demos[0]), query.image, query.question) for demo in demos[1:]]
    subject.score(two, [["red"]] * len(two))
    grown, fresh = subject.stats.tokens_computed - before, engine(folder)
    fresh.score(two, [["red"]] * len(two))
    assert grown < 0.8 * fresh.stats.tokens_computed  # the first demonstrations were held from the first call
    runner = engine(folder, kv_cache_mb=1)._runner
    assert subject._runner._held == sum(parts[0].shape[2] for parts in subject._runner._kv.values())
    subject._runner.prefix_budget = min(runner.prefix_budget, 60)
    subject._runner.forget()
    assert subject._runner._held <= 60


def test_of_equal_logits_the_lowest_id_is_taken() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0, 2.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [0.0] * 6])
    for count in (1, 2, 3, 4, 5, 6):
        found, places = beam.highest(values, count)
        for row in range(3):
            wanted = sorted(range(6), key=lambda i, row=row: (-values[row, i], i))[:count]
            assert places[row].tolist() == wanted and found[row].tolist() == values[row, wanted].tolist()
