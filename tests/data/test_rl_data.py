import json

import numpy as np
import pytest

from lever_plus.data.beam_data import (
    BeamData,
    BeamQuery,
    find_sampler_cache,
    load_beam_data,
    load_pools,
    save_beam_data,
)
from lever_plus.data.rl_data import RlCandidate, RlData, RlQuery, load_rl_data, save_rl_data
from open_mmicl.errors import DamagedInputError, MissingInputError
from tests.data import make


def pointers(data):
    return {q.query_idx: [list(c.pointer) for c in q.candidates] for q in data.queries}


@pytest.mark.parametrize("pool_name", ["candidate_pool_ids", "candidate_pool_indices"])
def test_local_form(tmp_path, pool_name):
    data = load_rl_data(make.write(tmp_path / "rl.json", make.rl_json("local", pool_name)), make.ROWS)
    assert pointers(data) == make.POINTERS
    assert {q.query_idx: q.pool_ids.tolist() for q in data.queries} == make.POOLS
    assert data.prompt_order == "best_first" and data.form == "local" and data.notes == []
    first, second = data.queries[0].candidates[:2]
    assert (first.beam_rank, first.beam_score, first.vqa_correct, first.vqa_acc_score) == (0, 0.25, 0, 0.0)
    assert (second.beam_score, second.vqa_correct, second.vqa_acc_score, second.temperature) == (None, 1, 0.6, 1.0)


@pytest.mark.parametrize("form", ["global_pos", "global"])
@pytest.mark.parametrize("pools", ["beam", "cache"])
def test_global_forms_take_the_pool_from_elsewhere(tmp_path, form, pools):
    path = make.write(tmp_path / "rl.json", make.rl_json(form))
    other = make.write(tmp_path / "pools.json", make.beam_json() if pools == "beam" else make.sampler_cache())
    data = load_rl_data(path, make.ROWS, beam_data=other)
    assert pointers(data) == make.POINTERS and data.form == form
    assert str(other) in data.notes[0]


@pytest.mark.parametrize("form", ["global_pos", "global"])
def test_fault_05_global_indices_without_a_pool_are_refused(tmp_path, form):
    path = make.write(tmp_path / "rl.json", make.rl_json(form))
    with pytest.raises(DamagedInputError, match="query 3.*pool cannot be rebuilt"):
        load_rl_data(path, make.ROWS)


def test_fault_05_an_index_outside_the_pool_is_an_error(tmp_path):
    content = make.rl_json("global")
    content["8"]["pointer_candidates"][1]["pointer"] = [1, 11]  # 11 is no position and no member of the pool
    path, other = make.write(tmp_path / "rl.json", content), make.write(tmp_path / "beam.json", make.beam_json())
    with pytest.raises(DamagedInputError, match="query 8, pointer: 11 is not in the query's pool"):
        load_rl_data(path, make.ROWS, beam_data=other)


def test_fault_05_a_position_outside_the_pool_is_an_error(tmp_path):
    content = make.rl_json()
    content["8"]["pointer_candidates"][1] = make.candidate([1, make.K], 1)
    with pytest.raises(DamagedInputError, match="query 8, pointer: 6 is outside 0..5"):
        load_rl_data(make.write(tmp_path / "rl.json", content), make.ROWS)


def test_own_pool_with_global_pointers_and_positions(tmp_path):
    content = make.rl_json("global_pos")
    for query, pool in make.POOLS.items():
        content[str(query)]["candidate_pool_ids"] = pool
        for c, pointer in zip(content[str(query)]["pointer_candidates"], make.POINTERS[query], strict=True):
            c["pointer_pos"] = pointer
    path = make.write(tmp_path / "rl.json", content)
    assert pointers(load_rl_data(path, make.ROWS)) == make.POINTERS
    content["3"]["pointer_candidates"][0]["pointer_pos"] = [2, 0]
    with pytest.raises(DamagedInputError, match="query 3, pointer_pos"):
        load_rl_data(make.write(path, content), make.ROWS)


def test_repaired_files_keep_stale_positions_of_the_union_pool(tmp_path):
    content = make.rl_json()
    for entry in content.values():
        for c in entry["pointer_candidates"]:
            c["pointer_pos"] = [4000, 17]
    assert pointers(load_rl_data(make.write(tmp_path / "rl.json", content), make.ROWS)) == make.POINTERS


