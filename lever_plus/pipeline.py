"""The whole flow: builds what a target needs, in order, and skips what is done.

    python -m lever_plus.pipeline TARGET [TARGET …] [--NAME value …] [-n | --dry-run]

Targets: dataset, embeddings, channels, beam_data, v2, label, rl_data, v3, inference, baseline, record. inference and
record evaluate the selectors there are and train no v3: "v3 record" does both. Each step is a process of its own
(torchrun with NPROC > 1) and says how long it took. Settings come from the environment, the command
line passes them on by name.
"""

import dataclasses
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lever_plus import cli, config, paths, provenance
from lever_plus.best import best_checkpoint
from lever_plus.data import catalog, channel_names, samplers, sizes
from lever_plus.data.methods import VERSIONS
from lever_plus.data.methods import chosen as chosen_methods
from lever_plus.devices import select_gpu
from lever_plus.settings import names
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import known_names, load
from lever_plus.settings.registry import STAGE_SETTINGS
from lever_plus.settings.shared import SharedSettings
from lever_plus.sharing import processes, threads_of
from lever_plus.stages import checkpoint_choice, record, train_v2, train_v3, train_v3_online
from open_mmicl.errors import LeverError, MissingInputError, UsageError, plain
from open_mmicl.interface.config import InferModelConfig

# step: (module, steps that must come before it, what its processes share: the prompts, the training, or nothing)
STEPS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "dataset": ("lever_plus.stages.prepare_dataset", (), ""),
    "embeddings": ("lever_plus.stages.export_embeddings", ("dataset",), ""),
    "channels": ("lever_plus.stages.export_channels", ("dataset",), "prompts"),
    "beam_data": ("lever_plus.stages.generate_data", ("dataset", "embeddings"), "prompts"),
    "v2": ("lever_plus.stages.train_v2", ("beam_data", "embeddings", "channels"), "training"),
    "label": ("lever_plus.stages.train_v2", ("embeddings", "channels"), "training"),
    "rl_data": ("lever_plus.stages.generate_rl_data", ("v2",), "prompts"),
    "v3": ("lever_plus.stages.train_v3_online", ("rl_data",), "training"),
    "inference": ("lever_plus.stages.inference", ("v3", "label"), "prompts"),
    "baseline": ("lever_plus.stages.inference", ("embeddings", "channels"), "prompts"),
    "record": ("lever_plus.stages.record", ("inference",), ""),
}


READS: dict[str, tuple[str, ...]] = {
    "v2": ("beam_data_path", "query_emb_path", "image_ids_path"),
    "label": ("query_emb_path", "image_ids_path"),
    "rl_data": ("lever_lm_checkpoint_path",),
    "v3": ("sft_ckpt", "query_emb_path", "image_ids_path"),
    "inference": ("lever_lm_checkpoint_path", "v2_checkpoint_path"),
}
"""Settings that name a file which a step reads and none writes."""


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
    """The steps of a target, less those that only lead to what is there already.

    An evaluation takes the selectors as they are, so that its environment need not repeat the settings of the training;
    v3 it never trains, v2 only where it is not there at all. What the user brought needs no inputs: without
    beam data none is made for a v2 checkpoint that was brought, and no v2 for RL data where SFT_CKPT names the start.
    """
    steps = plan(target)
    if "beam_data" in steps and samplers.CHANNELS in samplers.read_by(load(SharedSettings, {}, env).sampler):
        before = [step for step in ("dataset", "embeddings", "channels") if step != target]  # its pools read them
        steps = list(dict.fromkeys([*before, *steps]))
    if not channel_names.outputs_needed(load(STAGE_SETTINGS["export_channels"], {}, env)):
        steps = [step for step in steps if step != "channels"]
    training = load(STAGE_SETTINGS["train_v3"], {}, env)
    _see_that_v3_can_start(target, training.v2_mode, env)
    if training.v2_mode == "labels":  # beams teach nobody then
        steps = [step for step in steps if step not in ("beam_data", "label") or step == target]
    if target not in ("inference", "record", "baseline"):
        rl = load(STAGE_SETTINGS["generate_rl_data"], {}, env)
        v2_needed = not (target == "v3" and training.sft_ckpt and provenance.is_brought(paths.rl_data(rl)))
        if not v2_needed and not paths.v2_checkpoint(training).is_file():
            return [step for step in steps if step not in ("v2", "beam_data")]
        if target in ("rl_data", "v3") and provenance.is_brought(paths.v2_checkpoint(training)):
            return [step for step in steps if step != "beam_data" or paths.beam_data(training).is_file()]
        return steps
    settings = load(STAGE_SETTINGS["inference"], {}, env)
    methods = chosen_methods(settings)
    there = {
        "v2": "v2" not in methods or bool(settings.v2_checkpoint_path) or paths.v2_checkpoint(settings).is_file(),
        "label": "label" not in methods or paths.label_checkpoint(settings).is_file(),
    }
    wanted = [step for step, is_there in there.items() if not is_there]
    before = {one for step in ["baseline", *wanted] for one in plan(step)} - {"baseline"}
    if any(not paths.v2_checkpoint(settings, version).is_file() for version in versions(methods)):
        before |= set(plan("beam_data"))
        steps = [step for step in plan(target) if step in steps or step == "beam_data"]
    return [step for step in steps if step in before or step in ("inference", "baseline", "record")]


