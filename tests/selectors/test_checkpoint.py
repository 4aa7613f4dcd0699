import dataclasses
import pickle
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from lever_plus.selectors import PointerSelector, SelectorConfig, checkpoint
from lever_plus.stages import convert_checkpoint
from open_mmicl.errors import DamagedInputError, MissingInputError
from tests.reference import old_selector

HIDDEN = 256
load_selector = partial(checkpoint.load_selector, kind=PointerSelector)
SHAPES = [(512, 1, False), (512, 3, True), (768, 2, True), (768, 1, False), (256, 1, True)]


def weights(d=512, layers=1, gate=False, hidden=HIDDEN, seed=0):
    """A state dict as the original Lever-Plus's selector has it (biases in the attention)."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    state = OrderedDict() if d == hidden else OrderedDict({"input_proj.weight": random(hidden, d)})
    for i in range(layers):
        state[f"cross_attn_layers.{i}.in_proj_weight"] = random(3 * hidden, hidden)
        state[f"cross_attn_layers.{i}.in_proj_bias"] = random(3 * hidden)
        state[f"cross_attn_layers.{i}.out_proj.weight"] = random(hidden, hidden)
        state[f"cross_attn_layers.{i}.out_proj.bias"] = random(hidden)
    for i in range(layers):
        state[f"attn_norms.{i}.weight"] = 1 + random(hidden)
        state[f"attn_norms.{i}.bias"] = random(hidden)
    state["query_proj.weight"] = random(hidden, hidden)
    state["cand_proj.weight"] = random(hidden, hidden)
    if gate:
        state["query_update_gate.weight"] = random(hidden, 2 * hidden)
        state["query_update_gate.bias"] = random(hidden)
    return state


def one_layer_names(state):
    """The older names of the one-layer form."""
    return OrderedDict(
        (n.replace("cross_attn_layers.0.", "cross_attn.").replace("attn_norms.0.", "attn_norm."), v)
        for n, v in state.items()
    )


def lightning(state, prefix="lever_lm.pointer_selector."):
    clip = {
        "lever_lm.img_model.vision_model.embeddings.class_embedding": torch.zeros(4),
        "lever_lm.sen_model.text_projection.weight": torch.zeros(4, 4),
    }
    named = OrderedDict({**clip, **{prefix + name: value for name, value in state.items()}})
    return {
        "epoch": 9,
        "global_step": 100,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": named,
        "hyper_parameters": {"lr": 1e-4},
    }


def v3(state):
    return {"epoch": 7, "phase": "rce", "model_state_dict": state, "kl_beta": 0.1, "metrics": {"val_loss": 3.2}}


CONTAINERS = {
    "v2 lightning": (lambda s: lightning(s), "v2"),
    "v2 short prefix": (lambda s: lightning(s, "lever_lm."), "v2"),
    "v3": (v3, "v3"),
    "v3 with both": (
        lambda s: {**v3(s), "state_dict": {f"lever_lm.pointer_selector.{n}": t for n, t in s.items()}},
        "v3",
    ),
    "bare": (lambda s: s, "state_dict"),
    "bare, prefixed": (lambda s: {f"lever_lm.pointer_selector.{n}": t for n, t in s.items()}, "state_dict"),
    "data parallel": (lambda s: v3({f"module.{n}": t for n, t in s.items()}), "v3"),
}


def save(path, content):
    torch.save(content, path)
    return path


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("d", "layers", "gate"), SHAPES)
def test_every_old_form_is_read(tmp_path, container, d, layers, gate):
    state = weights(d, layers, gate)
    wrap, form = CONTAINERS[container]
    loaded = load_selector(save(tmp_path / "old.ckpt", wrap(state)))
    assert loaded.info.form == form
    assert loaded.config == {
        "input_dim": d,
        "hidden_dim": HIDDEN,
        "num_layers": layers,
        "attn_bias": True,
        "query_update_gate": gate,
    }
    assert loaded.state_dict.keys() == state.keys()
    assert all(torch.equal(loaded.state_dict[name], state[name]) for name in state)


@pytest.mark.parametrize("container", ["v2 lightning", "v2 short prefix", "bare"])
def test_older_names_of_the_one_layer_form(tmp_path, container):
    state = weights()
    loaded = load_selector(save(tmp_path / "old.ckpt", CONTAINERS[container][0](one_layer_names(state))))
    assert loaded.state_dict.keys() == state.keys()
    assert all(torch.equal(loaded.state_dict[name], state[name]) for name in state)
    text = "\n".join(loaded.info.lines)
    assert (
        "cross_attn.* -> cross_attn_layers.0.* (4 tensors)" in text
        and "attn_norm.* -> attn_norms.0.* (2 tensors)" in text
    )
    assert ("left out lever_lm.img_model.* (1 tensors)" in text) == (container != "bare")


@pytest.mark.parametrize("container", ["v2 lightning", "v3"])
@pytest.mark.parametrize(("d", "layers", "gate"), SHAPES)
def test_outputs_equal_the_old_code(tmp_path, container, d, layers, gate):
    state = weights(d, layers, gate, seed=layers)
    selector = PointerSelector.load(save(tmp_path / "old.ckpt", CONTAINERS[container][0](state)))
    rng = np.random.default_rng(1)
    queries, pools = rng.normal(size=(3, d)), rng.normal(size=(3, 64, d))
    queries, pools = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (queries, pools))
    given = [[5, 0, 63, 20]] * 3
    q, c = torch.tensor(queries, dtype=torch.float32), torch.tensor(pools, dtype=torch.float32)
    with torch.no_grad():
        steps = selector.step_log_probs(selector.encode(q, c), torch.tensor(given)[:, None])[:, 0].numpy()  # (B, S, K)
        log_prob = selector.log_prob(q, c, torch.tensor(given)[:, None])[:, 0].numpy()
    for b in range(3):
        logits, _ = old_selector.forward(state, layers, queries[b], pools[b], 4, given[b])
        expected = (
            logits
            - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
            - logits.max(1, keepdims=True)
        )
        free = logits > -100
        assert np.abs(steps[b][free] - expected[free]).max() < 1e-5
        assert abs(log_prob[b] - sum(expected[s, p] for s, p in enumerate(given[b]))) < 1e-5
        assert (
            selector.select(q[b : b + 1], c[b : b + 1], 4)[0].tolist()
            == old_selector.forward(state, layers, queries[b], pools[b], 4)[1]
        )


def test_old_forward_pass_on_fixed_weights(tmp_path):
    """Numbers computed once in numpy from weights that are sines of their position; width 6 -> 4, one layer, gate."""

    def sines(start, *shape):
        return torch.sin(torch.arange(start, start + int(np.prod(shape)), dtype=torch.float64)).reshape(shape).float()

    names = {
        "input_proj.weight": (4, 6),
        "cross_attn_layers.0.in_proj_weight": (12, 4),
        "cross_attn_layers.0.in_proj_bias": (12,),
        "cross_attn_layers.0.out_proj.weight": (4, 4),
        "cross_attn_layers.0.out_proj.bias": (4,),
        "attn_norms.0.weight": (4,),
        "attn_norms.0.bias": (4,),
        "query_proj.weight": (4, 4),
        "cand_proj.weight": (4, 4),
        "query_update_gate.weight": (4, 8),
        "query_update_gate.bias": (4,),
    }
    state = {name: sines(10 * i, *shape) for i, (name, shape) in enumerate(names.items())}
    query, pool = sines(200, 1, 6), sines(300, 1, 5, 6)
    selector = PointerSelector.load(save(tmp_path / "old.pt", v3(state)))
    with torch.no_grad():
        found = selector.step_log_probs(selector.encode(query, pool), torch.tensor([[[2, 0, 4]]]))[0, 0]
    assert np.allclose(found[torch.isfinite(found)].numpy(), FIXED_LOG_PROBS, atol=1e-5)
    assert selector.select(query, pool, 3).tolist() == [FIXED_PICKS]


FIXED_LOG_PROBS = [
    -0.008221,
    -4.825659,
    -8.861323,
    -10.975966,
    -11.822201,
    -0.067036,
    -2.736909,
    -9.696556,
    -11.886114,
    -0.000796,
    -7.222154,
    -9.633716,
]
FIXED_PICKS = [0, 1, 2]


def damage(**changes):
    state = weights()
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return v3(state)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda: damage(query_proj__weight=None), "no query_proj.weight"),
        (lambda: damage(cand_proj__weight=None), "missing cand_proj.weight"),
        (lambda: damage(decoder_gru__weight_ih=torch.zeros(3)), "unknown decoder_gru.weight_ih"),
        (lambda: damage(query_proj__bias=torch.zeros(256)), "unknown query_proj.bias"),
        (
            lambda: damage(cand_proj__weight=torch.zeros(256, 255)),
            r"cand_proj.weight has shape \[256, 255\], expected \[256, 256\]",
        ),
        (
            lambda: damage(cand_proj__weight=torch.full((256, 256), float("nan"))),
            "cand_proj.weight holds values that are not finite",
        ),
        (lambda: damage(cand_proj__weight=torch.zeros(256, 256, dtype=torch.int64)), "no dense float tensor"),
        (lambda: damage(cand_proj__weight=[1, 2]), "is a list, not a tensor"),
        (
            lambda: v3({**weights(layers=3), "cross_attn_layers.5.in_proj_weight": torch.zeros(768, 256)}),
            "not this selector's weights",
        ),
        (lambda: v3({**weights(), **one_layer_names(weights())}), "both stand for"),
        (lambda: v3({"query_proj.0.weight": torch.zeros(4, 4)}), "v1 bi-encoder"),
        (lambda: v3({}), "empty"),
        (lambda: v3([1]), "no mapping"),
        (lambda: {"epoch": 3}, "unknown form"),
        (lambda: [1, 2], "holds a list"),
        (lambda: torch.zeros(3), "holds a Tensor"),
        (lambda: {**v3(weights()), "model_config": {"num_heads": 4}}, "num_heads=4"),
        (lambda: damage(temperature=torch.tensor([0.5])), "temperature is not 0.1"),
        (lambda: {"format": "lever_plus.selector/9"}, "this version reads"),
        (lambda: {"format": "lever_plus.selector/1", "config": {}}, "model_state_dict is missing"),
    ],
)
def test_fault_02_whatever_does_not_fit_is_refused(tmp_path, content, says):
    with pytest.raises(DamagedInputError, match=says):
        load_selector(save(tmp_path / "old.pt", content()))


def native(tmp_path, config=None):
    selector = PointerSelector(
        config or SelectorConfig(input_dim=24, hidden_dim=16, num_layers=2, query_update_gate=True)
    )
    selector.save(tmp_path / "new.pt", "rce", 3, {"val_loss": 1.0}, {"SEED": 1}, {})
    return selector


def test_a_tied_file_whose_two_names_differ_is_refused(tmp_path):
    native(tmp_path, SelectorConfig(input_dim=24, hidden_dim=16, tied=True))
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    content["model_state_dict"]["cand_proj.weight"][0, 0] += 1
    with pytest.raises(DamagedInputError, match="config says tied"):
        load_selector(save(tmp_path / "differs.pt", content))


def test_native_round_trip(tmp_path):
    selector = native(tmp_path)
    loaded = load_selector(tmp_path / "new.pt")
    assert (loaded.info.form, loaded.info.phase, loaded.info.epoch) == ("native", "rce", 3)
    assert SelectorConfig(**loaded.config) == selector.config
    again = PointerSelector.load(tmp_path / "new.pt").state_dict()
    assert all(torch.equal(again[name], value) for name, value in selector.state_dict().items())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_dim": "16"}, "hidden_dim='16' should be of type int"),
        ({"hidden_dim": 10**9}, "outside"),
        ({"num_layers": 3}, "missing attn_norms.2.bias"),
        ({"input_dim": 25}, "input_proj.weight has shape"),
        ({"gru_state": True}, "config: "),
        ({"scorer": "best"}, "unknown scorer"),
        ({"colour": 1}, "unknown option 'colour'"),
    ],
)
def test_native_config_must_fit(tmp_path, config, says):
    native(tmp_path)
    content = torch.load(tmp_path / "new.pt", weights_only=True)
    content["config"].update(config)
    with pytest.raises(DamagedInputError, match=says):
        load_selector(save(tmp_path / "new.pt", content))


@pytest.mark.parametrize("said", [torch.zeros(3), "7", True, None, [1], float("nan")])
def test_an_epoch_or_phase_of_another_type_is_none_at_all(tmp_path, said):
    """What a file says of its origin is words beside the weights: it can neither stop nor mislead its reading."""
    path = tmp_path / "s.pt"
    for form in ({"format": checkpoint.FORMAT}, {}):
        selector = PointerSelector(SelectorConfig(input_dim=8, hidden_dim=8))
        config = dataclasses.asdict(selector.config)
        content = {**form, "config": config, "model_state_dict": selector.state_dict(), "epoch": said, "phase": 5}
        torch.save(content, path)
        info = load_selector(path).info
        assert (info.phase, info.epoch) == (None, None)
        assert convert_checkpoint.convert(path)[0]["epoch"] == 0


def test_fault_13_a_missing_selector_is_an_error(tmp_path):
    with pytest.raises(MissingInputError, match="train_lever_lm.sh"):
        PointerSelector.load(tmp_path / "none.ckpt")


class Bomb:
    """Unpickling it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (Path(self.mark),))


