"""The engine equals transformers, whatever the batch, the order, the cache and the number of processes."""

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from open_mmicl import wide
from open_mmicl.engine import Engine, GenerationSettings
from open_mmicl.interface.prompts import Prompt
from tests.reference import tiny_lvlm
from tests.reference.naive_lvlm import NaiveLvlm

ANSWERS = ["red", "blue boat", "wooden", "two", "large metal fish"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of the model, prompts, answers of each prompt)."""
    root = tmp_path_factory.mktemp("lvlm")
    folder = tiny_lvlm.make_folder(root / "model")
    prompts = tiny_lvlm.make_prompts(tiny_lvlm.make_images(root / "images", 9), 60)
    rng = random.Random(5)
    answers = [rng.sample(ANSWERS, rng.randint(1, 4)) for _ in prompts]
    return folder, prompts, answers


def engine(folder: Path, mode: str = "fast", cache: Path | None = None, **changes: object) -> Engine:
    return Engine.load(tiny_lvlm.make_config(folder, **changes), device="cpu", mode=mode, cache_path=cache)


def log_probs(scores: list) -> list[float]:
    return [score.log_prob for row in scores for score in row]


def close(a: list, b: list, tolerance: float) -> bool:
    return torch.allclose(torch.tensor(log_probs(a)), torch.tensor(log_probs(b)), rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", ["fast", "naive"])
def test_scores_equal_transformers(world, mode) -> None:
    folder, prompts, answers = world
    subject, truth = engine(folder, mode), NaiveLvlm(folder, tiny_lvlm.make_config(folder).prompt_format)
    for end in (False, True):
        found = subject.score(prompts[:24], answers[:24], end=end)
        for prompt, some, scores in zip(prompts, answers, found, strict=False):
            for answer, score in zip(some, scores, strict=True):
                log_prob, ids = truth.score(prompt, answer, end)
                assert abs(score.log_prob - log_prob) <= 1e-4
                assert score.n_tokens == len(ids)


@pytest.mark.parametrize("mode", ["fast", "naive"])
@pytest.mark.parametrize("beams", [1, 3])
def test_answers_equal_transformers(world, mode, beams) -> None:
    folder, prompts, _ = world
    truth = NaiveLvlm(folder, tiny_lvlm.make_config(folder).prompt_format)
    found = engine(folder, mode).generate(prompts, GenerationSettings(num_beams=beams))
    assert found == [truth.generate(prompt, num_beams=beams) for prompt in prompts]
    assert len(set(found)) > 3 and len({len(text.split()) for text in found}) > 1


@pytest.mark.parametrize(("length_penalty", "steps", "beams"), [(0.0, 5, 3), (1.0, 7, 4), (-1.0, 3, 2), (0.0, 1, 3)])
def test_beam_search_equals_generate_over_settings(world, length_penalty, steps, beams) -> None:
    folder, prompts, _ = world
    settings = GenerationSettings(steps, beams, length_penalty)
    truth = NaiveLvlm(folder, tiny_lvlm.make_config(folder).prompt_format)
    wanted = [truth.generate(p, beams, steps, length_penalty) for p in prompts[:20]]
    assert engine(folder).generate(prompts[:20], settings) == wanted


@pytest.mark.skipif(not wide.has_onednn(), reason="this build of torch has no oneDNN")
def test_products_by_onednn_are_the_same_function(world, monkeypatch) -> None:
    """Few rows with a large weight, here of any size."""
    folder, prompts, answers = world
    plain = engine(folder).ask(prompts[:12], GenerationSettings(num_beams=3), [[(a, True) for a in answers[0]]] * 12)
    counted: list[int] = []
    by_onednn = wide.by_onednn
    monkeypatch.setattr(wide, "_LARGER", 1)
    monkeypatch.setattr(wide, "by_onednn", lambda *given: counted.append(len(given)) or by_onednn(*given))
    found = engine(folder).ask(prompts[:12], GenerationSettings(num_beams=3), [[(a, True) for a in answers[0]]] * 12)
    assert counted and [reply.text for reply in found] == [reply.text for reply in plain]
    assert close([reply.scores for reply in found], [reply.scores for reply in plain], 1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("tokenizer", ["bytes", "metaspace"])
def test_families_and_tokenizers(tmp_path, family, tokenizer) -> None:
    template = tiny_lvlm.BARE_TEMPLATE if tokenizer == "metaspace" else tiny_lvlm.QWEN_TEMPLATE
    folder = tiny_lvlm.make_folder(tmp_path / "model", family, tokenizer, template, seed=3)
    config = tiny_lvlm.make_config(folder, system="Say it in a word." if family == "qwen2_vl" else "")
    prompts = tiny_lvlm.make_prompts(tiny_lvlm.make_images(tmp_path / "images", 5), 12, seed=2)
    fast, truth = Engine.load(config, device="cpu"), NaiveLvlm(folder, config.prompt_format)
    assert fast.lvlm.layout.in_pieces
    for prompt, scores in zip(prompts, fast.score(prompts, [["red", "blue boat"]] * len(prompts)), strict=True):
        for answer, score in zip(["red", "blue boat"], scores, strict=True):
            assert abs(score.log_prob - truth.score(prompt, answer)[0]) <= 1e-4
    assert fast.generate(prompts) == [truth.generate(prompt) for prompt in prompts]


def test_batch_size_order_cache_and_mode_do_not_matter(world, tmp_path) -> None:
    folder, prompts, answers = world
    whole = engine(folder)
    scores, texts = whole.score(prompts, answers), whole.generate(prompts)
    both = whole.ask(prompts, GenerationSettings(), [[(a, False) for a in some] for some in answers])
    assert [reply.text for reply in both] == texts and close([reply.scores for reply in both], scores, 1e-5)
    alone = engine(folder, token_budget=1)  # one prompt a pass
    assert close(alone.score(prompts, answers), scores, 1e-5) and alone.generate(prompts) == texts
    order = list(range(len(prompts)))
    random.Random(1).shuffle(order)
    shuffled = engine(folder, image_cache_mb=1, kv_cache_mb=1, token_budget=700, cache=tmp_path / "a.sqlite")
    for _ in ("cold", "warm"):
        found = shuffled.score([prompts[i] for i in order], [answers[i] for i in order])
        assert close(found, [scores[i] for i in order], 1e-5)
        assert shuffled.generate([prompts[i] for i in order]) == [texts[i] for i in order]
    assert shuffled.stats.cache_hits >= shuffled.stats.computed > 0
    halves = [engine(folder, cache=tmp_path / "two.sqlite") for _ in range(2)]
    parts = [e.generate(prompts[k::2]) for k, e in enumerate(halves)]
    assert [parts[i % 2][i // 2] for i in range(len(prompts))] == texts


def test_prefixes_and_images_are_shared(world) -> None:
    folder, prompts, _ = world
    demos = sorted({demo for p in prompts for demo in p.demos}, key=str)
    query = prompts[0]
    many = [Prompt((a, b), query.image, query.question) for a in demos for b in demos]
    subject = engine(folder)
    subject.score(many, [["red"]] * len(many))
    stats = subject.stats
    assert stats.images_encoded <= len({path for p in many for path in p.images}) < stats.images_naive
    assert stats.tokens_computed < 0.8 * stats.tokens_naive


def test_several_answers_of_a_prompt_do_not_see_one_another(world) -> None:
    folder, prompts, _ = world
    subject = engine(folder)
    together = subject.score(prompts[:10], [ANSWERS] * 10, end=True)
    apart = [
        [engine_score[0] for engine_score in subject.score([p] * len(ANSWERS), [[a] for a in ANSWERS], end=True)]
        for p in prompts[:10]
    ]
    assert close(together, apart, 1e-5)


def test_a_killed_run_resumes_to_the_same_bits(world, tmp_path) -> None:
    folder, prompts, answers = world
    expected = engine(folder, cache=tmp_path / "whole.sqlite").score(prompts, answers)
    for stop_after in (1, 3):
        path = tmp_path / f"killed{stop_after}.sqlite"
        victim = engine(folder, cache=path)
        real, calls = victim.cache.put, []

        def put(*args, real=real, calls=calls, stop_after=stop_after) -> None:
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(1)
            real(*args)

        victim.cache.put = put
        with pytest.raises(KeyboardInterrupt):
            victim.score(prompts, answers)
        resumed = engine(folder, cache=path)
        assert resumed.score(prompts, answers) == expected  # equal to the last bit, not just close
        assert 0 < resumed.stats.cache_hits < len(prompts)


def test_nothing_stale_is_ever_answered(world, tmp_path) -> None:
    folder, prompts, _ = world
    path = tmp_path / "answers.sqlite"
    engine(folder, cache=path).generate(prompts[:3])
    other_model = tiny_lvlm.make_folder(tmp_path / "other", seed=9)
    for changed, settings in [
        (engine(folder, cache=path, system="Another."), GenerationSettings()),
        (engine(folder, cache=path, user_template="Q: <Q>"), GenerationSettings()),
        (engine(folder, cache=path, dtype="bf16"), GenerationSettings()),
        (engine(folder, cache=path, processor={"max_pixels": 28 * 28 * 4}), GenerationSettings()),
        (engine(folder, cache=path, chat_template=tiny_lvlm.BARE_TEMPLATE), GenerationSettings()),
        (engine(other_model, cache=path), GenerationSettings()),
        (engine(folder, "naive", cache=path), GenerationSettings()),
        (engine(folder, cache=path), GenerationSettings(num_beams=2)),
        (engine(folder, cache=path), GenerationSettings(max_new_tokens=4)),
        (engine(folder, cache=path), GenerationSettings(length_penalty=1.0)),
    ]:
        changed.generate(prompts[:3], settings)
        assert changed.stats.cache_hits == 0
    again = engine(folder, cache=path)
    demo = dataclasses.replace(next(p for p in prompts if p.demos).demos[0], answer="other")
    again.generate([*prompts[:3], Prompt((demo,), prompts[0].image, prompts[0].question)])
    assert (again.stats.cache_hits, again.stats.computed) == (len(set(prompts[:3])), 1)


def test_the_same_image_under_another_name_is_the_same_image_and_a_changed_file_is_not(world, tmp_path) -> None:
    folder, prompts, _ = world
    first, second = tmp_path / "a.jpg", tmp_path / "b.jpg"
    for target in (first, second):
        target.write_bytes(Path(prompts[0].image).read_bytes())
    subject = engine(folder, cache=tmp_path / "c.sqlite")
    subject.generate([Prompt((), str(first), "what?"), Prompt((), str(second), "what?")])
    assert subject.stats.computed == 1
    first.write_bytes(Path(prompts[1].image if prompts[1].image != prompts[0].image else prompts[2].image).read_bytes())
    subject.generate([Prompt((), str(first), "what?")])
    assert subject.stats.computed == 2


def test_out_of_memory_halves_the_batch_and_says_so(world, caplog) -> None:
    folder, prompts, _ = world
    subject = engine(folder)
    expected = engine(folder).generate(prompts)
    real = subject._runner.run

    def tight(plan, leaves, asked, settings):
        if len(leaves) > 4:
            raise torch.OutOfMemoryError("too much")
        return real(plan, leaves, asked, settings)

    subject._runner.run = tight
    assert subject.generate(prompts) == expected
    assert subject.stats.shrinks > 0 and subject.token_budget < 1500 and "token budget is now" in caplog.text


def test_prompt_lengths_are_what_the_model_reads(world) -> None:
    folder, prompts, _ = world
    truth = NaiveLvlm(folder, tiny_lvlm.make_config(folder).prompt_format)
    lengths = engine(folder).lvlm.prompt_lengths(prompts[:10])
    assert lengths == [truth.inputs(p, truth.text(p))["input_ids"].shape[1] for p in prompts[:10]]


def test_features_do_not_depend_on_the_images_beside_them(world) -> None:
    """To the last bit, so that a resumed run, which encodes other images together, ends with the same file."""
    folder, prompts, _ = world
    lvlm = engine(folder).lvlm
    paths = sorted({path for prompt in prompts for path in prompt.images})
    together = lvlm.encode_images(paths)
    assert len(paths) > 5
    for path, features in zip(paths, together, strict=True):
        assert torch.equal(lvlm.encode_images([path])[0], features)


@pytest.fixture(scope="module")
def many(world, tmp_path_factory):
    """(prompts with 0 to 8 demonstrations, what is asked of each, the replies to all of them at once)."""
    folder, rng = world[0], random.Random(7)
    prompts = tiny_lvlm.make_prompts(tiny_lvlm.make_images(tmp_path_factory.mktemp("many") / "i", 24), 500, 4, 8)
    asked = [[(answer, i % 2 == 0) for answer in rng.sample(ANSWERS, rng.randint(1, 3))] for i in range(len(prompts))]
    return prompts, asked, engine(folder).ask(prompts, BEAMS, asked)


BEAMS = GenerationSettings(num_beams=3, length_penalty=0.0)


def agree(found: list, wanted: list) -> bool:
    """Replies with equal texts, and log-probabilities within the promised 1e-4."""
    texts = [reply.text for reply in found] == [reply.text for reply in wanted]
    return texts and close([reply.scores for reply in found], [reply.scores for reply in wanted], 1e-4)


@pytest.mark.slow
def test_500_prompts_one_by_one_in_sixteens_shuffled_cold_and_warm(world, many, tmp_path) -> None:
    folder, (prompts, asked, wanted) = world[0], many
    assert len({len(prompt.images) for prompt in prompts}) == 9 and len({reply.text for reply in wanted}) > 20
    order = random.Random(1).sample(range(500), 500)

    def in_order(replies: list) -> list:
        return [reply for _, reply in sorted(zip(order, replies, strict=True), key=lambda pair: pair[0])]

    def ask(subject: Engine, some: list[int]) -> list:
        return subject.ask([prompts[i] for i in some], BEAMS, [asked[i] for i in some])

    assert agree(engine(folder, token_budget=1).ask(prompts, BEAMS, asked), wanted)  # one prompt a pass
    sixteens = engine(folder)
    assert agree(in_order([reply for at in range(0, 500, 16) for reply in ask(sixteens, order[at : at + 16])]), wanted)
    cached = engine(folder, cache=tmp_path / "a.sqlite", image_cache_mb=1, kv_cache_mb=1)
    cold = in_order(ask(cached, order))
    assert agree(cold, wanted)
    passes = cached.stats.passes
    assert cached.ask(prompts, BEAMS, asked) == cold and cached.stats.passes == passes


WORKER = """
import dataclasses, json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from open_mmicl.engine import Engine, GenerationSettings
from open_mmicl.interface.prompts import Demo, Prompt
from tests.reference import tiny_lvlm
folder, cache = map(Path, sys.argv[2:4])
settings, prompts, asked = json.load(sys.stdin)
prompts = [Prompt(tuple(Demo(**demo) for demo in p["demos"]), p["image"], p["question"]) for p in prompts]
engine = Engine.load(tiny_lvlm.make_config(folder), device="cpu", cache_path=cache)
replies = engine.ask(prompts, GenerationSettings(**settings), [[tuple(pair) for pair in some] for some in asked])
print(json.dumps([engine.stats.computed, [dataclasses.asdict(reply) for reply in replies]]))
"""


def test_two_processes_at_once_share_500_prompts_and_agree(world, many, tmp_path) -> None:
    """No prompt is computed by both; the answers are those of one process to the last bit."""
    folder, (prompts, asked, _) = world[0], many
    alone = engine(folder, cache=tmp_path / "alone.sqlite").ask(prompts, BEAMS, asked)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", WORKER, str(root), str(folder), str(tmp_path / "pair.sqlite")]
    said = tmp_path / "said.json"
    said.write_text(json.dumps([dataclasses.asdict(BEAMS), [dataclasses.asdict(p) for p in prompts], asked]))
    pair = []
    for _ in range(2):
        with said.open() as handle:
            pair.append(subprocess.Popen(command, cwd=root, stdin=handle, stdout=subprocess.PIPE, text=True))
    outputs = [json.loads(process.communicate()[0].splitlines()[-1]) for process in pair]
    assert sum(computed for computed, _ in outputs) == len(set(prompts))
    assert [replies for _, replies in outputs] == [[dataclasses.asdict(reply) for reply in alone]] * 2