def _see_that_v3_can_start(target: str, mode: str, env: Mapping[str, str]) -> None:
    """v1 and v2_lora are selectors of their own: v3 starts from neither, and an evaluation has them by these names.

    Raises:
        UsageError: says which modes v3 starts from.
    """
    version = train_v2.VERSIONS[mode]
    if version == "v2" or target not in ("rl_data", "v3", "inference", "record"):
        return
    if target in ("inference", "record"):
        methods = chosen_methods(load(STAGE_SETTINGS["inference"], {}, env))
        if not {"v2", "v3"} & set(methods):
            return
    raise UsageError(
        f"V2_MODE={mode} trains the selector {version}, from which v3 does not start: V2_MODE=frozen or labels; "
        f"it is evaluated by bash scripts/inference.sh with {version} as the version"
    )


def versions(methods: Sequence[str]) -> list[str]:
    """The supervised selectors besides v2 among some methods."""
    return [version for version in VERSIONS if version in methods]


def require_v3(env: Mapping[str, str]) -> None:
    """See that the v3 selector that is to be evaluated is there: an evaluation trains none that nobody asked for.

    Raises:
        MissingInputError: names the v3 folders there are, and the command that trains this one.
    """
    settings = load(STAGE_SETTINGS["inference"], {}, env)
    there = settings.lever_lm_checkpoint_path or any(paths.v3_dir(settings).glob("*_epoch*.pt"))
    if "v3" in chosen_methods(settings) and not there:
        raise checkpoint_choice.no_v3(settings)


@dataclasses.dataclass(frozen=True)
class Job:
    """A step with what its environment adds. ``after``: the v3 folder whose best checkpoint it starts from."""

    step: str
    extra: dict[str, str] = dataclasses.field(default_factory=dict)
    after: Path | None = None

    def environment(self, env: Mapping[str, str]) -> dict[str, str]:
        """The step's environment, once the folder it starts from is there."""
        more = dict(self.extra)
        if self.after is not None:
            key = "SFT_CKPT" if self.step == "v3" else "LEVER_LM_CHECKPOINT_PATH"
            more[key] = str(best_checkpoint(self.after))
        return {**env, **more}


def jobs_of_versions(settings: InferenceSettings) -> list[Job]:
    """What the selectors v1 and v2_lora need before they are evaluated, where those are asked for."""
    mode = {version: mode for mode, version in train_v2.VERSIONS.items()}
    jobs = []
    for version in versions(chosen_methods(settings)):
        if not paths.v2_checkpoint(settings, version).is_file():
            jobs.append(Job("v2", {"V2_MODE": mode[version]}))
        if version == "v2_lora":
            own = {"CLIP_PATH": str(paths.lora_clip(settings)), "EMBEDDINGS_OF": version}
            jobs.append(Job("embeddings", own))
    return jobs


def jobs_of(steps: Sequence[str], env: Mapping[str, str]) -> list[Job]:
    """The jobs behind the steps: with RL_ROUNDS=n, RL data and v3 alternate, each round from the best of the last.

    The earlier rounds lie in ``round<r>`` below the v3 folder, the last in the folder itself.
    """
    if "v3" not in steps:
        before = jobs_of_versions(load(InferenceSettings, {}, env)) if "inference" in steps else []
        return [job for step in steps for job in [*(before if step == "inference" else ()), _job(step)]]
    settings = load(STAGE_SETTINGS["train_v3"], {}, env)
    folder, rl_file = Path(settings.output_dir or paths.v3_dir(settings)), paths.rl_data(settings)
    jobs: list[Job] = []
    for step in steps:
        if step != "v3" or settings.rl_rounds == 1:
            jobs.append(_job(step))
            continue
        jobs.append(Job("v3", {"OUTPUT_DIR": str(folder / "round1")}))
        for number in range(2, settings.rl_rounds + 1):
            before = folder / f"round{number - 1}"
            fresh = {"RL_DATA_PATH": str(rl_file.with_name(f"{rl_file.stem}_{folder.name}_round{number}.json"))}
            out = {} if number == settings.rl_rounds else {"OUTPUT_DIR": str(folder / f"round{number}")}
            jobs += [Job("rl_data", fresh, before), Job("v3", {**fresh, **out}, before)]
    return jobs


