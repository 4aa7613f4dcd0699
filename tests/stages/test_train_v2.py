import json

import numpy as np
import pytest
import torch

from lever_plus import cli, paths
from lever_plus.data.beam_data import (
    BeamData,
    BeamQuery,
    end_where_nothing_is_gained,
    load_beam_data,
    save_beam_data,
)
from lever_plus.rl.planted import Planted, PlantedWorld
from lever_plus.selectors import PointerSelector
from lever_plus.selectors.policy import picks
from lever_plus.settings.loading import load
from lever_plus.settings.selector import TrainV2Settings
from lever_plus.stages import train_v2
from open_mmicl.errors import DamagedInputError, UsageError

WORLD = PlantedWorld(queries=120, heldout=80, items=300, pool=16, dim=16, topic_dim=4, nuisance=1.5, seed=2)


def beams_of(world, query):
    """The five best of some ordered pairs by the true success probability."""
    pool = world.pool_of(query)
    near = np.argsort(-(world.topic[pool] @ world.topic[query]))[:3]
    pairs = [(int(a), int(b)) for a in near for b in near if a != b][:5]
    scores = [float(np.log(world.success(query, pool[list(p)]))) for p in pairs]
    order = np.argsort(scores)[::-1]
    return BeamQuery(query, pool, [pairs[i] for i in order], [scores[i] for i in order])


@pytest.fixture(scope="module")
def world():
    return Planted(WORLD)


