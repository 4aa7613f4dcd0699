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

from open_mmicl import beam, decoder_fixed, wide
from open_mmicl.engine import Engine, GenerationSettings
from open_mmicl.engine_fast import FastRunner
from open_mmicl.engine_fixed import FixedRunner
from open_mmicl.interface.prompts import Prompt
from open_mmicl.tiles import Tiles, find_tiles
from open_mmicl.wide import Matrix
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


def test_company_order_caches_budgets_and_what_else_is_asked_do_not_matter(world, tmp_path) -> None:
    folder, prompts, asked, whole = world
    assert len({reply.text for reply in whole}) > 10 and len(prompts) > 20
    subject = engine(folder, kv_cache_mb=1, image_cache_mb=1, token_budget=300)
    assert subject.fixed and not engine(folder, dtype="fp32").fixed
    decoder = subject._runner.decoder
    assert min(decoder.prompt_tiles.base, decoder.small_tiles.base) > 1
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


def test_passes_by_shape_do_depend_on_company(world, monkeypatch) -> None:
    """What the promise is about: the fast path of fp32, asked in bf16, gives other scores in other company."""
    folder, prompts, asked, _ = world
    monkeypatch.setattr("open_mmicl.engine_fixed.FixedRunner", FastRunner)
    subject = engine(folder)
    together = subject.ask(prompts[:8], None, asked[:8])
    assert [subject.ask([p], None, [a])[0] for p, a in zip(prompts[:8], asked[:8], strict=True)] != together


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
    real = subject._runner._states

    def tight(rows, n_prompt, buffers):
        if buffers.shape[1] > 3:
            raise torch.OutOfMemoryError("too much")
        return real(rows, n_prompt, buffers)

    subject._runner._states = tight
    assert subject.ask(prompts[:8], BEAMS, asked[:8]) == whole[:8] and subject.stats.shrinks > 0


def test_where_a_tokens_place_matters_tiles_become_smaller(world) -> None:
    """A product that rounds by place is found out when the model is loaded; the answers are still right."""
    folder, _, _, _ = world
    decoder = engine(folder)._runner.decoder
    layer = decoder.layers[0]
    layer_down = layer.down

    class Leaning:
        """A product whose last row is rounded differently in tiles of more than four."""

        weight, widens = layer.down.weight, layer.down.widens

        def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
            out = layer_down(hidden)
            if len(out) > 4:
                out[-1] *= 1.01
            return out

    object.__setattr__(layer, "down", Leaning())
    prompt, small = decoder.find_tiles()
    assert prompt == small == Tiles(4, (4,))


@pytest.mark.parametrize("sizes", [(16,), (16, 32, 64, 128, 256), (128, 256), (1,)])
def test_tiles_hold_every_row_once_and_in_order(sizes: tuple[int, ...]) -> None:
    tiles = Tiles(sizes[0], sizes)
    for n in (*range(1, 300), 511, 1000):
        cuts = list(tiles.cuts(5, 5 + n))
        assert [row for first, last, _ in cuts for row in range(first, last)] == list(range(5, 5 + n))
        assert all(size in sizes and last - first <= size for first, last, size in cuts)
        assert tiles.padded(n) == sum(size for *_, size in cuts) <= max(n + sizes[0], n / 0.75)


def test_tiles_of_other_bits_are_not_used() -> None:
    """A product that rounds otherwise from 64 rows on: its larger blocks are left out, whatever the base."""
    rows = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))

    def work(part: torch.Tensor) -> torch.Tensor:
        return part * (1.01 if len(part) >= 64 else 1.0)

    assert find_tiles(32, (16, 64, 256), [(work, (rows,))]) == Tiles(32, (16, 32))
    assert find_tiles(128, (16, 64, 256), [(work, (rows,))]) == Tiles(128, (64, 128, 256))


