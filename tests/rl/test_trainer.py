import copy
import json
import math
import shutil

import pytest
import torch

from lever_plus.best import UNCOMPARED, read_best
from lever_plus.rl import trainer as trainer_module
from lever_plus.rl.deepspeed_engine import AnchoredAdamW, Engine, start_processes
from lever_plus.rl.objectives import GrpoObjective, KlControl
from lever_plus.rl.trainer import Phase, lr_at, score_groups
from lever_plus.selectors import PointerSelector
from open_mmicl.errors import NumericError, UsageError


def lines(folder, kind):
    records = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [r for r in records if r["kind"] == kind]


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Cut(Exception):
    """Stands for kill -9: nothing after it runs."""


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    from tests.rl.conftest import Small

    folder = tmp_path_factory.mktemp("whole")
    small = Small()
    trainer = small.trainer(folder)
    trainer.run(small.selector(), small.phases())
    return folder, trainer


def test_training_improves_the_policy_and_writes_every_epoch(small, whole_run):
    folder, trainer = whole_run
    names = {"rce_epoch1.pt", "rce_epoch2.pt", "grpo_epoch1.pt", "grpo_epoch2.pt"}
    assert names <= {p.name for p in folder.iterdir()}
    epochs = lines(folder, "epoch")
    assert [(r["phase"], r["epoch"]) for r in epochs] == [
        ("rce", 0),
        ("rce", 1),
        ("rce", 2),
        ("grpo", 0),
        ("grpo", 1),
        ("grpo", 2),
    ]
    assert len(lines(folder, "step")) == 4 * math.ceil(len(small.train) / 8)
    logged = {"loss", "reward_mean", "reward_std", "zero_variance", "kl", "entropy", "grad_norm", "lr"}
    logged |= {"val_rce_loss", "val_pairwise_accuracy", "val_expected_reward", "val_greedy_regret"}
    assert all(logged <= r.keys() for r in epochs if r["epoch"] > 0)
    assert {"ratio_mean", "clip_low", "clip_high", "kl_beta"} <= epochs[-1].keys()
    assert epochs[1]["loss"] > epochs[2]["loss"]


def test_fault_08_ratio_is_one_and_kl_zero_at_the_first_step_of_each_epoch_and_phase(whole_run):
    folder, _ = whole_run
    steps = [r for r in lines(folder, "step") if r["phase"] == "grpo"]
    first = [next(r for r in steps if r["epoch"] == epoch) for epoch in (1, 2)]
    assert [r["ratio_mean"] for r in first] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert first[0]["kl"] == pytest.approx(0.0, abs=1e-6) and first[1]["kl"] > 1e-6
    later = [r["ratio_mean"] for r in steps if r not in first]
    assert max(abs(r - 1) for r in later) > 1e-4


def test_fault_08_dropout_is_off_where_a_ratio_is_computed(small, tmp_path):
    trainer = small.trainer(tmp_path)
    trainer.run(small.selector(dropout=0.5), [small.phases(grpo=1)[1]])
    first = lines(tmp_path, "step")[0]
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert torch.load(tmp_path / "grpo_epoch1.pt", weights_only=True)["config"]["dropout"] == 0.5


def test_fault_06_kl_beta_is_what_was_set_from_the_first_step_to_the_last(whole_run):
    folder, _ = whole_run
    assert {r["kl_beta"] for r in lines(folder, "epoch") if r["phase"] == "grpo"} == {0.1}


def test_kl_adaptive_is_an_opt_in(small, tmp_path):
    objective = GrpoObjective(KlControl(0.1, adaptive=True, target=1e-9))
    small.trainer(tmp_path).run(small.selector(), [Phase("grpo", 2, 1e-3, objective)])
    assert [r["kl_beta"] for r in lines(tmp_path, "epoch")] == [0.1, 0.2, 0.4]


