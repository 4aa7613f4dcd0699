"""Several processes: the stage's own exit code, one line, and a killed rank stops the job."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lever_plus import launcher

ROOT = Path(__file__).resolve().parent.parent

CHILD = """
import os, signal, sys, time
from lever_plus import cli
from open_mmicl.errors import MissingInputError
rank, what = int(os.environ["RANK"]), sys.argv[1]
def body():
    if what == "both":
        raise MissingInputError("beam data not found: x.json")
    if rank == 1:
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise MissingInputError("only one rank")
    time.sleep(60)
raise SystemExit(cli.guard(body) if what != "fine" else 0)
"""


@pytest.mark.parametrize(
    ("what", "code", "said"), [("fine", 0, ""), ("both", 3, "beam data not found"), ("kill", 137, "signal 9")]
)
def test_the_stages_own_exit_code_and_one_line(tmp_path: Path, what: str, code: int, said: str) -> None:
    (tmp_path / "child_module.py").write_text(CHILD)
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env["TMPDIR"] = str(tmp_path / "tmp")
    done = subprocess.run(
        [sys.executable, "-m", "lever_plus.launcher", "2", "child_module", what],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    assert "Traceback" not in done.stderr
    assert sum("error:" in line for line in errors) == (1 if said else 0)
    assert said in done.stderr
    assert list((tmp_path / "tmp").iterdir()) == []  # torchrun's folder is not left behind


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interruption_is_one_line(tmp_path: Path, number: int) -> None:
    """torchrun's own warnings about the signal are not shown."""
    waits = "from pathlib import Path\nimport os, time\nfrom lever_plus import cli\n"
    waits += "def body():\n    Path(os.environ['RANK']).touch()\n    time.sleep(60)\n"
    waits += "raise SystemExit(cli.guard(body))\n"
    (tmp_path / "child_module.py").write_text(waits)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lever_plus.launcher", "2", "child_module"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it would be ignored
    )  # fmt: skip
    while not all((tmp_path / rank).exists() for rank in "01"):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert said.strip() == "interrupted: what is done is kept; run the same command again to resume"


@pytest.mark.parametrize(
    ("failures", "code"),
    [
        ([(1, 7), (-9, 7)], -9),  # the first lost its connection to the second, which was killed
        ([(3, 7), (-15, 7)], 3),  # the second was stopped by torchrun while it was still starting
        ([(3, 7), (-9, 38)], 3),  # or did not heed that
    ],
)
def test_the_cause_is_told_from_its_consequences(failures: list[tuple[int, int]], code: int) -> None:
    found = {rank: SimpleNamespace(exitcode=c, timestamp=t) for rank, (c, t) in enumerate(failures)}
    first = min(found.items(), key=lambda item: item[1].timestamp)
    error = SimpleNamespace(failures=found, get_first_failure=lambda: first)
    assert launcher._cause(error) == code


def test_processes_of_one_machine_meet_where_no_name_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose own name no resolver knows torch asks for ever, in C++, deaf to signals."""
    met = []
    fake = SimpleNamespace(
        LaunchConfig=lambda **config: met.append(config) or SimpleNamespace(run_id=config["run_id"]),
        elastic_launch=lambda config, program: lambda *words: None,
    )
    monkeypatch.setattr(launcher, "launcher_api", fake)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    assert launcher.launch(2, ["nothing"]) == 0
    assert (met[0]["rdzv_endpoint"], met[0]["local_addr"]) == ("127.0.0.1:0", "127.0.0.1")
    loopbacks = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    assert not loopbacks or os.environ["GLOO_SOCKET_IFNAME"] in loopbacks
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    launcher.launch(2, ["nothing"])
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