def test_a_packed_product_has_the_plain_ones_bits() -> None:
    """oneDNN's own order of a weight changes no bit: the cache's key need not know of it."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = weight[:, 0].clone()
    for some in (slice(0, None), slice(32, 64)):
        plain, packed = (Matrix(weight, bias, hold).rows(some.start, some.stop)(hidden) for hold in (False, True))
        assert torch.equal(plain, packed)


def without_16_bit_instructions(monkeypatch) -> None:
    """Products in fp32 of all weights, by oneDNN."""
    monkeypatch.setattr(wide, "widens", lambda weight: weight.dtype == torch.bfloat16)
    monkeypatch.setattr(wide, "_LARGE", 1)


@pytest.mark.skipif(not wide.has_onednn(), reason="this build of torch has no oneDNN")
def test_fp32_copies_in_onednns_order_have_the_bits_of_plain_ones(monkeypatch) -> None:
    without_16_bit_instructions(monkeypatch)
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    hidden = torch.randn(40, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = weight[:, 0].clone()
    for some in (slice(0, None), slice(32, 64)):
        parts = [Matrix(weight, bias, hold).rows(some.start, some.stop) for hold in (False, True)]
        assert all(part.widens and part.packs for part in parts)
        plain, packed = (part(hidden) for part in parts)
        exact = hidden.double() @ weight[some].double().T + bias[some].double()
        assert torch.equal(plain, packed) and (plain.double() - exact).abs().max() < 2**-8 * exact.abs().max()


@pytest.mark.skipif(not wide.has_onednn(), reason="this build of torch has no oneDNN")
def test_large_products_by_onednn_keep_the_promise(world, monkeypatch) -> None:
    """Where fp32 copies of the weights multiply, as on a CPU without 16-bit instructions."""
    folder, prompts, asked, _ = world
    plain = engine(folder).key
    without_16_bit_instructions(monkeypatch)
    subject = engine(folder)
    assert subject._runner._onednn and subject.key != plain
    whole = subject.ask(prompts[:8], BEAMS, asked[:8])
    for i in (1, 6):
        assert engine(folder, token_budget=300).ask([prompts[i]], BEAMS, [asked[i]]) == [whole[i]]


def test_the_machine_is_part_of_the_key_in_16_bit_only(world, monkeypatch) -> None:
    folder = world[0]
    before = {dtype: engine(folder, dtype=dtype).key for dtype in ("fp32", "bf16")}
    assert engine(folder, token_budget=700).key == before["bf16"]  # passes of any size give the same bits
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    assert engine(folder, dtype="fp32").key == before["fp32"] and engine(folder).key != before["bf16"]


def test_close_to_fp32(world) -> None:
    """16 bit is noise around fp32, and nothing else: scores within a small part of their spread."""
    folder, prompts, asked, whole = world
    truth = NaiveLvlm(folder, tiny_lvlm.make_config(folder).prompt_format)
    for prompt, pairs, reply in list(zip(prompts, asked, whole, strict=True))[:6]:
        for (answer, end), score in zip(pairs, reply.scores, strict=True):
            log_prob, ids = truth.score(prompt, answer, end)
            assert score.n_tokens == len(ids) and abs(score.log_prob - log_prob) < 0.1 * abs(log_prob)


def in_blocks(subject: Engine, monkeypatch) -> list[int]:
    """Have an engine attend in blocks of up to 6 tokens, whatever the machine; the pieces that do are noted."""
    noted = []
    monkeypatch.setattr(decoder_fixed, "BLOCK", 6)
    decoder = subject._runner.decoder
    real, decoder.blocks = decoder._attend_in_blocks, True

    def attend(queries: torch.Tensor, own: tuple, out: torch.Tensor) -> None:
        noted.append(len(queries))
        real(queries, own, out)

    decoder._attend_in_blocks = attend
    return noted


@pytest.mark.parametrize("blocks", [False, True])
def test_the_arithmetic_is_that_of_fp32(world, monkeypatch, blocks) -> None:
    """The same code with fp32 weights equals transformers to 1e-4: nothing but rounding separates it from fp32."""
    folder, prompts, asked, _ = world
    monkeypatch.setattr("open_mmicl.engine_fast.FastRunner", FixedRunner)
    subject, truth = engine(folder, dtype="fp32"), NaiveLvlm(folder, tiny_lvlm.make_config(folder).prompt_format)
    assert subject.fixed and not subject._runner.decoder.blocks
    noted = in_blocks(subject, monkeypatch) if blocks else []
    for prompt, pairs, reply in zip(prompts[:10], asked, subject.ask(prompts[:10], BEAMS, asked[:10]), strict=False):
        assert reply.text == truth.generate(prompt, num_beams=3)
        for (answer, end), score in zip(pairs, reply.scores, strict=True):
            assert abs(score.log_prob - truth.score(prompt, answer, end)[0]) <= 2e-4
    assert bool(noted) == blocks and (not blocks or max(noted) > 12)  # several blocks, the last one shorter


def test_attention_in_blocks_keeps_the_promise(world, monkeypatch) -> None:
    folder, prompts, asked, _ = world
    whole, subject = engine(folder), engine(folder, kv_cache_mb=1, token_budget=300)
    noted = [in_blocks(one, monkeypatch) for one in (whole, subject)]
    together = whole.ask(prompts[:12], BEAMS, asked[:12])
    assert [subject.ask([prompts[i]], BEAMS, [asked[i]])[0] for i in (7, 2, 11)] == [together[i] for i in (7, 2, 11)]
    assert all(noted) and len({reply.text for reply in together}) > 5


def test_the_second_step_of_a_beam_search_begins_with_what_the_first_has_computed(world) -> None:
    folder, prompts, _, _ = world
    demos = sorted({demo for prompt in prompts for demo in prompt.demos}, key=str)
    query = prompts[0]
    one = [Prompt((demo,), query.image, query.question) for demo in demos]
    two = [Prompt((demo, demos[0]), query.image, query.question) for demo in demos[1:]]
    subject, fresh = engine(folder), engine(folder)
    subject.score(one, [["red"]] * len(one))
    before = subject.stats.tokens_computed
    assert subject.score(two, [["red"]] * len(two)) == fresh.score(two, [["red"]] * len(two))
    assert subject.stats.tokens_computed - before < 0.8 * fresh.stats.tokens_computed
    runner = subject._runner
    assert runner._held_tokens == sum(part.shape[2] for part in runner._held.values()) <= runner.prefix_budget
    runner.prefix_budget = 60
    runner._hold(None, (), torch.empty(0))
    assert 0 < runner._held_tokens <= 60


def test_of_equal_logits_the_lowest_id_is_taken() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0, 3.0, 3.0, 2.0], [6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [0.0] * 6])
    for count in (1, 2, 3, 4, 5, 6):
        found, places = beam.highest(values, count)
        for row in range(3):
            wanted = sorted(range(6), key=lambda i, row=row: (-values[row, i], i))[:count]
            assert places[row].tolist() == wanted and found[row].tolist() == values[row, wanted].tolist()