@pytest.fixture
def environment(world, tmp_path, monkeypatch):
    save_beam_data(tmp_path / "beams.json", BeamData([beams_of(world, int(q)) for q in world.train_queries], "left"))
    torch.save(torch.from_numpy(world.embeddings), tmp_path / "emb.pt")
    values = {
        "BEAM_DATA_PATH": tmp_path / "beams.json", "QUERY_EMB_PATH": tmp_path / "emb.pt", "HIDDEN_DIM": "32",
        "RESULT_DIR": tmp_path / "results", "DATASET": "mini_okvqa", "DEVICE": "cpu", "V2_EPOCHS": "6",
        "V2_MIN_SCORE": "-99",  # the planted scores are log-probabilities
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    return paths.v2_checkpoint(load(TrainV2Settings))


def stage(*arguments):
    return cli.stage_main(TrainV2Settings, train_v2.run, train_v2.__doc__, list(arguments))


def test_v2_learns_to_pick_better_than_cosine_on_queries_it_never_saw(environment, world, capsys):
    assert stage("V2_LR=2e-3") == 0
    selector = PointerSelector.load(environment)
    value = {"v2": [], "cosine": []}
    for query in world.heldout_queries:
        pool = world.pool_of(int(query))
        q, c = torch.from_numpy(world.embeddings[query])[None], torch.from_numpy(world.embeddings[pool])[None]
        picks = {"v2": selector.select(q, c, 2)[0].numpy(), "cosine": (c[0] @ q[0]).topk(2).indices.numpy()}
        for name, positions in picks.items():
            value[name].append(world.success(int(query), pool[positions]))
    assert np.mean(value["v2"]) > np.mean(value["cosine"]) + 0.03
    content = torch.load(environment, weights_only=True)
    assert content["phase"] == "v2" and content["settings"]["V2_LR"] == 2e-3 and content["config"]["dropout"] == 0.1
    log = environment.with_name(environment.stem + "_train_log.jsonl").read_text().splitlines()
    epochs = [r for r in map(json.loads, log) if r["kind"] == "epoch" and r["epoch"] > 0]
    assert content["epoch"] == min(epochs, key=lambda r: r["val_rce_loss"])["epoch"]
    assert stage("V2_LR=2e-3") == 0
    assert "done before" in capsys.readouterr().out


def test_fault_01_labels_are_positions_in_the_querys_own_pool(environment, world):
    from lever_plus.data.beam_data import load_beam_data
    from lever_plus.rl.groups import build_groups

    settings = load(TrainV2Settings)
    beams = load_beam_data(train_v2.beam_path(settings))
    table = torch.from_numpy(world.embeddings)
    groups = build_groups(train_v2.as_rl_data(beams), table, lambda candidate, where: candidate.beam_score)
    assert groups.pool_rows.shape[1] == WORLD.pool
    row = 7
    query = beams.queries[row]
    for member, pointer in enumerate(query.pointers):
        picked = groups.table[groups.pool_rows[row][groups.pointers[row, member]]]
        assert torch.equal(picked, table[query.pool_ids[list(pointer)]])


def test_v2_is_deterministic(environment):
    assert stage("V2_EPOCHS=2") == 0
    first = torch.load(environment, weights_only=True)["model_state_dict"]
    environment.unlink()
    assert stage("V2_EPOCHS=2") == 0
    second = torch.load(environment, weights_only=True)["model_state_dict"]
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_missing_beam_data_names_the_command(environment, capsys):
    assert stage("BEAM_DATA_PATH=/nowhere/beams.json") == 3
    assert "generate_data.sh" in capsys.readouterr().err


def test_credit_for_the_first_pick_adds_the_weights_of_the_beams_that_begin_alike():
    beams = BeamData([BeamQuery(3, np.arange(5), [(0, 1), (2, 1), (0, 4)], [2.0, 1.0, 0.5])], "left")
    tau = 0.7
    (query,) = train_v2.as_rl_data(beams, "first", tau).queries
    weights = np.exp(np.array([2.0, 1.0, 0.5]) / tau)
    weights /= weights.sum()
    found = {c.pointer: c.beam_score for c in query.candidates}
    assert set(found) == {(0,), (2,)}
    again = np.exp(np.array([found[0,], found[2,]]) / tau)
    np.testing.assert_allclose(again / again.sum(), [weights[0] + weights[2], weights[1]])
    (whole,) = train_v2.as_rl_data(beams, "all", tau).queries
    assert [c.pointer for c in whole.candidates] == beams.queries[0].pointers


def test_anchors_that_teach_nothing_are_left_out_and_none_left_is_an_error():
    poor, rich = BeamQuery(1, np.arange(4), [(0,)], [0.2]), BeamQuery(2, np.arange(4), [(0,)], [1.5])
    assert [q.query_idx for q in train_v2.as_rl_data(BeamData([poor, rich]), min_score=1.0).queries] == [2]
    with pytest.raises(UsageError, match="V2_MIN_SCORE=1.0 leaves no anchor"):
        train_v2.as_rl_data(BeamData([poor]), min_score=1.0)


def test_beams_end_where_a_next_demonstration_gains_nothing():
    pool = np.arange(10, 16)
    totals = [[2.0, 2.5], [2.0, 2.0], [1.0, 1.5], [-0.1, 0.2]]
    with_steps = BeamQuery(3, pool, [(1, 2), (1, 4), (0, 2), (5, 3)], [2.5, 2.0, 1.5, 0.2], totals)
    cut = end_where_nothing_is_gained(with_steps)
    assert list(zip(cut.pointers, cut.scores, strict=True)) == [((1, 2), 2.5), ((1,), 2.0), ((0, 2), 1.5), ((), 0.0)]
    whole = BeamQuery(3, pool, [(1, 2), (1, 4), (0, 2)], [2.5, -0.5, -2.0])
    cut = end_where_nothing_is_gained(whole)
    assert list(zip(cut.pointers, cut.scores, strict=True)) == [((1, 2), 2.5), ((), 0.0)]


def test_v2_learns_to_stop_where_demonstrations_lower_the_score(environment, world, tmp_path, capsys):
    queries = [beams_of(world, int(q)) for q in world.train_queries]
    for q in queries:  # half of the queries, told by their embedding, have no use for demonstrations, the rest for one
        sign = -1.0 if world.topic[q.query_idx, 0] > 0 else 1.0
        q.scores = [sign * (2 - 0.1 * i) for i in range(len(q.scores))]
        q.totals = [[score, score] for score in q.scores]
        order = np.argsort(q.scores)[::-1]
        q.pointers, q.scores, q.totals = ([part[i] for i in order] for part in (q.pointers, q.scores, q.totals))
    save_beam_data(tmp_path / "beams.json", BeamData(queries, "left"))
    assert load_beam_data(tmp_path / "beams.json").queries[0].totals == queries[0].totals
    assert stage("STOP=1", "V2_LR=5e-3", "V2_EPOCHS=12") == 0
    selector = PointerSelector.load(environment)
    assert selector.config.stop and selector.config.stop_shots == 2
    right = []
    for query in world.heldout_queries:
        q, c = (torch.from_numpy(world.embeddings[i])[None] for i in (query, world.pool_of(int(query))))
        right.append(len(picks(selector.select(q, c, 2))[0]) == (0 if world.topic[query, 0] > 0 else 1))
    assert np.mean(right) > 0.75
    totals = json.loads((tmp_path / "beams.json").read_text())
    for entry in totals.values():
        for beam in entry["beams"]:
            beam["totals"] = beam["totals"][:1]
    (tmp_path / "beams.json").write_text(json.dumps(totals))
    with pytest.raises(DamagedInputError, match="one number per pick"):
        load_beam_data(tmp_path / "beams.json")
