"""Runs stages in forked copies of one warm process, kills them at a chosen pass, and counts what the LVLM computed.

    python -m tests.reference.stage_server      reads and writes one JSON line per command

A command is a list of jobs that run at the same time: {"stage": …, "env": {…}, "log": file, "kill": [pass, moment]}.
``moment``: ``computed`` (the pass is lost), ``written`` (it is in the cache), ``part`` (half a line of the stage's
own progress is written; ``pass`` then counts lines), or ``stamping`` (the output is there, its provenance is not). The
answer: exit codes, negative for a signal. The log gets one line per pass: the keys computed.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from lever_plus import cli, provenance, shards
from lever_plus.settings.loading import load
from lever_plus.settings.registry import STAGE_SETTINGS
from open_mmicl import engine, engine_fast  # noqa: F401 - imported once, for all copies
from open_mmicl.answer_cache import AnswerCache


def die() -> None:
    """Kill -9."""
    os.kill(os.getpid(), signal.SIGKILL)


def plan(log: Path, kill: tuple[int, str] | None) -> None:
    """Log every pass of this process, and end it at the planned moment."""
    count = {"passes": 0, "lines": 0}
    at, moment = kill or (0, "")
    put, opened = AnswerCache.put, shards._open_part

    def counting_put(cache: AnswerCache, model: int, entries: list, claim: bytes | None = None) -> bool:
        count["passes"] += 1
        with log.open("a") as handle:
            handle.write(json.dumps([key.hex() for _, key, _ in entries]) + "\n")
        if moment == "computed" and count["passes"] == at:
            die()
        new = put(cache, model, entries, claim)
        if moment == "written" and count["passes"] == at:
            die()
        return new

    def counting_part(path: Path) -> Any:
        handle = opened(path)
        write = handle.write

        def half(text: str) -> int:
            count["lines"] += 1
            if moment == "part" and count["lines"] == at:
                write(text[: len(text) // 2])
                handle.flush()
                die()
            return write(text)

        handle.write = half
        return handle

    AnswerCache.put, shards._open_part = counting_put, counting_part
    if moment == "stamping":
        provenance.stamp = lambda *args: die()


def start(job: dict[str, Any]) -> int:
    """Fork a copy that runs the job; returns its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.environ.update(job["env"])
        plan(Path(job["log"]), job.get("kill"))
        module = importlib.import_module(f"lever_plus.stages.{job['stage']}")
        cls = STAGE_SETTINGS[job["stage"]]
        code = cli.stage_main(cls, module.run, module.__doc__, [], lambda values: load(cls, values))
    finally:
        os._exit(code)


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        children = [start(job) for job in json.loads(line)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), file=answers, flush=True)


if __name__ == "__main__":
    main()
