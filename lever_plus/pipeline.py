"""The whole flow: builds what a target needs, in order, and skips what is done.

    python -m lever_plus.pipeline TARGET [--NAME value …]

Targets: dataset, embeddings, beam_data, v2, rl_data, v3, inference, record. Each step is a process of its
own (torchrun with NPROC > 1) and says how long it took. Settings come from the environment, the command
line passes them on by name.
"""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from lever_plus import cli, config, paths
from lever_plus.settings import known_names, load
from lever_plus.settings.registry import STAGE_SETTINGS
from lever_plus.settings.shared import SharedSettings
from open_mmicl.errors import UsageError

# step: (module, steps that must come before it, may run on several processes)
STEPS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "dataset": ("lever_plus.stages.prepare_dataset", (), False),
    "embeddings": ("lever_plus.stages.export_embeddings", ("dataset",), False),
    "beam_data": ("lever_plus.stages.generate_data", ("dataset", "embeddings"), True),
    "v2": ("lever_plus.stages.train_v2", ("beam_data", "embeddings"), True),
    "rl_data": ("lever_plus.stages.generate_rl_data", ("v2",), True),
    "v3": ("lever_plus.stages.train_v3", ("rl_data",), True),
    "inference": ("lever_plus.stages.inference", ("v3",), True),
    "baseline": ("lever_plus.stages.inference", ("embeddings",), True),
    "record": ("lever_plus.stages.record", ("inference",), False),
}


def plan(target: str) -> list[str]:
    """The steps that lead to ``target``, in order, each once.

    Raises:
        UsageError: an unknown target (names the known).
    """
    if target not in STEPS:
        raise UsageError(f"unknown target {target!r}; there are: {', '.join(STEPS)}")
    order: list[str] = []

    def visit(step: str) -> None:
        for before in STEPS[step][1]:
            visit(before)
        if step not in order:
            order.append(step)

    visit(target)
    return order


def needed(target: str, env: Mapping[str, str]) -> list[str]:
    """The steps of a target, less the training that an evaluation already finds done.

    An evaluation takes the selectors as they are: it trains only what is not there at all, so that its
    environment need not repeat the settings of the training.
    """
    steps = plan(target)
    if target not in ("inference", "record"):
        return steps
    settings = load(STAGE_SETTINGS["inference"], {}, env)
    methods = settings.methods.split()
    v3_there = (
        "v3" not in methods
        or bool(settings.lever_lm_checkpoint_path)
        or any(paths.v3_dir(settings).glob("*_epoch*.pt"))
    )
    v2_there = "v2" not in methods or bool(settings.v2_checkpoint_path) or paths.v2_checkpoint(settings).is_file()
    if v3_there:
        wanted = ["embeddings"] if v2_there else ["v2"]
        steps = list(dict.fromkeys([*(s for w in wanted for s in plan(w)), "inference", target]))
    return steps


def run_steps(steps: Sequence[str], env: dict[str, str], nproc: int, dry_run: bool) -> int:
    """Run the steps one after another; returns the first exit code that is not 0, else 0."""
    for number, step in enumerate(steps, 1):
        module, _, parallel = STEPS[step]
        command = [sys.executable, "-m", module]
        if nproc > 1 and parallel:
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc_per_node={nproc}",
                "--standalone",
                "-m",
                module,
            ]
        print(f"[{number}/{len(steps)}] {step}", flush=True)
        started = time.monotonic()
        code = _call([*command, *(["--dry-run"] if dry_run else [])], env)
        print(
            f"[{number}/{len(steps)}] {step}: {'done' if code == 0 else f'stopped with exit code {code}'} "
            f"in {time.monotonic() - started:.1f} s",
            flush=True,
        )
        if code != 0:
            return code
    return 0


def _call(command: list[str], env: dict[str, str]) -> int:
    """Run a child; an interruption reaches it too, and it decides how to end."""
    child = subprocess.Popen(command, env=env)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        return 130


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0 if argv else 2
    target, rest = argv[0], list(argv[1:])
    known = known_names()
    fields = [(config.env_name(n).lower(), str, dataclasses.field(default="", metadata={})) for n in known]
    values, want_help, dry_run = cli.parse_options(dataclasses.make_dataclass("AnySetting", fields), rest)
    if want_help:
        print((__doc__ or "").strip())
        return 0
    settings = load(SharedSettings, values)
    env = {**os.environ, **values, "DATASET": settings.dataset, "LEVER_NAMES_CHECKED": "1", "PYTHONUNBUFFERED": "1"}
    steps = needed(target, env)
    for step in steps:  # a wrong setting of the last step stops the run before the first
        module = STEPS[step][0].rsplit(".", 1)[-1]
        if module in STAGE_SETTINGS:
            load(STAGE_SETTINGS[module], {}, env)
    if settings.dataset == "mini_okvqa" and values.get("DATASET", os.environ.get("DATASET", "auto")) == "auto":
        print(
            "DATASET=auto: no OK-VQA files found, using the embedded benchmark mini_okvqa "
            "(set OKVQA_PATH and COCO_PATH for OK-VQA)"
        )
    announce_stand_in(settings)
    from lever_plus.devices import gpus_here, select_gpu

    select_gpu(settings)
    ids = [i for i in settings.gpu_id.split(",") if i.strip()]
    nproc = len(ids) if settings.nproc == 1 and len(ids) > 1 and gpus_here() else settings.nproc
    env["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    return run_steps(steps, env, nproc, dry_run)


def announce_stand_in(settings: SharedSettings) -> None:
    """Say so when a data set's stand-in answers instead of the model that was named."""
    answering, name = paths.infer_model_yaml(settings).stem, paths.lvlm_name(settings)
    if answering != settings.beam_model:
        print(
            f"{settings.beam_model} on {settings.dataset}: the embedded tiny model of the same class stands in "
            f"({name})"
        )


if __name__ == "__main__":
    raise SystemExit(cli.guard(lambda: main(sys.argv[1:])))