def test_fault_10_best_is_best_by_the_validation_metric_not_the_newest(small, tmp_path):
    trainer = small.trainer(tmp_path)
    trainer.run(small.selector(), small.phases(rce=3, grpo=3, lr=0.05))
    epochs = [r for r in lines(tmp_path, "epoch") if r["epoch"] > 0]
    top = max(epochs, key=lambda r: r["metric"])
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["phase"], best["epoch"], best["value"]) == (top["phase"], top["epoch"], top["metric"])
    assert best["file"] == f"{top['phase']}_epoch{top['epoch']}.pt" != "grpo_epoch3.pt"
    for phase in ("rce", "grpo"):
        own = max((r for r in epochs if r["phase"] == phase), key=lambda r: r["metric"])
        assert best["per_phase"][phase]["epoch"] == own["epoch"]
    assert best["metric"] == "val_expected_accuracy"


@pytest.mark.parametrize("cut", [("rce", 1, 1), ("rce", 2, 3), ("grpo", 1, 0), ("grpo", 2, 2)])
def test_a_run_cut_anywhere_goes_on_to_the_same_weights_and_log(small, whole_run, tmp_path, monkeypatch, cut):
    folder, _ = whole_run
    phase, epoch, step = cut
    real = trainer_module.Engine.step
    per_epoch = math.ceil(len(small.train) / 8)
    before = (0 if phase == "rce" else 2 * per_epoch) + (epoch - 1) * per_epoch + step
    count = 0

    def step_or_cut(self, loss, lr):
        nonlocal count
        count += 1
        if count == before + 1:
            raise Cut
        return real(self, loss, lr)

    monkeypatch.setattr(trainer_module.Engine, "step", step_or_cut)
    with pytest.raises(Cut):
        small.trainer(tmp_path).run(small.selector(), small.phases())
    trained_before = count - 1
    (tmp_path / "train_log.jsonl").open("a").write('{"kind": "st')  # a torn line
    # Once an epoch is saved, the weights that the second run is given must not matter.
    small.trainer(tmp_path).run(small.selector(seed=0 if (phase, epoch) == ("rce", 1) else 9), small.phases())
    assert count - 1 - trained_before == 4 * per_epoch - before + step  # only the epoch that was cut off, again
    for name in ("rce_epoch2.pt", "grpo_epoch1.pt", "grpo_epoch2.pt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    timeless = [{k: v for k, v in r.items() if k not in ("seconds", "queries_per_s")} for r in lines(tmp_path, "epoch")]
    assert timeless == [
        {k: v for k, v in r.items() if k not in ("seconds", "queries_per_s")} for r in lines(folder, "epoch")
    ]
    assert lines(tmp_path, "step") == lines(folder, "step")


def test_cut_between_checkpoint_and_pointer_repeats_the_epoch(small, whole_run, tmp_path, monkeypatch):
    folder, _ = whole_run
    real = trainer_module.io.write_json

    def cut_pointer(path, value, indent=None):
        if path.name == "latest.json" and value["phase"] == "grpo":
            raise Cut
        real(path, value, indent)

    monkeypatch.setattr(trainer_module.io, "write_json", cut_pointer)
    with pytest.raises(Cut):
        small.trainer(tmp_path).run(small.selector(), small.phases())
    monkeypatch.setattr(trainer_module.io, "write_json", real)
    small.trainer(tmp_path).run(small.selector(seed=5), small.phases())
    assert equal(weights(tmp_path / "grpo_epoch2.pt"), weights(folder / "grpo_epoch2.pt"))


def test_a_finished_run_trains_nothing_again(small, whole_run, tmp_path, monkeypatch):
    folder, _ = whole_run
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.setattr(trainer_module.Engine, "step", None)
    small.trainer(tmp_path / "copy").run(small.selector(), small.phases())
    for path in folder.glob("*_epoch*.pt"):
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


def test_going_on_under_another_zero_stage_is_refused(small, tmp_path, monkeypatch):
    real = trainer_module.Trainer._save
    monkeypatch.setattr(
        trainer_module.Trainer, "_save", lambda self, e, p, n, *rest: real(self, e, p, n, *rest) if n == 1 else _cut()
    )
    with pytest.raises(Cut):
        small.trainer(tmp_path).run(small.selector(), small.phases())
    with pytest.raises(UsageError, match="ZERO_STAGE=0 and cannot resume with ZERO_STAGE=1"):
        small.trainer(tmp_path, zero_stage=1).run(small.selector(), small.phases())


def _cut():
    raise Cut


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_trains_the_same_and_goes_on_where_it_was_cut(small, whole_run, tmp_path, monkeypatch, stage):
    folder, _ = whole_run
    real = trainer_module.Trainer._save

    def save_then_cut(self, engine, phase, epoch, *rest):
        real(self, engine, phase, epoch, *rest)
        if (phase.name, epoch) == ("grpo", 1):
            raise Cut

    monkeypatch.setattr(trainer_module.Trainer, "_save", save_then_cut)
    with pytest.raises(Cut):
        small.trainer(tmp_path, zero_stage=stage).run(small.selector(), small.phases())
    monkeypatch.setattr(trainer_module.Trainer, "_save", real)
    small.trainer(tmp_path, zero_stage=stage).run(small.selector(seed=3), small.phases())
    found, expected = weights(tmp_path / "grpo_epoch2.pt"), weights(folder / "grpo_epoch2.pt")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_bf16_trains_and_goes_on_with_its_master_weights(small, tmp_path, monkeypatch):
    small.trainer(tmp_path / "whole", precision="bf16").run(small.selector(), small.phases(rce=2, grpo=0))
    real = trainer_module.Trainer._save
    monkeypatch.setattr(
        trainer_module.Trainer, "_save", lambda self, e, p, n, *rest: real(self, e, p, n, *rest) if n == 1 else _cut()
    )
    with pytest.raises(Cut):
        small.trainer(tmp_path / "cut", precision="bf16").run(small.selector(), small.phases(rce=2, grpo=0))
    monkeypatch.setattr(trainer_module.Trainer, "_save", real)
    small.trainer(tmp_path / "cut", precision="bf16").run(small.selector(), small.phases(rce=2, grpo=0))
    assert equal(weights(tmp_path / "cut" / "rce_epoch2.pt"), weights(tmp_path / "whole" / "rce_epoch2.pt"))
    epochs = lines(tmp_path / "whole", "epoch")
    assert epochs[2]["loss"] < epochs[1]["loss"]


def test_a_loss_that_is_not_finite_stops_before_the_step_and_overwrites_nothing(small, tmp_path):
    trainer = small.trainer(tmp_path)
    trainer.run(small.selector(), [small.phases(rce=1)[0]])
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and "tensorboard" not in str(p)}
    bad = small.train.take(slice(None))
    bad.table = bad.table.clone()
    bad.table[bad.pool_rows[3, 2]] = math.nan
    with pytest.raises(NumericError, match="loss is nan"):
        small.trainer(tmp_path, train=bad).run(small.selector(), [small.phases(rce=3)[0]])
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("stage", [0, 3])
def test_start_decay_holds_the_weights_near_the_phases_start_and_survives_a_cut(small, tmp_path, monkeypatch, stage):
    options = {"start_decay": 30.0, "zero_stage": stage}
    small.trainer(tmp_path / "whole", **options).run(small.selector(tied=True), small.phases(grpo=3))
    real = trainer_module.Trainer._save
    monkeypatch.setattr(
        trainer_module.Trainer,
        "_save",
        lambda self, e, p, n, *rest: real(self, e, p, n, *rest) if (p.name, n) != ("grpo", 3) else _cut(),
    )
    with pytest.raises(Cut):
        small.trainer(tmp_path / "cut", **options).run(small.selector(tied=True), small.phases(grpo=3))
    monkeypatch.setattr(trainer_module.Trainer, "_save", real)
    small.trainer(tmp_path / "cut", **options).run(small.selector(seed=9, tied=True), small.phases(grpo=3))
    found = weights(tmp_path / "whole" / "grpo_epoch3.pt")
    assert equal(weights(tmp_path / "cut" / "grpo_epoch3.pt"), found)
    assert torch.equal(found["query_proj.weight"], found["cand_proj.weight"])

    small.trainer(tmp_path / "free", zero_stage=stage).run(small.selector(tied=True), small.phases(grpo=3))
    moved = {}
    for name in ("whole", "free"):
        start, end = weights(tmp_path / name / "rce_epoch2.pt"), weights(tmp_path / name / "grpo_epoch3.pt")
        moved[name] = sum((end[k] - start[k]).square().sum().item() for k in end) ** 0.5
    assert 0.1 * moved["free"] < moved["whole"] < 0.9 * moved["free"]


