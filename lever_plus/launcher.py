"""Several processes of one stage on this machine, by torchrun's own launcher, with the stage's own exit code.

    python -m lever_plus.launcher NPROC MODULE [argument …]

torchrun itself ends with 1 and a traceback whatever its processes returned; here the first failure's exit
code is passed on, and what the process said stands alone.
"""

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from typing import Any

from lever_plus import cli, ranks
from open_mmicl.errors import UsageError
from open_mmicl.lazy import lazy

api = lazy("torch.distributed.elastic.multiprocessing.api")
errors = lazy("torch.distributed.elastic.multiprocessing.errors")
launcher_api = lazy("torch.distributed.launcher.api")


HERE = "127.0.0.1"
"""Where processes of one machine meet: the machine's name need not be known to any resolver (torch would ask for it for
ever, deaf to signals), nor localhost."""


def launch(nproc: int, words: Sequence[str]) -> int:
    """Run ``python -m <words>`` on ``nproc`` ranks (RANK, WORLD_SIZE, … set); returns the exit code.

    When a rank fails the others are stopped.
    """
    # One thread each, whatever their number: the rounding of a sum depends on how many threads share it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    ranks.stay_on_this_machine()
    # torchrun would make a folder of its own there for every run, and leave it.
    with tempfile.TemporaryDirectory(prefix="lever_plus_", ignore_cleanup_errors=True) as folder:
        return _launch(nproc, words, folder)


def _launch(nproc: int, words: Sequence[str], folder: str) -> int:
    config = launcher_api.LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{HERE}:0",
        local_addr=HERE,
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=api.DefaultLogsSpecs(log_dir=folder),
    )
    for name in list(logging.root.manager.loggerDict):  # each of torchrun's modules sets a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        launcher_api.elastic_launch(config, sys.executable)("-m", *words)
    except errors.ChildFailedError as error:
        code = _cause(error)
        return code if code >= 0 else cli.killed(words[0], -code)
    except (KeyboardInterrupt, api.SignalException):
        return 130
    finally:
        with contextlib.suppress(OSError):  # TMPDIR missing
            cli.error_marker(config.run_id).unlink(missing_ok=True)
    return 0


def _cause(error: Any) -> int:
    """Exit code of the process that ended the others.

    One that was killed takes with it, within moments, those that wait for it, and either may be seen first. Those that
    torchrun stops afterwards count as failures too: by SIGTERM, or half a minute later by SIGKILL.
    """
    first = error.get_first_failure()[1]
    together = [f.exitcode for f in error.failures.values() if f.timestamp <= first.timestamp + 1]
    killed = [code for code in together if code < 0 and code != -signal.SIGTERM]
    causes = [code for code in (first.exitcode, *together) if code not in (130, -signal.SIGTERM)]
    return [*killed, *causes, first.exitcode][0]


def main(argv: Sequence[str]) -> int:
    """Entry point."""
    if len(argv) < 2 or not re.fullmatch("[1-9][0-9]{0,2}", argv[0]):
        raise UsageError("usage: python -m lever_plus.launcher NPROC MODULE [argument …]")
    return launch(int(argv[0]), argv[1:])


if __name__ == "__main__":
    raise SystemExit(cli.guard(lambda: main(sys.argv[1:])))
