"""The shape of the project: how long files are, and that nothing treats the benchmark specially."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("lever_plus/**/*.py"), *ROOT.glob("open_mmicl/**/*.py")])


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_nothing_but_its_commands_imports_the_embedded_benchmark() -> None:
    outside = [p for p in SOURCES if "mini" not in p.parts and not p.name.startswith("benchmark_")]
    assert not [name(p) for p in outside if any(m.startswith("lever_plus.mini") for m in imports(p))]


def test_the_benchmark_is_special_only_in_the_catalogue_and_the_configurations() -> None:
    """No `if mini:`; DATASET=auto is the one place that names it."""
    allowed = {"lever_plus/data/catalog.py", "lever_plus/settings/shared.py"}
    naming = set()
    for path in SOURCES:
        if "mini" in path.parts or path.name.startswith("benchmark_") or name(path) in allowed:
            continue
        strings = [
            n.value
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        docs = {
            ast.get_docstring(n, clean=False)
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
        }
        if any("mini_okvqa" in s.replace("mini_okvqa_path", "") for s in strings if s not in docs):
            naming.add(name(path))
    assert not naming


def modules_of(tree: ast.Module) -> dict[str, object]:
    """The modules of the project that a file imports as such, at once or lazily, by the name it gives them."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("lever_plus", "open_mmicl"):
            for alias in node.names:
                if importlib.util.find_spec(node.module).submodule_search_locations is not None:
                    whole = f"{node.module}.{alias.name}"
                    if importlib.util.find_spec(whole) is not None:
                        found[alias.asname or alias.name] = importlib.import_module(whole)
        lazily = isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if lazily and getattr(node.value.func, "id", "") == "lazy" and len(node.value.args) == 1:
            found[node.targets[0].id] = importlib.import_module(node.value.args[0].value)
    return found


def hidden_in(tree: ast.Module, modules: dict[str, object]) -> list[str]:
    """Where a function takes a module's attribute from a name that it has given to something of its own."""
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        inner = [node for node in ast.walk(function) if node is not function]
        own = {arg.arg for arg in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)}
        own |= {node.name for node in inner if isinstance(node, ast.FunctionDef)}
        own |= {node.id for node in inner if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        found += [
            f"line {node.lineno}: {node.value.id} is not the module here"
            for node in inner
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
            and node.value.id in own & set(modules) and hasattr(modules[node.value.id], node.attr)
        ]  # fmt: skip
    return found


def test_what_is_taken_from_a_module_is_there() -> None:
    """A function that was moved or renamed leaves no caller behind, not even one that no test reaches; nor does a local
    name hide a module that is used beside it.
    """
    gone = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        modules = modules_of(tree)
        gone += [f"{name(path)}, {hidden}" for hidden in hidden_in(tree, modules)]
        gone += [
            f"{name(path)}, line {node.lineno}: {node.value.id}.{node.attr}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules
            and not hasattr(modules[node.value.id], node.attr)
        ]  # fmt: skip
    assert gone == []


def test_files_stay_readable() -> None:
    def limit(path: Path) -> int:
        return 400 if path.parent.name == "stages" and "tests" not in path.parts else 500

    lines = {path: len(path.read_text().splitlines()) for path in [*SOURCES, *ROOT.glob("tests/**/*.py")]}
    assert {name(path): count for path, count in lines.items() if count > limit(path)} == {}


def test_settings_can_be_read_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, lever_plus.pipeline, lever_plus.settings.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_public_functions_say_what_they_do() -> None:
    missing = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
        missing += [f"{name(path)}: {n.name}" for n in public if not ast.get_docstring(n)]
        missing += [] if ast.get_docstring(tree) or path.name == "__init__.py" else [name(path)]
    assert missing == []


def test_no_unrestricted_unpickling_and_no_remote_code() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"weights_only\s*=\s*False", text) or "convert" in path.name, name(path)
        assert "trust_remote_code=True" not in text, name(path)