def test_start_decay_pulls_each_step_by_its_share_towards_the_weights_before_the_first_step():
    p, plain = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    anchored = AnchoredAdamW([p], lr=0.1, weight_decay=0.0, start_decay=2.0)
    adam = torch.optim.AdamW([plain], lr=0.1, weight_decay=0.0)
    for gradient in ([1.0, 0.5], [2.0, -1.0], [0.3, 0.3]):
        before, plain_before = p.detach().clone(), plain.detach().clone()
        p.grad, plain.grad = torch.tensor(gradient), torch.tensor(gradient)
        anchored.step(), adam.step()
        pull = 0.2 * (torch.tensor([1.0, -2.0]) - before)
        torch.testing.assert_close(p.detach() - before - pull, plain.detach() - plain_before)


@pytest.mark.parametrize("stage", [0, 1])
def test_gradients_are_clipped_as_torch_clips_them(stage):
    torch.manual_seed(0)
    plain, inputs = torch.nn.Linear(4, 3), torch.randn(3, 5, 4)
    optimiser = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
    engine = Engine(
        copy.deepcopy(plain), start_processes("cpu"), lr=0.01, weight_decay=0.1, grad_clip=1.5, batch=1,
        zero_stage=stage,
    )  # fmt: skip
    norms = []
    for scale, given in zip((10.0, 0.1, 1.0), inputs, strict=True):  # Adam's first step alone has no scale
        optimiser.zero_grad()
        (scale * plain(given).square().sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.5)))
        optimiser.step()
        norm = engine.step(scale * engine.module(given).square().sum(), 0.01)
        assert norm == pytest.approx(norms[-1], rel=1e-4)
    assert min(norms) < 1.5 < max(norms)
    for name, weight in engine.state_dict().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], atol=1e-5, rtol=1e-5)
    engine.close()


