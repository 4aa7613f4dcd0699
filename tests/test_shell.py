"""The shell round the scripts: however they are started they do the same, and .env means the same as in Python."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_plus import config
from open_mmicl.errors import DamagedInputError

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "train_v3_rce_only.sh"
SHOW = "import os, sys\nprint(*sys.argv[1:], os.environ['RCE_EPOCHS'], os.environ['SAMPLER'])\n"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The entry points in a folder with blanks, a colon and non-ASCII letters, their Python replaced by ``SHOW``."""
    root = tmp_path_factory.mktemp("a clone") / "über: 示例 $HOME"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copy(ROOT / "requirements.txt", root)
    (root / "lever_plus").mkdir()
    for name, text in (("__init__.py", ""), ("pipeline.py", SHOW)):
        (root / "lever_plus" / name).write_text(text)
    shutil.copy(ROOT / "lever_plus" / "dotenv.py", root / "lever_plus")
    return root


def start(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name not in ("RCE_EPOCHS", "SAMPLER")}
    return subprocess.run(
        command, cwd=cwd, env={**environment, "PATH": path, **env}, capture_output=True, text=True, check=False
    )


STARTS = {
    "bash": (["bash", "{script}"], {}),
    "sh": (["sh", "{script}"], {}),
    "bash as sh": (["bash", "--posix", "{script}"], {}),
    "the file itself": (["{script}"], {}),
    "a symbolic link": (["bash", "{link}"], {}),
    "CDPATH of the folder": (["bash", "scripts/" + SCRIPT], {"CDPATH": "."}),
    "CDPATH of another": (["bash", "scripts/" + SCRIPT], {"CDPATH": "{decoy}"}),
    "options of the shell": (["bash", "{script}"], {"SHELLOPTS": "noclobber:noglob:posix"}),
    "POSIXLY_CORRECT": (["bash", "{script}"], {"POSIXLY_CORRECT": "1"}),
    "the C locale": (["bash", "{script}"], {"LC_ALL": "C"}),
    "no home": (["bash", "{script}"], {"HOME": ""}),
    "PYTHONSAFEPATH": (["bash", "{script}"], {"PYTHONSAFEPATH": "1"}),
}


@pytest.mark.parametrize("name", STARTS)
def test_however_it_is_started_a_script_does_the_same(name: str, clone: Path, tmp_path: Path) -> None:
    link, decoy = tmp_path / "my own name", tmp_path / "decoy"
    link.symlink_to(clone / "scripts" / SCRIPT)
    (decoy / "scripts").mkdir(parents=True)
    places = {"script": str(clone / "scripts" / SCRIPT), "link": str(link), "decoy": str(decoy)}
    words, env = STARTS[name]
    command, more = [word.format(**places) for word in words], {n: v.format(**places) for n, v in env.items()}
    inside = command[-1].startswith("scripts/")
    done = start([*command, "3", "mix_sampler", "12"], clone if inside else tmp_path, **more)
    assert (done.returncode, done.stdout, done.stderr) == (0, "v3 12 mix_sampler\n", "")
    assert f"bash scripts/{SCRIPT}" in start([*command, "--help"], clone if inside else tmp_path, **more).stdout

@pytest.mark.parametrize(
    ("venv", "said", "code"),
    [("a link to one that is complete", "v3 10 rand_sampler", 0),
     ("a file", "cannot make .*remove what is there", 3),
     ("a link to nothing that can be made", "cannot make .*remove what is there", 3)],
)  # fmt: skip
def test_without_an_active_environment_dot_venv_is_used_or_its_fault_is_told(
    venv: str, said: str, code: int, clone: Path, tmp_path: Path
) -> None:
    """The Python on PATH is a bare one (``-S``: without its packages), as on a new machine."""
    root, bare = tmp_path / "clone", tmp_path / "bin"
    shutil.copytree(clone, root)
    bare.mkdir()
    for name in ("python3", "python"):
        (bare / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
        (bare / name).chmod(0o755)
    if venv == "a file":
        (root / ".venv").touch()
    else:
        (root / ".venv").symlink_to(Path(sys.executable).parent.parent if code == 0 else "/dev/null/x")
    done = start(["bash", f"scripts/{SCRIPT}"], root, PATH=f"{bare}:/usr/bin:/bin")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == code and re.search(said, done.stdout if code == 0 else errors[-1]), done.stderr
    assert len(errors) == (code > 0)


@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_windows_line_ends_are_one_clear_line(shell: str, clone: Path, tmp_path: Path) -> None:
    for path in (clone / "scripts").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    done = start([shell, str(tmp_path / SCRIPT)], tmp_path)
    assert done.returncode == 2 and "Windows line ends" in done.stderr and len(done.stderr.splitlines()) == 1


def test_every_script_has_the_same_two_first_lines() -> None:
    texts = [path.read_text().splitlines() for path in (ROOT / "scripts").glob("*.sh") if path.name != "common.sh"]
    first = {tuple([line for line in text if not line.startswith("#")][:2]) for text in texts}
    assert len(texts) > 10 and len(first) == 1


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs git and a clone of it")
def test_a_clone_has_unix_line_ends_whatever_git_is_set_to(tmp_path: Path) -> None:
    git = ["git", "-c", "core.autocrlf=true"]
    subprocess.run([*git, "clone", "-q", "--no-local", str(ROOT), "clone"], cwd=tmp_path, check=True)
    texts = [*(tmp_path / "clone").glob("scripts/*.sh"), *(tmp_path / "clone").rglob("*.jinja")]
    assert texts and not [path for path in texts if b"\r" in path.read_bytes()]


VALUES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), max_size=12)
BLANKS = st.sampled_from(["", " ", "\t", "  "])
ASSIGNMENTS = st.builds(
    "{0}{1}{2}={2}{3}{4}{3}{5}".format,
    st.sampled_from(["", "export ", " "]), st.sampled_from(["X1", "X2", "x3_"]), BLANKS,
    st.sampled_from(["", "'", '"']), VALUES, st.sampled_from(["", " # note", " "]),
)  # fmt: skip
LINES = st.one_of(ASSIGNMENTS, ASSIGNMENTS, st.sampled_from(["", "# note", " "]), VALUES)


