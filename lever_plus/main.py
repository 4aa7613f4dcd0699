"""``lever-plus COMMAND``: the commands of scripts/ from an installed package, in the folder that one works in.

A command takes the arguments of the script of its name (``-`` for ``_`` will do), ``-n`` and ``-h``; settings come from
the environment and ``.env``. Data, results and further configurations (configs/dataset/*.yaml) lie where one works.
"""

import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lever_plus import __version__, cli, config
from lever_plus.data import sizes
from lever_plus.data.catalog import EMBEDDED
from lever_plus.settings import help as settings_help
from lever_plus.settings import names
from lever_plus.settings.registry import STAGE_SETTINGS
from open_mmicl.errors import UsageError
from open_mmicl.lazy import lazy

pipeline = lazy("lever_plus.pipeline")

TASK = ("task", "vqa")
WHOLE = (TASK, ("DATASET", "auto"), ("GPU_ID", "0"))
MODEL = (("SAMPLER", "rand_sampler"), ("BEAM_MODEL", "qwen2.5_vl_3B"))
LEVER_LM = ("LEVER_LM", "query_img_text_icd_img_text")
PLAN = config.read_dotenv(config.CONFIG_DIR / "rce_only.env")
VERSIONS = ("v1", "v2", "v2_lora", "v3")
Argument = tuple[str, str]


@dataclass(frozen=True)
class Command:
    """What a script does.

    Attributes:
        help: in a line.
        arguments: (name, default) in order; a name in capitals is the setting that it stands for.
        targets: of the pipeline; () where ``module`` runs by itself, where it has no ``arguments`` with the words as
            they are.
        defaults: settings where nobody set them.
        reads: the stages whose settings ``-h`` shows.
        then: called with the arguments by name, before the pipeline; gives other targets, or None.
    """

    help: str
    arguments: tuple[Argument, ...] = ()
    targets: tuple[str, ...] = ()
    defaults: Mapping[str, str] | None = None
    reads: tuple[str, ...] = ()
    module: str = ""
    then: Callable[[dict[str, str]], tuple[str, ...] | None] | None = None


def _trained(arguments: dict[str, str]) -> tuple[str, ...] | None:
    version = _version(arguments)
    if version in ("v1", "v2_lora"):
        os.environ["V2_MODE"] = {"v1": "v1", "v2_lora": "lora"}[version]
    return ("v3",) if version == "v3" else None


def _evaluated(arguments: dict[str, str]) -> None:
    version = _version(arguments)
    methods = "auto" if version == "v3" else f"{version} label similarity random zero_shot"
    os.environ["METHODS"] = os.environ.get("METHODS") or methods


def _version(arguments: dict[str, str]) -> str:
    if arguments["version"] not in VERSIONS:
        raise UsageError(f"version {arguments['version']} is not supported: {' | '.join(VERSIONS)}")
    return arguments["version"]


_TRAINING = ("train_v3", "generate_rl_data", "train_v2", "export_embeddings")
COMMANDS = {
    "train_v3_rce_only": Command(
        "v3 by RCE alone, with the plan's settings", (("GPU_ID", "7"), MODEL[0], ("RCE_EPOCHS", "10")), ("v3",), PLAN,
        _TRAINING,
    ),
    "train_v3": Command("the whole v3 pipeline", (*WHOLE, LEVER_LM, *MODEL), ("v3",), reads=_TRAINING),
    "inference_v3_best": Command(
        "the best v3 checkpoint against v2 and the baselines, with record and report",
        (("TEST_DATA_NUM", "400"), *MODEL, ("GPU_ID", "7")), ("record",), reads=("inference",),
    ),
    "generate_data": Command(
        "InfoScore beam search: v2's training data", (*WHOLE, *MODEL), ("beam_data",), reads=("generate_data",)
    ),
    "export_embeddings": Command(
        "CLIP embeddings of all items", WHOLE, ("embeddings",), reads=("export_embeddings",)
    ),
    "train_lever_lm": Command(
        "the supervised selector", (*WHOLE, LEVER_LM, *MODEL, ("version", "v2")), ("v2",), reads=("train_v2",),
        then=_trained,
    ),
    "generate_rl_data": Command(
        "RL data: pointers answered by the LVLM", (*WHOLE, *MODEL), ("rl_data",), reads=("generate_rl_data",)
    ),
    "baseline": Command(
        "random, similarity and zero-shot alone", (*WHOLE, *MODEL), ("baseline",),
        {"METHODS": "random similarity zero_shot"}, ("inference",),
    ),
    "inference": Command(
        "one version of the selector and the baselines",
        (*WHOLE, LEVER_LM, *MODEL, ("version", "v2"), ("TEST_DATA_NUM", "200")), ("inference",), reads=("inference",),
        then=_evaluated,
    ),
    "run_experiment": Command(
        "an experiment of the plan, or one's own", (("experiment", ""), ("GPU_ID", "0")),
        reads=("experiment",), module="lever_plus.experiments.run",
    ),
    "doctor": Command(
        "is all right on this machine, and what will it cost", (MODEL[1], ("GPU_ID", "0"), ("DATASET", "auto")),
        reads=("doctor",), module="lever_plus.doctor",
    ),
    "compare": Command("finished runs side by side", reads=("experiment",), module="lever_plus.experiments.compare"),
    "bundle": Command(
        "a finished run as one file that reproduces its rows", reads=("inference",), module="lever_plus.release.pack"
    ),
    "reproduce": Command(
        "the rows of such a file, to the digit", reads=("inference",), module="lever_plus.release.reproduce"
    ),
    "export_lmms_eval": Command(
        "a run's picks as a few-shot task for lmms-eval", reads=("inference",), module="lever_plus.release.lmms_eval"
    ),
    "convert_checkpoint": Command(
        "a checkpoint that holds objects, without running them", module="lever_plus.stages.convert_checkpoint"
    ),
    "dataset": Command("check DATASET: what is missing of a data set", module="lever_plus.data.check"),
    "benchmark_lvlm": Command("speed of the LVLM engine", module="lever_plus.benchmark_lvlm"),
    "benchmark_rl": Command("speed of the RL training", module="lever_plus.benchmark_rl"),
}  # fmt: skip
QUICKSTART = "quickstart"


