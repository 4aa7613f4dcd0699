"""Servers: the same answers and scores as our own engine, through faults and restarts, and nothing paid twice."""

import asyncio
import dataclasses
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from open_mmicl.answer_cache import AnswerCache
from open_mmicl.asking import collect
from open_mmicl.engine import Engine, GenerationSettings
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError
from open_mmicl.interface import load_interface
from open_mmicl.interface.config import REPO_ROOT, InferModelConfig
from open_mmicl.interface.images import ImageFiles
from open_mmicl.interface.prompts import Prompt, PromptFormat
from open_mmicl.server.config import ServerConfig
from open_mmicl.server.connection import Connection
from open_mmicl.server.engine import ServerEngine
from open_mmicl.server.messages import Messages
from tests.reference import tiny_lvlm
from tests.reference.openai_server import Canned, Served, Server

ANSWERS = ["red", "blue boat", "wooden", "large metal fish"]
GREEDY, BEAMS = GenerationSettings(5, 1), GenerationSettings(5, 3, 0.0)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    made = tiny_lvlm.make_prompts(tiny_lvlm.make_images(tmp_path_factory.mktemp("images"), 6), 20, shots=3)
    return list(dict.fromkeys(made))[:14]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, prompts):
    """(a model as served, its configuration for our own engine, that one's YAML)."""
    root = tmp_path_factory.mktemp("served")
    folder = tiny_lvlm.make_folder(root / "model")
    own = tiny_lvlm.make_config(folder)
    (root / "own.yaml").write_text(yaml.safe_dump({k: v for k, v in dataclasses.asdict(own).items() if v}))
    return Served(folder), own, root / "own.yaml"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Canned answers."""
    running = Server(Canned(), tmp_path / "paid.log").start()
    yield running
    running.stop()


@pytest.fixture
def real(world, tmp_path: Path) -> Iterator[Server]:
    """The tiny model."""
    running = Server(world[0], tmp_path / "paid.log").start()
    yield running
    running.stop()


def configured(*servers: Server, model: str = "tiny", **changes: object) -> InferModelConfig:
    usual = {"urls": [s.url for s in servers], "retries": 2, "in_flight": 8, "patience_s": 60, "check_prompts": 4}
    return InferModelConfig(
        name="Tiny", model_name_or_path=model, interface="openai", system="Answer.", dtype="fp32",
        server={**usual, **changes},
    )  # fmt: skip


def truth(prompts: list[Prompt]) -> list[str]:
    """The canned answers to prompts, asked directly."""
    canned, messages = Canned(), Messages(PromptFormat(system="Answer."), ImageFiles(), "data")
    return [canned.complete({"messages": messages.of(p)[0]})["choices"][0]["message"]["content"] for p in prompts]


def paid(server: Server) -> list[str]:
    return server.log.read_text().split() if server.log.exists() else []


def texts(engine: object, prompts: list) -> list[str]:
    return engine.generate(prompts, GREEDY)


@pytest.mark.parametrize("way", ["token_ids", "prompt_logprobs"])
def test_answers_and_scores_equal_our_own_engines(world, prompts, real, way, tmp_path) -> None:
    own, config = Engine.load(world[1], device="cpu"), configured(real, scores=way, reference=str(world[2]))
    config = dataclasses.replace(config, system=world[1].system, user_template=world[1].user_template)
    served = Engine.load(config, cache_path=tmp_path / "a.sqlite")
    assert isinstance(served, ServerEngine) and served.gives_scores
    asked = [[("red", True), (ANSWERS[i % 4], False), (ANSWERS[i % 4], True)] for i in range(len(prompts))]
    mine, theirs = own.ask(prompts, BEAMS, asked), served.ask(prompts, BEAMS, asked)
    assert [r.text for r in theirs] == [r.text for r in mine] and len({r.text for r in mine}) > 3
    for a, b in zip(mine, theirs, strict=True):
        for x, y in zip(a.scores, b.scores, strict=True):
            assert x.n_tokens == y.n_tokens and abs(x.log_prob - y.log_prob) < 1e-4
    assert texts(served, prompts) == texts(own, prompts)
    assert real.most_at_once > 4


def test_scores_may_be_asked_for_after_answers(world, prompts, real) -> None:
    config = dataclasses.replace(configured(real, reference=str(world[2])), user_template=world[1].user_template)
    engine = Engine.load(config)
    assert len(texts(engine, prompts[:2])) == 2
    for some in (prompts[:3], prompts[3:5]):
        assert len(engine.score(some, [ANSWERS] * len(some))) == len(some)
    assert 0 < engine.apart <= 1e-3


def test_what_is_in_the_cache_needs_no_server_and_is_paid_once(prompts, server, tmp_path) -> None:
    config = configured(server)
    first = Engine.load(config, cache_path=tmp_path / "a.sqlite")
    before = len(paid(server))
    found = texts(first, prompts + prompts)
    assert len(paid(server)) - before == len(prompts) == first.stats.computed
    first.close()
    server.stop()
    hasty = dataclasses.replace(config, server={**config.server, "patience_s": 0})
    again = Engine.load(hasty, cache_path=tmp_path / "a.sqlite")
    assert texts(again, prompts) == found[: len(prompts)] and again.stats.computed == 0 and again.key == first.key
    with pytest.raises(MissingInputError, match="no server answers at .*start it"):
        again.generate(prompts, GenerationSettings(4, 1))


@pytest.mark.parametrize("faults", [[429, 429, "", 500], ["cut", "", "cut"], [503, 408, 502]])
def test_passing_faults_are_retried_and_nothing_is_paid_twice(prompts, server, tmp_path, faults) -> None:
    engine = Engine.load(configured(server), cache_path=tmp_path / "a.sqlite")
    before, server.faults = len(paid(server)), list(faults)
    found = texts(engine, prompts)
    lost = engine._connection.sites[0].losses
    assert not server.faults and (lost > 0) == ("cut" in faults)
    trials = 8 if lost else 0  # a server that was lost is asked who it is
    assert len(paid(server)) - before in (len(prompts) + trials, len(prompts) + 2 * trials)
    assert found == truth(prompts)


def test_a_slow_answer_is_asked_for_again(prompts, server, tmp_path) -> None:
    engine = Engine.load(configured(server, timeout_s=3), cache_path=tmp_path / "a.sqlite")
    server.faults = ["", "slow"]
    assert len(texts(engine, prompts[:4])) == 4


def test_a_restart_in_the_middle(prompts, server, tmp_path) -> None:
    engine = Engine.load(configured(server), cache_path=tmp_path / "a.sqlite")
    port, put, count = server.server_address[1], engine.cache.put, []
    server.delay = 0.3  # some are under way when it stops
    started: list[Server] = []

    def counting(*words: object) -> bool:
        count.append(1)
        if len(count) == 4:
            server.stop()
            started.append(Server(Canned(), tmp_path / "second.log", port).start())
        return put(*words)

    engine.cache.put = counting
    before = len(paid(server))
    assert texts(engine, prompts) == truth(prompts)
    second = len(paid(started[0]))
    started[0].stop()
    under_way = 8
    assert 0 < second and len(paid(server)) - before + second <= len(prompts) + under_way + 2 * 8


def test_a_restart_between_two_steps_of_a_run(prompts, server, tmp_path) -> None:
    """A server that answered within ``patience_s`` is waited for, also by a process that has not met it."""
    config, cache = configured(server, retries=1), tmp_path / "a.sqlite"
    assert texts(Engine.load(config, cache_path=cache), prompts[:2]) == truth(prompts[:2])
    port = server.server_address[1]
    server.stop()
    hasty = dataclasses.replace(config, server={**config.server, "patience_s": 0})
    with sqlite3.connect(cache) as there:  # it answered five seconds ago
        there.execute("UPDATE answers SET written = written - 5")
    with pytest.raises(MissingInputError, match="start it and run the same command again"):
        texts(Engine.load(hasty, cache_path=cache), prompts)
    again: list[Server] = []
    restart = threading.Timer(1.5, lambda: again.append(Server(Canned(), tmp_path / "second.log", port).start()))
    restart.start()
    assert texts(Engine.load(config, cache_path=cache), prompts) == truth(prompts)
    again[0].stop()


def test_another_model_after_a_restart_is_refused_and_nothing_of_it_kept(prompts, server, tmp_path) -> None:
    engine = Engine.load(configured(server), cache_path=tmp_path / "a.sqlite")
    port, put, kept = server.server_address[1], engine.cache.put, []
    server.faults = ["after"] * 3 + ["held"] * len(prompts)  # some are under way when it stops
    started: list[Server] = []

    def swapping(*words: object) -> bool:
        kept.append(words[1][0][1])
        if len(kept) == 3:
            server.stop()
            started.append(Server(Canned(1), tmp_path / "second.log", port).start())
        return put(*words)

    engine.cache.put = swapping
    with pytest.raises(UsageError, match="is not the server that answered before .*differ"):
        texts(engine, prompts)
    again = Engine.load(configured(started[0]), cache_path=tmp_path / "a.sqlite")
    assert again.key == engine.key
    held = [p for p in prompts if again.cache.get([_key(again, p)])]
    assert len(held) == 3 and texts(again, held) == truth(held)
    with pytest.raises(UsageError, match="is not the server that answered before"):
        texts(again, prompts)
    started[0].stop()


def _key(engine: ServerEngine, prompt: object) -> bytes:
    return collect(engine.key, engine.images, [prompt], GREEDY, None, engine.scorable)[0][0].text


def test_every_reply_must_come_from_the_same_model(prompts, server, tmp_path) -> None:
    engine = Engine.load(configured(server), cache_path=tmp_path / "a.sqlite")
    server.answers_as = "another"
    with pytest.raises(UsageError, match="answers as 'another' now, before it was 'tiny'"):
        texts(engine, prompts)


def test_an_upgrade_needs_a_backend_of_its_own(prompts, server, tmp_path) -> None:
    cache = tmp_path / "a.sqlite"
    texts(Engine.load(configured(server), cache_path=cache), prompts[:3])
    server.version = "2.0"
    with pytest.raises(UsageError, match="version '1.0' before, '2.0' now"):
        texts(Engine.load(configured(server), cache_path=cache), prompts[:5])
    new = Engine.load(configured(server, backend="tests 2.0"), cache_path=cache)
    texts(new, prompts[:3])
    assert new.stats.computed == 3


def test_a_backend_of_which_nothing_was_kept_is_forgotten(prompts, server, tmp_path) -> None:
    cache = tmp_path / "a.sqlite"
    Engine.load(configured(server), cache_path=cache).close()
    server.version = "2.0"
    assert len(texts(Engine.load(configured(server), cache_path=cache), prompts[:3])) == 3


def test_several_servers_share_the_work_and_must_be_the_same(prompts, server, tmp_path) -> None:
    second = Server(Canned(), tmp_path / "second.log").start()
    engine = Engine.load(configured(server, second, in_flight=2), cache_path=tmp_path / "a.sqlite")
    before = len(paid(server)), len(paid(second))
    texts(engine, prompts)
    shares = [len(paid(s)) - b for s, b in zip((server, second), before, strict=True)]
    assert min(shares) >= 3 and sum(shares) == len(prompts)
    second.version = "other"
    with pytest.raises(UsageError, match="version '1.0' before, 'other' now"):
        Engine.load(configured(server, second), cache_path=tmp_path / "b.sqlite")
    second.stop()


def test_one_of_two_servers_may_die(prompts, server, tmp_path) -> None:
    second = Server(Canned(), tmp_path / "second.log").start()
    engine = Engine.load(configured(server, second, retries=1), cache_path=tmp_path / "a.sqlite")
    second.stop()
    assert len(texts(engine, prompts)) == len(prompts)


def test_a_server_that_stays_away_ends_the_run_and_keeps_what_is_done(prompts, server, tmp_path) -> None:
    config = configured(server, patience_s=1, retries=1)
    engine = Engine.load(config, cache_path=tmp_path / "a.sqlite")
    put, count = engine.cache.put, []

    def stopping(*words: object) -> bool:
        count.append(1)
        if len(count) == 3:
            server.stop()
        return put(*words)

    engine.cache.put = stopping
    with pytest.raises(MissingInputError, match="what is done is kept"):
        texts(engine, prompts)
    assert AnswerCache(tmp_path / "a.sqlite").verify() >= 3


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (401, UsageError, "refuses the API key"),
        (404, UsageError, "has no model 'tiny'"),
        (400, UsageError, "refuses a prompt of"),
        ("garbage", DamagedInputError, "no chat-completions server"),
    ],
)
def test_lasting_faults_are_one_line(prompts, server, tmp_path, fault, error, words) -> None:
    engine = Engine.load(configured(server, images="data"), cache_path=tmp_path / "a.sqlite")
    server.faults = ["", "", fault]
    with pytest.raises(error, match=words) as told:
        texts(engine, prompts)
    assert "\n" not in str(told.value)
    assert AnswerCache(tmp_path / "a.sqlite").verify() >= 2  # those under way were waited for


def test_a_plain_server_answers_but_refuses_scores_and_beams_before_anything_is_paid(prompts, tmp_path) -> None:
    plain = Server(Canned(), tmp_path / "plain.log", extensions=False).start()
    engine = Engine.load(configured(plain), cache_path=tmp_path / "a.sqlite")
    before = len(paid(plain))
    with pytest.raises(UsageError, match="gives no log-probabilities of given tokens"):
        engine.score(prompts, [["red"]] * len(prompts))
    with pytest.raises(UsageError, match="does not search with beams .*NUM_BEAMS=1"):
        engine.generate(prompts, BEAMS)
    assert len(paid(plain)) == before
    assert texts(engine, prompts) == truth(prompts)
    plain.stop()


def test_scores_beyond_the_bound_are_refused_and_none_is_kept(world, prompts, real, tmp_path) -> None:
    real.shift = 0.01
    engine = Engine.load(configured(real, reference=str(world[2])), cache_path=tmp_path / "a.sqlite")
    with pytest.raises(UsageError, match=r"differ from our own engine's by up to 0\.0\d+ nats .*allowed: 0\.001"):
        engine.score(prompts, [["red"]] * len(prompts))
    assert AnswerCache(tmp_path / "a.sqlite").verify() == 0
    loose = Engine.load(configured(real, reference=str(world[2]), score_bound=0.5), cache_path=tmp_path / "a.sqlite")
    assert len(loose.score(prompts, [["red"]] * len(prompts))) == len(prompts)


def test_inner_states_are_the_references_or_refused(world, prompts, server, tmp_path) -> None:
    config = configured(server)
    with pytest.raises(UsageError, match="name the same model for our own engine as server.reference"):
        Engine.load(config, cache_path=tmp_path / "a.sqlite").hidden_states(prompts[:2], (-1,), "last")
    config = dataclasses.replace(configured(server, reference=str(world[2])), user_template=world[1].user_template)
    served = Engine.load(config, cache_path=tmp_path / "a.sqlite")
    own = Engine.load(dataclasses.replace(world[1], system=config.system), device="cpu")
    asked = prompts[:2], (-1,), "last"
    assert torch.equal(served.hidden_states(*asked), own.hidden_states(*asked))
    assert torch.equal(served.answer_embeddings(ANSWERS), own.answer_embeddings(ANSWERS))
    served.close()


def test_images_are_sent_once(prompts, server, tmp_path) -> None:
    engine = Engine.load(configured(server), cache_path=tmp_path / "a.sqlite")
    images = {path for prompt in prompts for path in prompt.images}
    texts(engine, prompts[:1])
    for prompt in prompts[1:]:
        texts(engine, [prompt])
    assert engine.stats.images_encoded == len(images)
    server.served.by_uuid.clear()  # the server has forgotten them
    assert len(engine.generate(prompts, GenerationSettings(4, 1))) == len(prompts)


def test_requests_per_minute(server, monkeypatch) -> None:
    pauses: list[float] = []

    async def noted(seconds: float) -> None:
        pauses.append(round(seconds, 6))

    async def five() -> None:
        for _ in range(5):
            await connection._pace()

    connection = Connection("Tiny", "tiny", configured(server, requests_per_minute=600).server_config)
    monkeypatch.setattr("open_mmicl.server.connection.time.monotonic", lambda: 100.0)
    with monkeypatch.context() as patched:
        patched.setattr("open_mmicl.server.connection.asyncio.sleep", noted)
        asyncio.run(five())
    assert pauses == [0.0, 0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"urls": []}, "server.urls .* is missing"),
        ({"url": "x"}, "did you mean urls"),
        ({"scores": "all"}, "server.scores='all' is not allowed"),
        ({"in_flight": 0}, "whole number >= 1"),
        ({"retries": True}, "whole number >= 0"),
        ({"timeout_s": float("nan")}, "number >= 0"),
        ({"body": 3}, "a mapping"),
    ],
)
def test_wrong_settings_are_one_line(changes, words) -> None:
    with pytest.raises(UsageError, match=words):
        ServerConfig.of({"urls": ["http://localhost:1/v1"], **changes}, "m")


def test_addresses_keys_and_what_a_server_does_not_take(prompts, server) -> None:
    config = ServerConfig.of({"urls": ["http://gpu7:8000/v1"], "url_variable": "U", "api_key_variable": "K"}, "m")
    assert config.addresses({}) == ("http://gpu7:8000/v1",)
    assert config.addresses({"U": "http://a:1/v1, http://b:2/v1"}) == ("http://a:1/v1", "http://b:2/v1")
    assert config.identity()["server"] == "gpu7" and config.api_key({"K": "x"}) == "x"
    with pytest.raises(UsageError, match="set K to"):
        config.api_key({})
    with pytest.raises(UsageError, match="is not allowed: http"):
        config.addresses({"U": "gpu7:8000"})
    for words in ({"mode": "naive"}, {"precision": "bf16"}):
        with pytest.raises(UsageError, match="is not allowed for Tiny"):
            Engine.load(configured(server), **words)
    with pytest.raises(UsageError, match="the model is on a server"):
        load_interface(configured(server))
    with pytest.raises(UsageError, match="serves tiny, not 'large'"):
        Engine.load(configured(server, model="large"))


def test_nobody_without_a_server_imports_the_client() -> None:
    code = (
        "import sys; import open_mmicl.engine, lever_plus.stages.inference, lever_plus.stages.lvlm;"
        "from open_mmicl.interface.config import InferModelConfig; from pathlib import Path;"
        "[InferModelConfig.load(p) for p in Path('configs/infer_model').glob('*.yaml')];"
        "sys.exit('openai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO_ROOT, check=False).returncode == 0