class Settings:
    """Stands for the configuration objects in real Lightning files."""

    def __init__(self):
        self.lr = 1e-4


@pytest.mark.parametrize("legacy", [False, True])
def test_unsafe_files_are_refused_and_run_nothing(tmp_path, legacy):
    content = {**lightning(weights()), "hyper_parameters": {"cfg": Bomb(tmp_path / "mark")}}
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(DamagedInputError, match="convert_checkpoint.sh --trust .*old.ckpt"):
        load_selector(tmp_path / "old.ckpt")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_conversion_takes_the_weights_and_runs_nothing(tmp_path, legacy, capsys):
    state = weights(layers=2)
    content = {
        **lightning(state),
        "hyper_parameters": {"cfg": Bomb(tmp_path / "mark"), "other": Settings()},
        "callbacks": {"path": Path("x")},
    }
    path = tmp_path / "old.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    before = path.read_bytes()
    assert convert_checkpoint.main(["--trust", str(path)]) == 0
    assert "left out lever_lm.img_model.*" in capsys.readouterr().out
    assert not (tmp_path / "mark").exists()
    loaded = load_selector(path)
    assert loaded.info.form == "native" and all(torch.equal(loaded.state_dict[n], state[n]) for n in state)
    assert (tmp_path / "old.ckpt.original").read_bytes() == before
    assert convert_checkpoint.main(["--trust", str(path)]) == 2  # the first original is never overwritten


