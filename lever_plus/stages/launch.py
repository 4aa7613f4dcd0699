"""Around a training run: several processes, done-or-stale, a folder that belongs to one run."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lever_plus import cli, io, provenance, ranks
from lever_plus.best import best_checkpoint
from lever_plus.cli import log
from lever_plus.config import as_dict
from lever_plus.devices import select_gpu, torch_device
from lever_plus.settings.shared import SharedSettings
from open_mmicl.lazy import lazy

deepspeed_engine = lazy("lever_plus.rl.deepspeed_engine")

RUN_FILE = "run.json"
OWN_FILES = ("*_epoch*.pt", "best.json", "train_log.jsonl", RUN_FILE, "tensorboard")


def device_of(settings: SharedSettings, threads: int | None = 1) -> str:
    """``cpu`` or ``cuda:<local rank>``; makes GPU_ID the visible one first.

    One thread on the CPU by default: a selector's batch is too small for more (equal or slower on an idle machine,
    ten times slower on a busy one, where the threads wait for one another).
    """
    select_gpu(settings.device, settings.gpu_id)
    return torch_device(settings.device, threads)


def must_spawn(nproc: int) -> bool:
    """Whether NPROC asks for processes that nobody has started yet."""
    return nproc > 1 and ranks.world_size() == 1


def spawn(nproc: int, module: str, settings: SharedSettings) -> int:
    """Run ``module`` again under torchrun on this machine; returns its exit code."""
    environment = {name: str(int(v) if isinstance(v, bool) else v) for name, v in as_dict(settings).items()}
    command = [sys.executable, "-m", "lever_plus.launcher", str(nproc), module]
    return cli.call(command, {**os.environ, **environment, "LEVER_NAMES_CHECKED": "1"})


@contextlib.contextmanager
def turn(output: Path, settings: SharedSettings) -> Iterator[None]:
    """Trainings that write one output come one after the other; a later one then finds what the first has made.

    Held by the first of the processes that train. ``output``: the checkpoint, or a folder's run file.
    """
    if must_spawn(settings.nproc):  # the processes that this one starts take their turn
        yield
        return
    with contextlib.ExitStack() as held:
        _meet(settings)  # before the first may wait for another training: meeting has a limit of minutes
        if ranks.rank() == 0:
            waiting = f"another process trains {output.parent if output.name == RUN_FILE else output}; waiting for it"
            new = [folder for folder in (output.parent, *output.parent.parents) if not folder.exists()]
            held.callback(_remove_empty, new)
            held.enter_context(io.locked(output, lambda: log.info(waiting)))
        _meet(settings)
        yield


def _remove_empty(folders: list[Path]) -> None:
    """Folders that were made for a lock only, innermost first: a run that was refused leaves nothing behind."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _meet(settings: SharedSettings) -> None:
    """Wait for the other processes of this training, where there are any."""
    if ranks.world_size() > 1:
        deepspeed_engine.start_processes(device_of(settings)).barrier()


def run_state(folder: Path, recipe: provenance.Recipe) -> str:
    """``finished`` or ``running`` (the same recipe's), ``stale`` (another's), ``foreign`` (checkpoints of
    unknown origin), or ``new``.

    A finished run whose best checkpoint is gone counts as ``stale``.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        return "foreign" if any(folder.glob("*_epoch*.pt")) else "new"
    meta = io.read_object(file, "run file")
    if not recipe.made(meta):
        return "stale"
    if meta.get("status") != "finished":
        return "running"
    there = (folder / "best.json").is_file() and best_checkpoint(folder).is_file()
    return "finished" if there else "stale"


def agreed_state(folder: Path, recipe: provenance.Recipe, settings: SharedSettings) -> str:
    """:func:`run_state`, seen by all processes before any of them changes the folder."""
    state = run_state(folder, recipe)
    _meet(settings)
    return state


def prepare_folder(
    folder: Path, recipe: provenance.Recipe, state: str, settings: SharedSettings, processes: Any
) -> None:
    """Give the folder to this run; what another run left in it is moved to ``previous_<n>``, never deleted."""
    if processes.first:
        if state != "running":  # first of all: a run that is cut off in here must not resume from another's state
            shutil.rmtree(folder / "state", ignore_errors=True)
        for where in (folder, folder / "state"):
            io.remove_cut_off(where)
        if state in ("stale", "foreign"):
            archive = _next_free(folder)
            for path in [path for pattern in OWN_FILES for path in sorted(folder.glob(pattern))]:
                path.rename(archive / path.name)
            why = "files of another origin" if state == "foreign" else "a run with other inputs or settings"
            log.info(f"{folder} held {why}: moved to {archive}")
        _write(folder, recipe, "running", settings=as_dict(settings))
    processes.barrier()


def prepare_work(work: Path, recipe: provenance.Recipe, state: str, settings: SharedSettings, processes: Any) -> None:
    """:func:`prepare_folder` for a folder that its training removes at the end: what another run left in it goes."""
    if state != "running" and processes.first:
        shutil.rmtree(work, ignore_errors=True)
    prepare_folder(work, recipe, "running" if state == "running" else "new", settings, processes)


def keep_curves(work: Path, output: Path) -> None:
    """Copy TensorBoard's files, where there are any, beside the checkpoint."""
    if (work / "tensorboard").is_dir():
        shutil.copytree(work / "tensorboard", output.with_name(output.stem + "_tensorboard"), dirs_exist_ok=True)


def remove_work(work: Path, processes: Any) -> None:
    """The end of a training whose result lies elsewhere by now."""
    processes.barrier()
    if processes.first:
        shutil.rmtree(work)


def _next_free(folder: Path) -> Path:
    """A new folder ``previous_<n>``, numbered above all that are there: some may have been removed."""
    taken = [path.name.removeprefix("previous_") for path in folder.glob("previous_*")]
    number = 1 + max((int(n) for n in taken if n.isascii() and n.isdecimal() and len(n) < 10), default=0)
    archive = folder / f"previous_{number}"
    archive.mkdir()
    return archive


def finish(folder: Path, recipe: provenance.Recipe, prompts: Mapping[str, int] | None = None) -> None:
    """Mark the run as finished; ``prompts`` are those that the LVLM was asked in training, by purpose."""
    settings = io.read_json(folder / RUN_FILE, "run file")["settings"]
    _write(folder, recipe, "finished", settings=settings, prompts=dict(prompts or {}))


def _write(folder: Path, recipe: provenance.Recipe, status: str, **more: Any) -> None:
    content = {
        "status": status, "fingerprint": recipe.fingerprint(), "recipe": recipe.describe(), **more,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "provenance": provenance.provenance(),
    }  # fmt: skip
    io.write_json(folder / RUN_FILE, content, indent=1)