def main(argv: Sequence[str] | None = None) -> int:
    """The console entry; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return cli.guard(lambda: _run(words))


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else UsageError.exit_code
    if words[0] in ("-V", "--version"):
        print(__version__)
        return 0
    name = words[0].replace("-", "_")
    if name == QUICKSTART:
        return _quickstart(words[1:])
    if name not in COMMANDS:
        raise UsageError(f"unknown command {words[0]!r}; there are: {QUICKSTART}, {', '.join(COMMANDS)}")
    command, rest = COMMANDS[name], words[1:]
    own_words = bool(command.module) and not command.arguments
    if own_words and not (command.reads and {"-h", "--help"} & set(rest)):
        return int(importlib.import_module(command.module).main(rest) or 0)
    given, want_help, dry_run = ([], True, False) if own_words else _parse(name, command, rest)
    if want_help:
        print(_line(name, command) + "\n")
        print(settings_help.table([STAGE_SETTINGS[stage] for stage in command.reads]))
        return 0
    arguments = _set(command, given)
    flags = ["--dry-run"] if dry_run else []
    if not command.targets:
        own = [arguments["experiment"]] if "experiment" in arguments else []
        return int(importlib.import_module(command.module).main([*own, *flags]) or 0)

    targets = (command.then(arguments) if command.then else None) or command.targets
    return pipeline.main([*targets, *flags])


def _parse(name: str, command: Command, words: Sequence[str]) -> tuple[list[str], bool, bool]:
    given, want_help, dry_run, rest = [], False, False, list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            want_help = True
        elif word in ("-n", "--dry-run"):
            dry_run = True
        elif word == "--assume" or word.startswith("--assume="):
            value = word.partition("=")[2] or (rest.pop(0) if rest else "")
            if not value:
                raise UsageError(f"{name}: --assume needs okvqa or vqav2")
            os.environ["ASSUME"] = value
        elif word.startswith("-") and not word[1:2].isdigit():
            raise UsageError(f"{name}: unknown option {word} (see --help)")
        elif config.is_assignment(word):
            raise UsageError(f"{name}: settings stand before the command: {word} lever-plus {name} …")
        else:
            given.append(word)
    if len(given) > len(command.arguments):
        raise UsageError(f"{name}: too many arguments (at most {len(command.arguments)}; see --help)")
    return given, want_help, dry_run


def _set(command: Command, given: Sequence[str]) -> dict[str, str]:
    """Put the arguments that are settings into the environment; returns the others by name."""
    others = {}
    os.environ.pop(names.USUAL, None)
    for number, (name, default) in enumerate(command.arguments):
        word = given[number] if number < len(given) else ""
        if name.isupper():
            if name.lower() in sizes.SETTINGS and not (word or os.environ.get(name)):
                os.environ[names.USUAL] = name
            os.environ[name] = word or os.environ.get(name) or default
        else:
            others[name] = word or default
    if others.get("task", "vqa") != "vqa":
        raise UsageError(
            f"task {others['task']} is not supported: the first argument is vqa (captioning is out of scope)"
        )
    if others.get("experiment") == "":
        raise UsageError("run_experiment: which experiment? 1, 2, 3, 4a, 4b, 5, plan, or one of your own (see --help)")
    for name, value in (command.defaults or {}).items():
        os.environ[name] = os.environ.get(name) or value
    return others


def _quickstart(words: Sequence[str]) -> int:
    """Experiment 1 on the embedded benchmark."""
    _, want_help, dry_run = _parse(QUICKSTART, Command(""), words)
    if want_help:
        print("lever-plus quickstart [-n]: the plan's experiment 1 on the embedded benchmark; results in ./results")
        return 0
    if not os.environ.get("DATASET", "").startswith("mini_"):
        os.environ["DATASET"] = EMBEDDED
    os.environ.setdefault("EXP_NAME", "exp1")
    gpu, flags = os.environ.get("GPU_ID") or "0", ["-n"] if dry_run else []
    own = dict(os.environ)
    code = _run(["train_v3_rce_only", gpu, "rand_sampler", "10", *flags])
    os.environ.clear()  # as two commands: the first one's defaults are nothing that the user set
    os.environ.update(own)
    return code or _run(["inference_v3_best", "200", "rand_sampler", "qwen2.5_vl_3B", gpu, *flags])


def _line(name: str, command: Command) -> str:
    shown = " ".join(f"[{word.lower()}{'=' + default if default else ''}]" for word, default in command.arguments)
    return f"lever-plus {name} {shown}".rstrip() + f"\n  {command.help}"


def usage() -> str:
    """All commands, each with its arguments."""
    rows = [f"  {name:<20} {command.help}" for name, command in COMMANDS.items()]
    first = f"  {QUICKSTART:<20} experiment 1 on the embedded benchmark: from nothing to a record"
    last = "lever-plus COMMAND -h: its arguments and settings"
    return "\n".join([(__doc__ or "").strip(), "", first, *rows, "", last])


if __name__ == "__main__":
    raise SystemExit(main())