def test_conversion_of_embeddings_and_its_exit_codes(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    path = save(tmp_path / "e.pt", values)
    assert convert_checkpoint.main(["--trust", str(path), "--output", str(tmp_path / "new.pt")]) == 0
    assert torch.equal(torch.load(tmp_path / "new.pt", weights_only=True), torch.from_numpy(values))
    assert convert_checkpoint.main([str(path)]) == 2
    assert convert_checkpoint.main(["--trust", str(tmp_path / "none.pt")]) == 3
    (tmp_path / "bad.pt").write_bytes(path.read_bytes()[:100])
    assert convert_checkpoint.main(["--trust", str(tmp_path / "bad.pt")]) == 4
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    assert convert_checkpoint.main(["--trust", str(tmp_path / "plain.pkl")]) == 4
    assert not (tmp_path / "mark").exists()
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"e.pt", "new.pt", "bad.pt", "plain.pkl"}


def test_dry_run_writes_nothing(tmp_path, capsys):
    path = save(tmp_path / "old.pt", v3(weights()))
    before = path.read_bytes()
    assert convert_checkpoint.main(["-n", "--trust", str(path)]) == 0
    assert "dry run" in capsys.readouterr().out
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_numbers_of_numpy_are_plain_data(tmp_path):
    content = {**v3(weights()), "metrics": {"val_loss": np.float64(3.2), "reward": np.float32(0.5), "n": np.int64(3)}}
    assert load_selector(save(tmp_path / "old.pt", content)).info.epoch == 7
    content["metrics"]["losses"] = np.zeros(3)  # an array is an object like any other
    with pytest.raises(DamagedInputError, match="convert_checkpoint"):
        load_selector(save(tmp_path / "old.pt", content))


@pytest.mark.parametrize("shape", [(0, 0), (1 << 15, 4)])
def test_absurd_widths_are_refused(tmp_path, shape):
    with pytest.raises(DamagedInputError, match="outside"):
        load_selector(save(tmp_path / "old.pt", v3({"query_proj.weight": torch.zeros(shape)})))


def test_a_selector_of_another_width_is_damage_not_a_crash(tmp_path):
    path = save(tmp_path / "old.pt", v3(weights(512)))
    assert PointerSelector.load(path, (512, 512)).config.input_dim == 512
    with pytest.raises(DamagedInputError, match=r"widths \(512, 512\), here they have \(768, 768\)"):
        PointerSelector.load(path, (768, 768))
