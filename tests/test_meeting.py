"""Processes that wait for one another: a line says for whom, the first meeting has a limit, signals are obeyed."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lever_plus import meeting
from open_mmicl.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
ALONE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background is started with it ignored
from lever_plus import cli, meeting, shards
meeting.TELL_AFTER = 0.0
meeting.LIMIT = float(sys.argv[1])
meeting.join.__defaults__ = (meeting.LIMIT,)
sys.exit(cli.guard(shards._barrier))
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(rank: int, world: int, limit: float, address: str = "127.0.0.1", code: str = ALONE) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "LEVER_"))}
    env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": address}
    env |= {"MASTER_PORT": str(free_port()), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(limit)]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("rank", "whom"), [(0, "process 1 of 2"), (1, "process 0 of 2")])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_is_waited_for_is_said_and_a_signal_is_obeyed(rank: int, whom: str, number: int) -> None:
    process = start(rank, 2, 600)
    line = process.stderr.readline()  # comes while it waits
    assert f"waiting for {whom}" in line and f"RANK={rank} WORLD_SIZE=2" in line and "unset them" in line
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in said


@pytest.mark.parametrize("address", ["127.0.0.1", "no-such-host.invalid"])
def test_a_meeting_has_a_limit(address: str) -> None:
    process = start(1, 3, 0.5, address)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and "process 0 of 3 did not come" in said and "Traceback" not in said


def test_those_that_did_not_come_are_named() -> None:
    process = start(0, 4, 0.5)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and "process 1, 2, 3 of 4 did not come" in said


@pytest.mark.parametrize("port", ["", "0", "x", "65536", "-1", "٣", "1e3", "99999999"])
def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UsageError, match="name no place to meet"):
        meeting.join("gloo")


@pytest.mark.parametrize("address", ["no-such-host.invalid", "no such host", "x" * 300])
def test_a_name_that_nobody_has_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", address), ("MASTER_PORT", "29999")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="did not come"):
        meeting.join("gloo", limit=0.2)


def test_a_port_that_is_taken_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))  # noqa: S104 - taken on every address
        listener.listen()
        port = str(listener.getsockname()[1])
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
            monkeypatch.setenv(name, value)
        with pytest.raises(UsageError, match=f"no meeting at 127.0.0.1:{port}"):
            meeting.join("gloo", limit=5)