def test_groups_that_say_nothing_leave_the_weights_alone(small, tmp_path):
    same = small.train.take(slice(None))
    same.rewards = torch.full_like(same.rewards, 0.7)
    selector = small.selector()
    start = {k: v.clone() for k, v in selector.state_dict().items()}
    trainer = small.trainer(tmp_path, train=same, weight_decay=0.0)
    trainer.run(selector, [small.phases(grpo=2, beta=0.0)[1]])
    for name, value in weights(tmp_path / "grpo_epoch2.pt").items():
        torch.testing.assert_close(value, start[name], atol=1e-7, rtol=0)
    assert all(r["zero_variance"] == 1.0 for r in lines(tmp_path, "step"))


def test_empty_and_single_groups_train_beside_full_ones(small, tmp_path):
    ragged = small.train.take(slice(None))
    ragged.mask = ragged.mask.clone()
    ragged.mask[0] = False
    ragged.mask[1, 1:] = False
    trainer = small.trainer(tmp_path, train=ragged)
    trainer.run(small.selector(), small.phases(rce=1, grpo=1, mode="exact"))
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "grpo_epoch1.pt").values())


def test_without_held_out_queries_nothing_is_compared_and_the_last_epoch_is_taken(small, tmp_path):
    trainer = small.trainer(tmp_path, val=small.val.take(slice(0, 0)), keep_checkpoints=1)
    trainer.run(small.selector(), small.phases(rce=2, grpo=1))
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["file"], best["metric"], best["value"]) == ("grpo_epoch1.pt", UNCOMPARED, None)
    assert best["per_phase"]["rce"]["file"] == "rce_epoch2.pt" and best["per_phase"]["rce"]["value"] is None
    assert read_best(tmp_path / "best.json")["phase"] == "grpo"
    shutil.rmtree(tmp_path)
    trainer = small.trainer(tmp_path, val=small.val.take(slice(0, 0)))
    trainer.run(small.selector(), small.phases(rce=2, grpo=0))
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["metric"] == UNCOMPARED and best["epoch"] == 2 and best["value"] is None