@settings(max_examples=40)
@given(st.lists(LINES, max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_bash_and_python_read_the_same_from_dotenv(clone: Path, lines: list[str], end: str) -> None:
    file = clone / ".env"
    file.write_bytes(end.join(lines).encode())
    show = 'source scripts/common.sh; for n in X1 X2 x3_; do printf "%s\\0" "$n=${!n-UNSET}"; done'
    try:
        done = start(["bash", "-c", show, "name"], clone, X2="kept")
        try:
            expected = {"X1": "UNSET", "x3_": "UNSET", **config.read_dotenv(file), "X2": "kept"}
        except DamagedInputError:
            assert done.returncode == 4 and len(done.stderr.strip().splitlines()) == 1
            return
        assert dict(pair.split("=", 1) for pair in done.stdout.split("\0")[:-1]) == {
            name: expected[name] for name in ("X1", "X2", "x3_")
        }
    finally:
        file.unlink()


def test_a_clone_of_someone_else_without_packages_says_what_to_do(clone: Path) -> None:
    """No virtual environment can be made there; as root, who may write anywhere, the script is run as nobody."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        root = Path(folder) / "clone"
        shutil.copytree(clone, root)
        (root / "bin").mkdir()
        for name in ("python", "python3"):
            (root / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
            (root / "bin" / name).chmod(0o755)
        Path(folder).chmod(0o755)
        root.chmod(0o555)
        nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"] if os.geteuid() == 0 else []
        if nobody and shutil.which("setpriv") is None:
            pytest.skip("root here, and no setpriv to be someone else")
        done = start([*nobody, "bash", f"scripts/{SCRIPT}", "-n"], root, PATH=f"{root}/bin:/usr/bin:/bin")
        root.chmod(0o755)
    assert done.returncode == 3 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "is not yours to write to; activate an environment" in done.stderr


def test_a_signal_to_the_script_reaches_the_pipeline(clone: Path, tmp_path: Path) -> None:
    """It runs in the script's place: ``kill`` of a script in the background left the pipeline running."""
    shutil.copytree(clone, tmp_path / "clone")
    (tmp_path / "clone" / "lever_plus" / "pipeline.py").write_text("import os\nprint(os.getpid())\n")
    script = ["bash", "-c", f'echo $$; exec bash "{tmp_path}/clone/scripts/{SCRIPT}"']
    shell, pipeline = start(script, tmp_path).stdout.split()
    assert shell == pipeline


@pytest.mark.parametrize("script", ["quickstart.sh", "run_experiment.sh 1", "doctor.sh", "compare.sh a b"])
def test_what_a_script_ends_with_runs_in_its_place(clone: Path, tmp_path: Path, script: str) -> None:
    """``kill`` of a script ends what it runs: there is no shell between them."""
    shutil.copytree(clone, tmp_path / "clone")
    (tmp_path / "clone/lever_plus/experiments").mkdir()
    for module in ("in_turn", "experiments/run", "doctor", "experiments/compare"):
        (tmp_path / "clone" / "lever_plus" / f"{module}.py").write_text("import os\nprint('ran as', os.getpid())\n")
    name, *words = script.split()
    done = start(["bash", "-c", f'echo $$; exec bash "{tmp_path}/clone/scripts/{name}" {" ".join(words)}'], tmp_path)
    assert done.stdout.split()[0] == done.stdout.split()[-1], done


STEPS = """
import os, signal, sys, time
from pathlib import Path
from lever_plus import cli
def body():
    Path(sys.argv[1]).touch()
    time.sleep(30)
raise SystemExit(cli.guard(body))
"""


def test_commands_in_turn_stop_at_the_first_that_fails_and_pass_a_signal_on(tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text(STEPS)
    turn = [sys.executable, "-m", "lever_plus.in_turn"]
    done = start([*turn, "--", "true", "--", "bash", "-c", "exit 3", "--", "touch", str(tmp_path / "third")], ROOT)
    assert done.returncode == 3 and not (tmp_path / "third").exists()
    begun = tmp_path / "begun"
    step = f'exec "{sys.executable}" "{tmp_path}/step.py" "{begun}"'
    command = [*turn, "--", "bash", "-c", step, "--", "touch", str(tmp_path / "next")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    while not begun.exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    said = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert said.strip() == "interrupted: what is done is kept; run the same command again to resume"
    assert not (tmp_path / "next").exists()
