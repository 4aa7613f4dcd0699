"""Files of the user's own: the examples of docs/extending.md run, and a wrong one is one line."""

import ast
import importlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from lever_plus import config, registries
from lever_plus.data import methods, rivals, samplers
from lever_plus.rl.losses import STD_EPSILON, group_advantages
from lever_plus.rl.planted import Planted, PlantedWorld
from lever_plus.selectors import PointerSelector, SelectorConfig
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from lever_plus.settings.selector import TrainV3Settings
from lever_plus.stages import train_v3
from open_mmicl import registry
from open_mmicl.errors import MissingInputError, UsageError
from tests.data.test_rivals import world  # noqa: F401 - a fixture
from tests.stages.test_train_v3 import stage

PAGE = (config.REPO_ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """What a test adds to the registries is gone after it."""
    for one in registries.ALL:
        for home in one.homes:
            importlib.import_module(home)
        monkeypatch.setattr(one, "_entries", dict(one._entries))
    monkeypatch.setattr(registry, "_loaded", {})


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "my file.py"
    path.write_text(EXAMPLES, encoding="utf-8")
    return path


@pytest.mark.parametrize("one", registries.ALL, ids=lambda one: one.kind)
def test_names_read_from_the_source_are_those_that_are_registered(one):
    assert list(one) == list(one.helps()) and set(one) == set(one._entries) and len(one) > 1
    for name in one:
        assert one.entry(name).help == one.helps()[name] and one.get(name) is one.entry(name).value


def test_the_page_has_the_packages_choices_and_an_example_of_each_registry():
    assert PAGE.endswith(registries.tables() + "\n")
    kinds = {
        node.value.id
        for node in ast.walk(ast.parse(EXAMPLES))
        if isinstance(node, ast.Attribute) and node.attr == "add"
    }
    assert kinds == {one.symbol for one in registries.ALL}


def test_the_pages_file_can_be_the_first_to_import_the_package(plugin, tmp_path):
    code = (
        "from lever_plus.settings.loading import load; from lever_plus.settings.selector import TrainV3Settings as T; "
        "from lever_plus.registries import ALL; load(T, {'RCE_OBJECTIVE': 'advantage', 'SAMPLER': 'near_and_far'}); "
        "print([name for one in ALL for name in one if one.file_of(name)])"
    )
    env = {**os.environ, "LEVER_PLUGINS": str(plugin), "DATASET": "mini_okvqa", "RESULT_DIR": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=config.REPO_ROOT)
    assert said.returncode == 0, said.stderr
    mine = ["advantage", "brief_and_right", "euclidean", "near_and_far", "same_length", "careful", "bars"]
    assert said.stdout.strip() == str(mine)


def test_a_sampler_of_ones_own_makes_the_pools(plugin):
    registries.load_plugins(str(plugin))
    images = np.arange(12) // 2
    table = {"image": torch.randn(12, 4, generator=torch.Generator().manual_seed(0))}
    asked = dict(query_rows=np.arange(5), query_image_ids=images, train_image_ids=images, k=6, seed=3, same_split=True)
    pools = samplers.sample_pools("near_and_far", **asked, query_features=table, train_features=table)
    near = samplers.sample_pools("img_sim_sampler", **asked, query_features=table, train_features=table)
    assert pools.shape == (5, 6) and (pools[:, :3] == near[:, :3]).all()
    for row, pool in enumerate(pools):
        assert len(set(pool)) == 6 and not set(pool) & {row - row % 2, row - row % 2 + 1}
    assert samplers.read_by("near_and_far") == ("image",) and samplers.read_by("RandSampler") == ()


@pytest.mark.parametrize(
    "given, said",
    [("[[0, 1]]", "holds an item with the query's own image"), ("[[3, 3]]", "2 distinct train rows"),
     ("[[3, 9]]", "2 distinct train rows"), ("[[3]]", "expected whole numbers [1, 2]"),
     ("[[3.0, 4.0]]", "expected whole numbers")],
)  # fmt: skip
def test_a_sampler_that_samples_wrongly_is_told(tmp_path, given, said):
    path = tmp_path / "my.py"
    path.write_text(
        "import numpy as np\nfrom lever_plus.registries import SAMPLERS\n@SAMPLERS.add('mine', 'x')\n"
        f"def f(asking):\n    return np.array({given})\n"
    )
    registries.load_plugins(str(path))
    images = np.array([0, 1, 2, 3, 4])
    with pytest.raises(UsageError, match=re.escape(said)):
        samplers.sample_pools(
            "mine", query_rows=[0], query_image_ids=images, train_image_ids=images, k=2, seed=0, same_split=True
        )


def test_help_and_settings_need_no_torch():
    code = (
        "import sys, lever_plus.settings.help as h; h.main(['train_v3', 'inference']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=config.REPO_ROOT).returncode == 0


def test_a_training_with_reward_loss_and_scorer_of_ones_own(monkeypatch, plugin, tmp_path, capsys):
    files, out = tmp_path / "planted", tmp_path / "out"
    Planted(PlantedWorld(queries=40, heldout=20, items=100, pool=8, pointers=4, dim=8, topic_dim=4, seed=5)).write(
        files
    )
    given = {
        "LEVER_PLUGINS": plugin, "REWARD_MODE": "brief_and_right", "RCE_OBJECTIVE": "advantage", "SCORER": "euclidean",
    }  # fmt: skip
    assert stage(monkeypatch, files, out, **given) == 0
    assert PointerSelector.load(out / "rce_epoch1.pt").config.scorer == "euclidean"
    capsys.readouterr()
    assert stage(monkeypatch, files, out, **given) == 0
    assert "done before with the same inputs and settings" in capsys.readouterr().out
    plugin.write_text(EXAMPLES.replace("alpha / 10", "alpha / 20"), encoding="utf-8")
    monkeypatch.setattr(registry, "_loaded", {})
    for one in registries.ALL:
        monkeypatch.setattr(one, "_entries", {n: e for n, e in one._entries.items() if e.file is None})
    assert stage(monkeypatch, files, out, "-n", **given) == 0
    assert train_v3.STATES["stale"] in capsys.readouterr().out


def test_the_loss_of_the_page_is_what_it_says(plugin):
    registry.load_file(plugin)
    log_probs, rewards = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    mask = torch.tensor([[True] * 4, [True, True, False, False]] + [[True, True, True, False]] * 3)
    rewards[~mask] = torch.nan
    got = registries.RCE_LOSSES.get("advantage")(log_probs, rewards, mask, 2.0)
    centred = group_advantages(rewards, mask, "none")
    assert STD_EPSILON < 1 and torch.isclose(got, -((centred * log_probs).sum(1) / mask.sum(1)).mean() / 2)


def test_a_rival_of_ones_own_is_a_method(plugin, world, tmp_path):  # noqa: F811
    settings = load(
        InferenceSettings, {}, {"LEVER_PLUGINS": str(plugin), "RESULT_DIR": str(tmp_path), "DATASET": "mini_okvqa"}
    )
    assert "same_length" in methods.chosen(settings)
    train, val, items, asked = world
    asking = rivals.Asking(val, np.arange(10), train, 3, {"queries": asked, "train": items}.__getitem__)
    picked = rivals.picks("same_length", asking)
    for row, some in enumerate(picked):
        apart = [abs(len(text.split()) - len(val.question(row).split())) for text in train.texts]
        free = [i for i in range(len(train)) if train.image_ids[i] != val.image_ids[row]]
        assert some.tolist() == sorted(free, key=lambda i: (apart[i], i))[:3]


@pytest.mark.parametrize(
    "body, said",
    [
        ("raise ValueError('no')", "my.py:1: ValueError: no"),
        ("def f(:\n", "my.py:1: SyntaxError"),
        ("import no_such_module", "my.py:1: ModuleNotFoundError"),
        ("from lever_plus.registries import REWARDS\n@REWARDS.add('plan', 'x')\ndef f(a, r): pass", "'plan' is taken"),
        ("from lever_plus.registries import REWARDS\n@REWARDS.add('a b', 'x')\ndef f(a, r): pass", "letters, digits"),
        ("raise SystemExit('gone')", "my.py:1: SystemExit: gone"),
    ],
)
def test_a_file_that_fails_is_one_line(tmp_path, body, said):
    path = tmp_path / "my.py"
    path.write_text(body, encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(said)) as found:
        load(TrainV3Settings, {}, {"LEVER_PLUGINS": str(path), "RESULT_DIR": str(tmp_path)})
    assert "\n" not in str(found.value)
    with pytest.raises(MissingInputError, match="not found"):
        registries.load_plugins(str(tmp_path / "other.py"))


def test_a_reward_that_fails_names_its_line(monkeypatch, tmp_path, capsys):
    path, files = tmp_path / "my.py", tmp_path / "planted"
    path.write_text(
        "from lever_plus.registries import REWARDS\n@REWARDS.add('bad', 'x')\ndef bad(a, r):\n    return 1 / 0\n"
    )
    Planted(PlantedWorld(queries=10, heldout=5, items=50, pool=8, pointers=4, dim=8, topic_dim=4, seed=5)).write(files)
    assert stage(monkeypatch, files, tmp_path / "out", LEVER_PLUGINS=path, REWARD_MODE="bad") == 2
    assert f"bad of plugin file {path}:4: ZeroDivisionError" in capsys.readouterr().err
    path.write_text(
        "from lever_plus.registries import REWARDS\n@REWARDS.add('bad', 'x')\ndef bad(a, r):\n    return float('nan')\n"
    )
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registries.REWARDS, "_entries", {})
    assert stage(monkeypatch, files, tmp_path / "out", LEVER_PLUGINS=path, REWARD_MODE="bad") == 5


@pytest.mark.parametrize("broken, said", [("[[0, 0, 1]]", "twice"), ("[[0, 1, 999]]", "rows"), ("[0]", "shape")])
def test_a_rival_that_picks_wrongly_is_told(tmp_path, world, broken, said):  # noqa: F811
    path = tmp_path / "my.py"
    path.write_text(
        f"import numpy as np\nfrom lever_plus.registries import RIVALS\n@RIVALS.add('mine', 'x')\n"
        f"def f(asking):\n    return np.array({broken})\n"
    )
    registry.load_file(path)
    train, val, items, asked = world
    with pytest.raises(UsageError, match=said):
        rivals.picks("mine", rivals.Asking(val, np.arange(1), train, 3, {"queries": asked, "train": items}.__getitem__))


def test_a_scorer_with_a_scalar_parameter_is_refused(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(EXAMPLES.replace("torch.full((1,), 10.0)", "torch.tensor(10.0)"), encoding="utf-8")
    registry.load_file(path)
    with pytest.raises(UsageError, match="scorer euclidean: scale has no dimension"):
        PointerSelector(SelectorConfig(scorer="euclidean"))