def test_odd_but_legal_files_of_the_original_lever_plus(tmp_path):
    content = {"_meta": {"fix_version": "v4"}, **make.rl_json()}
    content["3"]["query"] = {"query_id": 3, "question_id": "77"}
    content["3"]["pointer_candidates"][0].update(vqa_correct=1, vqa_acc_score=0.0)  # they disagree
    content["3"]["pointer_candidates"].append(make.candidate([0, 2], 1))  # the first one once more
    content["8"]["pointer_candidates"].append(make.candidate([5, 1], 1, vqa_eval_mode="fallback"))
    content["8"]["pointer_candidates"].append(make.candidate([5, 2], 1, eval_failed=True))
    content["9"] = {"pointer_candidates": [make.candidate([5, 2], 1)], "_fix_failed": True}
    content["11"] = {"candidate_pool_ids": make.POOLS[8], "pointer_candidates": []}
    data = load_rl_data(make.write(tmp_path / "rl.json", content), make.ROWS)
    assert pointers(data) == make.POINTERS
    assert data.queries[0].candidates[0].vqa_correct == 0
    assert len(data.notes) == 6


def test_fault_09_unscored_answers_never_count_as_wrong(tmp_path):
    content = make.rl_json()
    for mode in ("error", "fallback"):
        content["8"]["pointer_candidates"] = [make.candidate([1, 2], 1, vqa_eval_mode=mode)]
        data = load_rl_data(make.write(tmp_path / "rl.json", content), make.ROWS)
        assert [q.query_idx for q in data.queries] == [3]


def test_prompt_order_is_read_and_must_agree(tmp_path):
    content = make.rl_json()
    for entry in content.values():
        entry["prompt_order"] = "best_last"
    path = make.write(tmp_path / "rl.json", content)
    assert load_rl_data(path).prompt_order == "best_last"
    content["3"]["prompt_order"] = "best_first"
    with pytest.raises(DamagedInputError, match="disagree"):
        load_rl_data(make.write(path, content))


def test_round_trip_is_exact_and_deterministic(tmp_path):
    rng = np.random.default_rng(0)
    queries = []
    for query in (7, 2):
        pool = np.setdiff1d(rng.permutation(500), [query])[:64]
        candidates = [
            RlCandidate(
                tuple(rng.permutation(64)[:2].tolist()),
                "sample",
                None,
                float(rng.normal()),
                float(rng.normal()),
                1.3,
                "a b",
                1,
                0.3,
                0.7,
                "official",
            )
            for _ in range(3)
        ]
        queries.append(RlQuery(query, pool, candidates))
    data = RlData(queries, "best_last")
    save_rl_data(tmp_path / "a.json", data)
    again = load_rl_data(tmp_path / "a.json", 500)
    assert again.prompt_order == "best_last" and [q.query_idx for q in again.queries] == [7, 2]
    for q, r in zip(queries, again.queries, strict=True):
        assert q.candidates == r.candidates and np.array_equal(q.pool_ids, r.pool_ids)
    save_rl_data(tmp_path / "b.json", again)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_numpy_values_are_saved_as_plain_numbers(tmp_path):
    c = RlCandidate(
        (np.int64(1), np.int64(0)), "beam", np.int64(0), np.float32(0.5), None, None, "x", np.int64(1), np.float64(1.0)
    )
    save_rl_data(tmp_path / "a.json", RlData([RlQuery(0, np.array([4, 5]), [c])], "best_last"))
    stored = json.loads((tmp_path / "a.json").read_text())["0"]["pointer_candidates"][0]
    assert stored["pointer"] == [1, 0] and stored["pointer_global"] == [5, 4] and stored["beam_score"] == 0.5


def test_plain_beam_data_as_rl_data(tmp_path):
    data = load_rl_data(make.write(tmp_path / "beam.json", make.beam_json()), make.ROWS)
    assert data.form == "beam_data" and data.prompt_order == "best_last"
    assert pointers(data) == make.POINTERS
    best = data.queries[0].candidates[0]
    assert (best.gen_method, best.beam_rank, best.beam_score, best.vqa_correct, best.vqa_acc_score) == (
        "beam",
        0,
        0.5,
        None,
        None,
    )


def test_beam_data_pick_order_follows_the_construct_order(tmp_path):
    left = load_beam_data(make.write(tmp_path / "a.json", make.beam_json()), make.ROWS)
    assert {q.query_idx: [list(p) for p in q.pointers] for q in left.queries} == make.POINTERS
    named = make.write(tmp_path / "vqa-construct_order:right-x.json", make.beam_json())
    right = load_beam_data(named, make.ROWS)
    assert right.construct_order == "right"
    assert right.queries[0].pointers == [tuple(reversed(p)) for p in make.POINTERS[3]]


