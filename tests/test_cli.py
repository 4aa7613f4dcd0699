"""The frame around every command: exit codes, one line, interruption, the parent's end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from lever_plus import cli
from open_mmicl.errors import DamagedInputError, MissingInputError, NumericError, UsageError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("u"), 2), (MissingInputError("m"), 3), (DamagedInputError("d"), 4), (NumericError("n"), 5)],
)
def test_each_error_has_its_code_one_line_and_a_traceback_in_the_log(error, code, tmp_path, capsys) -> None:
    def body() -> None:
        raise error

    assert cli.guard(body, lambda: tmp_path / "stage.log") == code
    assert capsys.readouterr().err == f"error: {error}\n"
    assert "Traceback" in (tmp_path / "stage.log").read_text()


def test_an_interruption_is_130_and_says_how_to_go_on(capsys) -> None:
    def body() -> None:
        raise KeyboardInterrupt

    assert cli.guard(body) == 130
    assert "run the same command again" in capsys.readouterr().err


def test_an_error_has_a_line_of_its_own_beside_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    bar = tqdm(range(5), desc="work")

    def body() -> None:
        for i in bar:
            if i == 2:
                raise UsageError("wrong")

    assert cli.guard(body) == 2
    assert "error: wrong" in capsys.readouterr().err.splitlines()


def test_a_defect_is_1_with_the_log_named(tmp_path, capsys) -> None:
    assert cli.guard(lambda: 1 // 0, lambda: tmp_path / "stage.log") == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and "stage.log" in err and len(err.splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signal is Linux's")
@pytest.mark.parametrize(("number", "code", "said"), [(9, 137, "memory"), (15, 143, "signal 15"), (2, 130, "")])
def test_a_step_that_is_killed_ends_with_the_shells_code_and_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture, number: int, code: int, said: str
) -> None:
    program = f"import os, signal\nsignal.signal(2, signal.SIG_DFL)\nos.kill(os.getpid(), {number})\n"
    (tmp_path / "dies.py").write_text(program)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    if code == 130:
        with pytest.raises(KeyboardInterrupt):
            cli.call([sys.executable, "-m", "dies"], env)
    else:
        assert cli.call([sys.executable, "-m", "dies"], env) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(said) and all(said in line and "dies was killed" in line for line in lines)


def test_a_stage_ends_when_the_process_that_started_it_is_killed(tmp_path: Path) -> None:
    up = tmp_path / "up"
    child = "import time; from lever_plus import cli; from pathlib import Path\ndef body():\n "
    child += f"Path({str(up)!r}).touch(); time.sleep(60)\nraise SystemExit(cli.guard(body))"
    parent = (
        f"import os, subprocess, sys; env = {{**os.environ, 'LEVER_CHILD': str(os.getpid())}}; "
        f"subprocess.Popen([sys.executable, '-c', {child!r}], env=env, start_new_session=True).wait()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen([sys.executable, "-c", parent], env=env, stderr=subprocess.PIPE, text=True)
    while not up.exists():
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.communicate(timeout=30)  # the pipe closes only when the child has ended, too: else TimeoutExpired


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signal is Linux's")
def test_a_stage_whose_parent_ended_while_it_was_starting_ends_too(tmp_path: Path) -> None:
    child = "from lever_plus import cli; print('starting', flush=True); cli.guard(lambda: print('at work', flush=True))"
    env = {**os.environ, "LEVER_CHILD": "1" if os.getpid() > 1 else "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", child], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL and done.stdout == "starting\n"


@pytest.mark.parametrize("order", [(signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGTERM)])
def test_an_interruption_that_comes_twice_is_one(tmp_path: Path, order) -> None:
    """Ctrl-C reaches every process of a terminal, and each passes it on to its own child."""
    child = (
        "import os, signal, time; from lever_plus import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background has it ignored\n"
        "def body():\n try:\n  print('up', flush=True)\n"
        f"  time.sleep(60)\n finally:\n  os.kill(os.getpid(), {int(order[1])})\nraise SystemExit(cli.guard(body))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen(
        [sys.executable, "-c", child], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert started.stdout.readline() == "up\n"
    started.send_signal(order[0])
    _, said = started.communicate()
    assert started.returncode == 130 and len(said.strip().splitlines()) == 1, said


@pytest.mark.parametrize("child", [False, True])
def test_an_interruption_during_the_imports_is_no_traceback(tmp_path: Path, child: bool) -> None:
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", **({"LEVER_CHILD": "1"} if child else {})}
    done = subprocess.run(
        [sys.executable, "-c", "import signal, os, sys; signal.signal(2, signal.SIG_DFL); os.execv(sys.executable, "
         "[sys.executable, '-m', 'lever_plus.stages.train_v2'])"],
        env=env, capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == -signal.SIGINT
    assert done.stderr.strip() == ("" if child else "interrupted: nothing had begun yet")


def test_a_program_that_uses_the_package_keeps_its_own_excepthook() -> None:
    said = subprocess.run(
        [sys.executable, "-c", "import sys, lever_plus; print(sys.excepthook is sys.__excepthook__)"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert said.stdout == "True\n"


LOST = """
import os, signal, time
from lever_plus import cli
class Removed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
def body():
    Removed()
    time.sleep(30)
    print("went on")
raise SystemExit(cli.guard(body))
"""


def test_an_interruption_while_an_object_is_removed_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip() == "interrupted: what is done is kept; run the same command again to resume"