def test_keep_checkpoints_keeps_the_newest_and_the_best(small, tmp_path):
    trainer = small.trainer(tmp_path, keep_checkpoints=1)
    trainer.run(small.selector(), small.phases(rce=4, grpo=0, lr=0.05))
    best = trainer.best()["epoch"]
    assert {p.name for p in tmp_path.glob("*.pt")} == {f"rce_epoch{best}.pt", "rce_epoch4.pt"}


def test_patience_stops_a_phase(small, tmp_path):
    trainer = small.trainer(tmp_path, patience=2, metric="val_rce_loss")
    trainer.run(small.selector(), small.phases(rce=30, grpo=0, lr=0.05))
    trained = [r for r in lines(tmp_path, "epoch") if r["epoch"] > 0]
    best = min(trained, key=lambda r: r["val_rce_loss"])["epoch"]
    assert len(trained) == best + 2 < 30


def test_batches_count_query_groups(small, tmp_path):
    trainer = small.trainer(tmp_path, batch_size=len(small.train))
    trainer.run(small.selector(), small.phases(rce=2, grpo=0))
    assert len(lines(tmp_path, "step")) == 2


def test_exact_mode_with_whole_pool_kl_keeps_the_policy_nearer(small, tmp_path):
    kl = {}
    for name, options in {"free": {"beta": 0.0}, "held": {"beta": 2.0}}.items():
        trainer = small.trainer(tmp_path / name)
        trainer.run(small.selector(), [small.phases(mode="exact", pool_kl=True, grpo=3, **options)[1]])
        kl[name] = lines(tmp_path / name, "epoch")[-1]["kl"]
    assert kl["held"] < 0.5 * kl["free"]


def test_scores_of_all_groups_equal_log_prob(small):
    selector = small.selector(query_update_gate=True).eval()
    groups = small.train
    expected = selector.log_prob(groups.queries, groups.table[groups.pool_rows], groups.pointers)
    found, greedy, _ = score_groups(selector, groups, greedy=True)
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(greedy, selector.select(groups.queries, groups.table[groups.pool_rows], 2))
    old = trainer_module.ITEM_TABLE_LIMIT
    try:
        trainer_module.ITEM_TABLE_LIMIT = 0
        torch.testing.assert_close(score_groups(selector, groups)[0], expected.detach(), atol=1e-5, rtol=1e-5)
    finally:
        trainer_module.ITEM_TABLE_LIMIT = old


def test_learning_rate_schedules():
    assert [lr_at(s, 10, 1.0, "constant", 2) for s in (0, 1, 2, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [lr_at(s, 10, 1.0, "linear", 0) for s in (0, 5, 9)] == pytest.approx([1.0, 0.5, 0.1])
    assert lr_at(5, 10, 1.0, "cosine", 0) == pytest.approx(0.5)


def test_checkpoints_load_by_the_public_api(whole_run):
    folder, _ = whole_run
    loaded = PointerSelector.load(folder / "grpo_epoch2.pt").state_dict()
    assert equal(loaded, weights(folder / "grpo_epoch2.pt")) and not equal(loaded, weights(folder / "grpo_epoch1.pt"))