@pytest.mark.parametrize("order", ["left", "right"])
def test_beam_round_trip(tmp_path, order):
    queries = [
        BeamQuery(q, np.array(pool), [tuple(p) for p in make.POINTERS[q]], [0.3, 0.2, 0.1][: len(make.POINTERS[q])])
        for q, pool in make.POOLS.items()
    ]
    save_beam_data(tmp_path / "a.json", BeamData(queries, order))
    again = load_beam_data(tmp_path / "a.json", make.ROWS)
    assert again.construct_order == order
    assert [(q.query_idx, q.pointers, q.scores) for q in again.queries] == [
        (q.query_idx, q.pointers, q.scores) for q in queries
    ]
    content = json.loads((tmp_path / "a.json").read_text())["3"]
    pool, pointer = make.POOLS[3], make.POINTERS[3][0]
    in_prompt = pointer[::-1] if order == "left" else pointer  # left: the last pick stands first
    assert content["id_list"][0] == [*(pool[p] for p in in_prompt), 3]


def test_beams_come_best_first(tmp_path):
    content = make.beam_json()
    content["8"]["score_list"] = [0.1, 0.9]
    data = load_beam_data(make.write(tmp_path / "a.json", content), make.ROWS)
    assert data.queries[1].scores == [0.9, 0.1]
    assert data.queries[1].pointers == [tuple(p) for p in make.POINTERS[8][::-1]]


def test_old_beam_data_finds_its_sampler_cache(tmp_path):
    model, search = "okvqa_local-Qwen2_5-VL-3B-Instruct-RandSampler", "construct_order:left-beam_size:5-few_shot:2"
    name = f"vqa-{model}-scorer:infoscore-{search}-candidate_num:64-sample_num:800.json"
    path = make.write(tmp_path / "okvqa" / "generated_data" / name, make.beam_json(pools=False))
    with pytest.raises(DamagedInputError, match="no candidate_pool_ids"):
        load_beam_data(path, make.ROWS)
    cache = make.write(
        tmp_path / "okvqa" / "cache" / "okvqa-RandSampler-anchor_sample_num: 800:64.json", make.sampler_cache()
    )
    make.write(tmp_path / "okvqa" / "cache" / "okvqa-TextSimSampler-anchor_sample_num: 800:64.json", {"3": [1, 2]})
    assert find_sampler_cache(path) == cache.resolve()
    data = load_beam_data(path, make.ROWS)
    assert {q.query_idx: q.pool_ids.tolist() for q in data.queries} == make.POOLS and str(
        cache.resolve()
    ) in data.notes[0]


def test_pools_of_beam_data_and_of_a_sampler_cache_are_the_same(tmp_path):
    beam = make.write(tmp_path / "a.json", make.beam_json())
    cache = make.write(tmp_path / "b.json", make.sampler_cache())
    assert load_pools(beam, make.ROWS) == load_pools(cache, make.ROWS) == make.POOLS


def test_missing_file_names_the_command(tmp_path):
    with pytest.raises(MissingInputError, match="generate_rl_data.sh"):
        load_rl_data(tmp_path / "none.json")


def test_nothing_is_written_by_a_failed_save(tmp_path):
    c = RlCandidate((0, 1), "beam", beam_score=float("nan"), vqa_correct=0, vqa_acc_score=0.0)
    with pytest.raises(ValueError):
        save_rl_data(tmp_path / "a.json", RlData([RlQuery(0, np.array([4, 5]), [c])], "best_last"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pointer", [(0, -1), (1, 1), (0, 2)])
def test_a_pointer_that_is_none_is_not_saved(tmp_path, pointer):
    data = RlData(
        [RlQuery(0, np.array([4, 5]), [RlCandidate(pointer, "beam", vqa_correct=0, vqa_acc_score=0.0)])], "best_last"
    )
    with pytest.raises(ValueError, match="query 0"):
        save_rl_data(tmp_path / "a.json", data)
    assert list(tmp_path.iterdir()) == []


def test_pointers_may_end_early(tmp_path):
    content = make.rl_json()
    content["8"]["pointer_candidates"][1] = make.candidate([4], 1)
    data = load_rl_data(make.write(tmp_path / "rl.json", content), make.ROWS)
    assert [c.pointer for c in data.queries[1].candidates] == [(3, 4), (4,)]
