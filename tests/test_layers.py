"""Who may import whom: no circles, imports at the top, and nothing below a stage knows the environment."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("lever_plus", "open_mmicl")
    for path in sorted((ROOT / package).rglob("*.py"))
}
TYPES = re.compile(r"TYPE_CHECKING|__main__")


@functools.cache
def tree(module):
    return ast.parse(SOURCES[module].read_text(encoding="utf-8"))


def named(node):
    """The modules of ours that an import, or a call of ``lazy``, names."""
    if isinstance(node, ast.Import):
        found = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        full = [f"{node.module}.{alias.name}" for alias in node.names]
        found = [one if one in SOURCES else node.module for one in full]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy" and isinstance(node.args[0], ast.Constant):
        found = [node.args[0].value]
    else:
        return set()
    return {one for one in found if one in SOURCES}


def imports(module):
    """All modules of ours that a module needs at any time, at the top, within functions, or lazily."""
    found, left = set(), [tree(module)]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and TYPES.search(ast.unparse(node.test)):
            left += node.orelse
            continue
        found |= named(node)
        left += ast.iter_child_nodes(node)
    return found - {module}


GRAPH = {module: imports(module) for module in SOURCES}


def reached(module, seen=None):
    """Everything that a module needs, directly or not."""
    seen = set() if seen is None else seen
    for other in GRAPH[module] - seen:
        seen.add(other)
        reached(other, seen)
    return seen


def test_no_module_needs_itself():
    assert {"lever_plus.cli", "open_mmicl.engine"} <= reached("lever_plus.stages.evaluation")
    assert [module for module in SOURCES if module in reached(module)] == []


def test_imports_stand_at_the_top():
    inside = [
        f"{module}: {ast.unparse(node)}"
        for module in SOURCES
        for function in ast.walk(tree(module))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert len(inside) <= 5, inside


@pytest.mark.parametrize(
    "layer, above",
    [
        ("open_mmicl", "lever_plus"),
        ("lever_plus.data", "lever_plus.stages"),
        ("lever_plus.data", "lever_plus.experiments"),
        ("lever_plus.selectors", "lever_plus.stages"),
        ("lever_plus.selectors", "lever_plus.rl"),
        ("lever_plus.rl", "lever_plus.stages"),
        ("lever_plus.rl", "lever_plus.experiments"),
        ("lever_plus.rl", "lever_plus.paths"),
        ("lever_plus.rl", "lever_plus.settings.shared"),
        ("lever_plus.rl", "lever_plus.settings.selector"),
        ("lever_plus.selectors", "lever_plus.paths"),
        ("lever_plus.selectors", "lever_plus.settings"),
        ("lever_plus.settings", "lever_plus.stages"),
        ("lever_plus.data.catalog", "lever_plus.settings"),
        ("lever_plus.data.dataset", "lever_plus.settings"),
        ("lever_plus.data.channels", "lever_plus.settings.shared"),
    ],
)
def test_a_layer_needs_none_above_it(layer, above):
    wrong = {
        module: sorted(other for other in needed if other == above or other.startswith(f"{above}."))
        for module, needed in GRAPH.items()
        if module == layer or module.startswith(f"{layer}.")
    }
    assert {module: others for module, others in wrong.items() if others} == {}


def test_functions_name_the_settings_that_they_read():
    for module in SOURCES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.arg) and node.arg == "settings" and node.annotation is not None:
                assert ast.unparse(node.annotation) != "Any", f"{module}: {node.lineno}"