def _job(step: str) -> Job:
    """The label retriever is v2's training on the annotations, whatever V2_MODE v3 starts from."""
    return Job(step, {"V2_MODE": "labels"} if step == "label" else {})


def settings_of(steps: Sequence[str]) -> list[type]:
    """The settings classes of some steps."""
    return list(dict.fromkeys(_settings_class(STEPS[step][0]) for step in steps))


def _settings_class(module: str) -> type:
    own = {
        "train_v3_online": train_v3_online.OnlineSettings,
        "prepare_dataset": SharedSettings,
        "record": InferenceSettings,
    }
    name = module.rsplit(".", 1)[-1]
    return own.get(name) or STAGE_SETTINGS[name]


def check(steps: Sequence[str], env: Mapping[str, str]) -> None:
    """See that no setting of any step is wrong, before the first of them runs.

    Raises:
        UsageError. MissingInputError: a file that a setting names is not there.
    """
    for cls in settings_of(steps):
        load(cls, {}, env)
    for step in steps:
        check_files(step, load(_settings_class(STEPS[step][0]), {}, env))
    if "v3" in steps:
        train_v3.check_settings(load(STAGE_SETTINGS["train_v3"], {}, env), quiet=True)
    if "inference" in steps or "baseline" in steps:
        evaluation = load(STAGE_SETTINGS["inference"], {}, env)
        chosen_methods(evaluation)
        asked = {"val": evaluation.test_data_num} if evaluation.eval_split == "val" else {}
        check_counts(evaluation, {"TEST_DATA_NUM": asked})
    data = load(STAGE_SETTINGS["generate_rl_data"], {}, env)
    wanted = {
        "beam_data": (paths.beam_data(data), "SAMPLE_NUM", data.sample_num),
        "rl_data": (paths.rl_data(data), "RL_QUERY_NUM", data.rl_query_num),
    }
    missing = [wanted[step][1:] for step in wanted if step in steps and not wanted[step][0].is_file()]
    if "beam_data" in steps and not wanted["beam_data"][0].is_file():
        model = InferModelConfig.load(paths.infer_model_yaml(data))
        if model.interface == "openai" and model.server_config.scores == "none":
            raise UsageError(
                f"{model.name}: the beam search needs log-probabilities, which its YAML says it does not give (scores: "
                "none); V2_MODE=labels starts from the label retriever, which needs none"
            )
    check_counts(data, {name: {"train": number} for name, number in missing})


def check_files(step: str, settings: SharedSettings) -> None:
    """See that the files are there which a step's settings name: no earlier step makes them, but for v2's own."""
    for name in READS.get(step, ()):
        named = getattr(settings, name)
        if named in ("", "scratch") or Path(named) == paths.v2_checkpoint(settings):
            continue
        if not Path(named).is_file():
            raise MissingInputError(
                f"{config.env_name(name)}={plain(named, 200)}: there is no such file; name one, or unset it"
            )


def check_counts(settings: SharedSettings, asked: Mapping[str, Mapping[str, int]]) -> None:
    """See that the data set has as many questions as are asked for, where its files are there already.

    Raises:
        UsageError: names the setting and how many there are.
    """
    found = paths.dataset(settings)
    if found.is_small():
        there_is = sizes.of(found)
        if there_is.candidates < 2:
            raise UsageError(
                f"{settings.dataset} is too small: a question needs two demonstrations of other images at least, and "
                f"one has {there_is.candidates}; add train questions about other images"
            )
        most = there_is.room()
        for name in ("CANDIDATE_NUM", *(name for name, by_split in asked.items() if by_split)):
            number, there = getattr(settings, name.lower()), most[name.lower()]
            if number > there:
                what = "items that every query can be given" if name == "CANDIDATE_NUM" else "questions for it"
                raise UsageError(f"{name}={number} is not allowed: {settings.dataset} has {there} {what}")
        return
    for name, by_split in asked.items():
        for split, number in by_split.items():
            there = found.question_count(split)
            if there is not None and number > there:
                raise UsageError(f"{name}={number} is not allowed: {settings.dataset} has {there} {split} questions")


def run_jobs(jobs: Sequence[Job], base: dict[str, str], shares: Mapping[str, int], dry_run: bool) -> int:
    """Run the jobs one after another; returns the first exit code that is not 0, else 0."""
    for number, job in enumerate(jobs, 1):
        step = job.step
        module, _, sharing = STEPS[step]
        if dry_run and job.after is not None:
            print(f"[{number}/{len(jobs)}] {step}: dry run: would start from the best of {job.after}", flush=True)
            continue
        env = job.environment(base)
        if jobs[-1].step == "record":
            env["LEVER_TABLE_LATER"] = "1"  # one table, the record's
        if sharing == "prompts":
            env |= threads_of(shares, base)
        nproc = 1 if dry_run else shares[sharing]
        command = [sys.executable, "-m", module]
        if sharing == "training":
            env["NPROC"] = str(nproc)  # a stage that is started by itself starts as many
        if nproc > 1:
            command = [sys.executable, "-m", "lever_plus.launcher", str(nproc), module]
        if dry_run:
            print(f"[{number}/{len(jobs)}] {step}", flush=True)
            code = _dry_run([*command, "--dry-run"], env)
            if code != 0:
                return code
            continue
        if is_done(module, env):
            print(f"[{number}/{len(jobs)}] {step}: done before with the same inputs and settings", flush=True)
            if step == "record":
                record.tell(load(InferenceSettings, {}, env))
            continue
        print(f"[{number}/{len(jobs)}] {step}", flush=True)
        started = time.monotonic()
        code = cli.call(command, env)
        print(
            f"[{number}/{len(jobs)}] {step}: {'done' if code == 0 else f'stopped with exit code {code}'} "
            f"in {time.monotonic() - started:.1f} s",
            flush=True,
        )
        if code != 0:
            return code
    return 0


def is_done(module: str, env: Mapping[str, str]) -> bool:
    """Whether a step has nothing to do: asked here, so that none is started to say so. What is wrong with its inputs
    it says itself.
    """
    stage = importlib.import_module(module)
    try:
        return stage.is_done(load(_settings_class(module), {}, env))
    except LeverError:
        return False


def all_done(target: str, env: Mapping[str, str]) -> bool:
    """Whether every step of a target has nothing to do."""
    try:
        jobs = jobs_of(needed(target, env), env)
    except LeverError:
        return False
    return all(job.after is None and is_done(STEPS[job.step][0], job.environment(env)) for job in jobs)


def _dry_run(command: list[str], env: dict[str, str]) -> int:
    """What a step says it would do. An input that an earlier step will make is not an error here."""
    env = {**env, "PYTHONIOENCODING": "utf-8"}
    said = subprocess.run(command, env=env, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if said.returncode == MissingInputError.exit_code:
        print("dry run: would run once the steps before it are done")
        return 0
    print(said.stdout, end="")
    print(said.stderr, end="", file=sys.stderr)
    return said.returncode if said.returncode >= 0 else cli.killed(command[2], -said.returncode)


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0 if argv else 2
    targets, rest = [argv[0]], list(argv[1:])
    while rest and rest[0] in STEPS:
        targets.append(rest.pop(0))
    known = known_names()
    fields = [(config.env_name(n).lower(), str, dataclasses.field(default="", metadata={})) for n in known]
    values, want_help, dry_run = cli.parse_options(dataclasses.make_dataclass("AnySetting", fields), rest)
    if want_help:
        print((__doc__ or "").strip())
        return 0
    settings = load(SharedSettings, values)
    env = {**os.environ, **values, "DATASET": settings.dataset, "LEVER_NAMES_CHECKED": "1", "PYTHONUNBUFFERED": "1"}
    steps = [step for target in targets for step in needed(target, env)]
    names.tell([SharedSettings, *settings_of(steps)], {**os.environ, **values})
    check(steps, env)
    if targets[0] in ("inference", "record") and not dry_run:
        require_v3(env)
    if settings.dataset != "okvqa_local" and values.get("DATASET", os.environ.get("DATASET", "auto")) == "auto":
        looked_in = catalog.load("okvqa_local", paths.folders(settings)).root
        print(
            f"DATASET=auto: no OK-VQA files found in {looked_in}, using the embedded benchmark {settings.dataset} "
            "(set OKVQA_PATH and COCO_PATH for OK-VQA)"
        )
    announce_stand_in(settings)
    usual = {name.lower(): int(env[name]) for name in [env.get(names.USUAL, "")] if env.get(name, "").isdecimal()}
    if said := sizes.announcement([load(cls, {}, env) for cls in settings_of(steps)], usual):
        print(said)
    select_gpu(settings.device, settings.gpu_id)
    env["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave their core to others
    shares = processes(settings, env)
    for target in targets:
        code = run_jobs(jobs_of(needed(target, env), env), env, shares, dry_run)
        if code != 0:
            return code
    return 0


def announce_stand_in(settings: SharedSettings) -> None:
    """Say so when a data set's stand-in answers instead of the model that was named."""
    answering, name = paths.infer_model_yaml(settings).stem, paths.lvlm_name(settings)
    if answering != settings.beam_model:
        print(
            f"{settings.beam_model} on {settings.dataset}: the embedded tiny model of the same class stands in ({name})"
        )


if __name__ == "__main__":
    raise SystemExit(cli.guard(lambda: main(sys.argv[1:])))
