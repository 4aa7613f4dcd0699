"""Is all right on this machine, and what will it cost? Looks before anything is paid; a few minutes.

Versions, GPUs and free memory; the data set's files, texts and images; the model's folder; the memory of the plan; the
prompt as text; the fast path against transformers' own on real prompts; speed; the price of experiment 1 and the plan.
Of a model on a server: who answers and what it can, its scores against our own engine's, speed and price.
One page on the terminal and results/<data set>/doctor.json; exit code 0 only if all is well.
"""

import functools
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import cli, config, io, paths
from lever_plus.cli import log
from lever_plus.data.check import check
from lever_plus.data.dataset import load_split
from lever_plus.devices import select_gpu, torch_device
from lever_plus.settings.experiment import DoctorSettings
from lever_plus.stages import cost, flops, lvlm, prepare_dataset, work
from open_mmicl.errors import DamagedInputError, LeverError, MissingInputError, NumericError, UsageError
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.fingerprint import folder_fingerprint
from open_mmicl.interface.prompts import Prompt
from open_mmicl.lazy import lazy
from open_mmicl.metrics.vqa import gt_weights

arms = lazy("lever_plus.experiments.arms")
forecast = lazy("lever_plus.experiments.forecast")
experiments_runner = lazy("lever_plus.experiments.runner")
interface_images = lazy("open_mmicl.interface.images")
loading = lazy("open_mmicl.interface.loading")
of = lazy("lever_plus.doctor_engine")
open_mmicl_memory = lazy("open_mmicl.memory")
psutil = lazy("psutil")
templates = lazy("open_mmicl.interface.templates")
torch = lazy("torch")

GIB = 2**30
Lines = list[str]


class Doctor:
    """Runs checks, prints each as it is done, and keeps what was found. Later checks use what earlier ones found."""

    def __init__(self, settings: DoctorSettings) -> None:
        self.settings, self.exit_code = settings, 0
        self.found: dict[str, Any] = {"checks": {}, "dataset": settings.dataset}

    def check(self, name: str, look: Callable[[], tuple[Lines, dict[str, Any]]]) -> bool:
        """Run one check; whether it is well. The first error's exit code is the doctor's."""
        started = time.monotonic()
        try:
            lines, data = look()
            well = True
        except LeverError as error:
            lines, data, well = [str(error)], {"error": str(error), "exit_code": error.exit_code}, False
            self.exit_code = self.exit_code or error.exit_code
        self.found["checks"][name] = {"well": well, "seconds": round(time.monotonic() - started, 2), **data}
        log.info(f"[{'well' if well else 'WRONG'}] {name}: {lines[0]}")
        for line in lines[1:]:
            log.info(f"       {line}")
        return well


def run(settings: DoctorSettings, dry_run: bool) -> int:
    """Look at everything; returns 0 where all is well, else the first fault's exit code."""
    output = paths.dataset_dir(settings) / "doctor.json"
    if dry_run:
        log.info(f"dry run: would look at machine, data set, model and prices, and write {output}")
        return 0
    select_gpu(settings.device, settings.gpu_id)
    doctor = Doctor(settings)
    doctor.found["model"] = paths.lvlm_name(settings)
    log.info(f"doctor: {doctor.found['model']} on {settings.dataset}")
    doctor.check("machine", machine)
    data = doctor.check("data set", lambda: data_set(settings))
    images = data and doctor.check("images", lambda: images_open(settings))
    served = lvlm.model_config(settings).interface == "openai"
    ready = _server_is_ready(doctor) if served else _model_is_ready(doctor, data)
    if images and ready:
        ask_server(doctor) if served else ask(doctor)
    elif data:
        doctor.check("price", lambda: prices(settings, {}))
    io.write_json(output, doctor.found, indent=1)
    wrong = [name for name, found in doctor.found["checks"].items() if not found["well"]]
    log.info(f"doctor: {'all is well' if not wrong else 'not well: ' + ', '.join(wrong)} ({output})")
    return doctor.exit_code


def _model_is_ready(doctor: Doctor, data: bool) -> bool:
    """Whether the model's folder is whole and the plan fits the memory."""
    settings = doctor.settings
    there = doctor.check("model folder", lambda: model_folder(lvlm.model_config(settings)))
    return there and data and doctor.check("memory", lambda: planned_memory(settings))


def _server_is_ready(doctor: Doctor) -> bool:
    """Whether the server is there, can what is needed, and its reference is whole."""
    cfg = lvlm.model_config(doctor.settings)
    there = doctor.check("server", lambda: of.server(cfg))
    if not cfg.has_own_engine:
        return there
    return doctor.check("reference", lambda: model_folder(cfg.own_engine())) and there


def _requirements() -> list[str]:
    """requirements.txt of the repository, or as the installed package has it."""
    file = config.REPO_ROOT / "requirements.txt"
    if file.is_file():
        return [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line.partition(";")[0].strip() for line in metadata.requires("lever-plus") or ()]


def machine() -> tuple[Lines, dict[str, Any]]:
    """Versions, processors, memory."""
    pinned = dict(line.split("==") for line in _requirements() if "==" in line)
    here = {name: metadata.version(name) for name in pinned if _installed(name)}
    others = [f"{name} {here.get(name, 'missing')} (tested with {v})" for name, v in pinned.items() if here.get(name, "").split("+")[0] != v]  # fmt: skip  # noqa: E501
    cores, memory = len(os.sched_getaffinity(0)), psutil.virtual_memory()
    lines = [
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {here.get('transformers')}",
        f"{cores} CPU cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of memory free",
    ]
    lines += [f"other versions: {', '.join(others)}"] if others else []
    gpus = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append({"name": torch.cuda.get_device_name(i), "free_gib": free / GIB, "total_gib": total / GIB})
        lines.append(f"GPU {i}: {gpus[-1]['name']}, {free / GIB:.1f} of {total / GIB:.1f} GiB free")
    return [*lines, *([] if gpus else ["no GPU: the CPU answers"])], {"versions": here, "gpus": gpus, "cores": cores}


def data_set(settings: DoctorSettings) -> tuple[Lines, dict[str, Any]]:
    """Files, texts, and that every image's file is there.

    Raises:
        MissingInputError, DamagedInputError.
    """
    if paths.dataset(settings).generator:
        prepare_dataset.run(settings, False)
    lines, complete = check(settings)
    if not complete:
        wrong = [line for line in lines if any(word in line for word in ("missing", "empty files", "set "))]
        raise MissingInputError("; ".join(wrong))
    return lines, {"lines": lines}


def images_open(settings: DoctorSettings) -> tuple[Lines, dict[str, Any]]:
    """Open a sample of each split's images.

    Raises:
        DamagedInputError: names the first that cannot be read.
    """
    counts = {}
    for split in ("train", "val"):
        rows = load_split(paths.dataset(settings), split)
        _, first = np.unique(rows.image_ids, return_index=True)
        chosen = np.random.default_rng(settings.data_seed).permutation(first)[: settings.doctor_images]
        for row in chosen:
            interface_images.load_rgb(rows.image_path(int(row)))
        counts[split] = len(chosen)
    return [f"{counts['train']} train and {counts['val']} validation images opened"], counts


def model_folder(cfg: InferModelConfig) -> tuple[Lines, dict[str, Any]]:
    """Files, whole weights, processor and chat template; loads no weights.

    Raises:
        MissingInputError, DamagedInputError.
    """
    folder = loading.model_dir(cfg)
    fingerprint = folder_fingerprint(folder)
    tokenizer = loading.load_tokenizer(folder)
    template = templates.find(cfg, folder, tokenizer.chat_template)
    if cfg.interface == "qwen_vl":
        number = io.read_object(folder / "config.json", "model configuration").get("image_token_id")
        token = tokenizer.convert_ids_to_tokens(number) if isinstance(number, int) else None
        if token is None:
            raise DamagedInputError(f"{folder / 'config.json'}: image_token_id {number} is no token of the tokenizer")
        render = functools.partial(_rendered, tokenizer, template.text)
        templates.check(template, render, cfg, token)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return [
        f"{cfg.name}: {folder}",
        f"{len(list(folder.glob('*.safetensors')))} weight file(s), {size / GIB:.2f} GiB, all whole",
        f"chat template: {template.source}",
    ], {"folder": str(folder), "fingerprint": fingerprint, "weight_bytes": size}


def _rendered(tokenizer: Any, template: str, messages: list[dict], generation: bool) -> str:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation, chat_template=template
    )


def planned_memory(settings: DoctorSettings) -> tuple[Lines, dict[str, Any]]:
    """What the settings need on the device, beside what is free there.

    Raises:
        UsageError: more than there is; names the settings to lower.
    """
    cfg, there = lvlm.model_config(settings), cost.sizes(settings)
    device = torch.device(torch_device(settings.device))
    free = open_mmicl_memory.device_free(device)
    if there.model is None:
        return [f"{free / GIB:.1f} GiB free; what the model needs is not known from its config.json"], {"free": free}
    tokens, width = settings.token_budget or cfg.token_budget, flops.BYTES[there.dtype]
    images = cost.price(settings, work.rl_data(settings), there)
    features = there.model.feature_bytes(images.distinct_images * there.per_image, there.dtype)
    cache = settings.image_cache_mb or cfg.image_cache_mb
    parts = {
        "weights": there.model.weights * width,
        "a pass of TOKEN_BUDGET": tokens * (12 * there.model.hidden + 3 * there.model.inner) * width
        + there.model.kv_bytes(tokens, there.dtype),
        "shared prefixes": cfg.kv_cache_mb << 20,
        "image features": min(cache << 20, features) if cache else 0,
    }
    needed = sum(parts.values())
    told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
    if needed > free:
        raise UsageError(
            f"{needed / GIB:.2f} GiB are needed on {device} and {free / GIB:.2f} are free ({told}): lower TOKEN_BUDGET="
            f"{tokens} or IMAGE_CACHE_MB={cache}, free memory, or spread the model with DEVICE_MAP=auto"
        )
    return [
        f"{needed / GIB:.2f} of {free / GIB:.1f} GiB free on {device} ({told} GiB)",
        cost.image_memory_line(settings, images, there),
    ], {"free": free, "needed": needed, "features": features, **parts}


def ask(doctor: Doctor) -> None:
    """The checks that need the model: fp32 first, then the configured data type, whose engine is timed."""
    settings = doctor.settings
    cfg, device, generation = lvlm.model_config(settings), torch_device(settings.device), lvlm.generation(settings)
    kind, configured = device.split(":")[0], loading.precision_name(cfg, settings.precision)
    prompts, asked = real_prompts(settings, settings.doctor_prompts, 0)
    kept: dict[str, Any] = {}

    def compare(precision: str) -> tuple[Lines, dict[str, Any]]:
        kept.clear()
        kept["lvlm"] = of.load(cfg, device, precision)
        if precision == configured:
            lvlm.check_texts(of.Engine(kept["lvlm"], "naive", None, 0, 0), *rows_asked(settings))
        apart, kept["fast"] = of.exactness(kept["lvlm"], prompts, asked, generation, settings.token_budget)
        if precision == "fp32" and (apart.largest > of.EXACT[kind] or apart.answers):
            raise NumericError(f"the fast path is not transformers' own in fp32: {apart.words()}")
        return [apart.words()], {"largest": apart.largest, "answers_differ": apart.answers, "prompts": apart.prompts}

    for precision in dict.fromkeys(("fp32", configured)):
        if precision != configured and _fp32_is_too_large(settings, torch.device(device)):
            log.info("[ -- ] fp32 against transformers alone: not enough memory for the weights in fp32")
            continue
        if not doctor.check(f"{precision} against transformers alone", lambda p=precision: compare(p)):
            return
    doctor.check("prompt", lambda: (of.shown_prompt(kept["lvlm"], prompts[1], asked[1][0][0]), {}))

    def same() -> tuple[Lines, dict[str, Any]]:
        found = of.promise(kept["lvlm"], kept["fast"], prompts, asked, generation)
        lines = [f"{how}: {apart.words()}" for how, apart in found.items()]
        bound = 0.0 if kept["fast"].fixed else of.SAME
        if not kept["fast"].fixed and configured != "fp32":
            lines.append(f"no more is promised in {configured} on this path (docs/engine.md, 16 bit)")
        elif any(apart.answers or apart.largest > bound for apart in found.values()):
            raise NumericError(f"answers in {configured} depend on their company: {'; '.join(lines)}")
        return lines, {how: {"largest": a.largest, "answers_differ": a.answers} for how, a in found.items()}

    doctor.check("an answer does not depend on its neighbours", same)
    rates: dict[str, float] = {}

    def fast_enough() -> tuple[Lines, dict[str, Any]]:
        fresh, scored = real_prompts(settings, 4 * settings.doctor_prompts, 1)
        rates.update(of.speed(kept["fast"], fresh, scored, generation, cost.sizes(settings).model))
        share = f", {rates['share']:.0%} of this device's matmul rate" if "share" in rates else ""
        told = f"{rates['prompts_per_second']:.1f} prompts/s, {rates['tokens_per_second']:,.0f} tokens/s"
        return [f"{told}{share}"], dict(rates)

    doctor.check("speed", fast_enough)
    doctor.check("price", lambda: prices(settings, rates))


def ask_server(doctor: Doctor) -> None:
    """The checks that ask the server: real prompts, scores against our own engine's, speed."""
    settings, generation, rates = doctor.settings, lvlm.generation(doctor.settings), {}
    folder = tempfile.TemporaryDirectory(prefix="lever_doctor_")  # what is asked twice is compared and paid once
    cache = Path(folder.name) / "answers.sqlite"
    engine = of.Engine.load(lvlm.model_config(settings), device=torch_device(settings.device), cache_path=cache)

    def answers() -> tuple[Lines, dict[str, Any]]:
        prompts, asked = real_prompts(settings, settings.doctor_prompts, 0)
        if not engine.gives_scores:
            engine.ask(prompts, generation, None)
            return [f"{len(prompts)} answers; no log-probabilities are asked for (scores: none)"], {}
        lvlm.check_texts(engine, *rows_asked(settings))
        engine.ask(prompts, generation, asked)
        told = f"log-probabilities within {engine.apart:.1e} of our own engine's"
        return [f"{len(prompts)} answers; {told}"], {"largest": engine.apart}

    def speed() -> tuple[Lines, dict[str, Any]]:
        prompts, asked = real_prompts(settings, 4 * settings.doctor_prompts, 1)
        started = time.perf_counter()
        engine.ask(prompts, generation, asked if engine.gives_scores else None)
        rates["prompts_per_second"] = len(prompts) / (time.perf_counter() - started)
        return [f"{rates['prompts_per_second']:.1f} prompts/s"], dict(rates)

    if doctor.check("answers", answers):
        doctor.check("speed", speed)
    doctor.check("price", lambda: prices(settings, rates))
    engine.close()
    folder.cleanup()


def rows_asked(settings: DoctorSettings) -> tuple[Any, np.ndarray]:
    """(the train split, its rows whose answers will be scored: the anchors and the RL queries)."""
    train = load_split(paths.dataset(settings), "train")
    return train, lvlm.train_query_order(train, settings)[: max(settings.sample_num, settings.rl_query_num)]


def real_prompts(settings: DoctorSettings, count: int, seed: int) -> tuple[list[Any], list[list[tuple[str, bool]]]]:
    """Prompts of the user's data with 0 to 4 demonstrations, and the (answer, end) pairs to score for each."""
    train, rng = load_split(paths.dataset(settings), "train"), np.random.default_rng([settings.data_seed, 9, seed])
    prompts, asked = [], []
    for i in range(count):
        query, *demos = rng.choice(len(train), 1 + min(i % 5, len(train) - 1), replace=False).tolist()
        prompts.append(Prompt(tuple(train.demo(row) for row in demos), train.image_path(query), train.question(query)))
        whole = [(answer, True) for answer, _ in gt_weights(train.answers(query))]
        asked.append([(train.answer(query), False), *whole])
    return prompts, asked


def prices(settings: DoctorSettings, rates: dict[str, float]) -> tuple[Lines, dict[str, Any]]:
    """Experiment 1 and the whole plan: prompts, operations, hours on named cards and as measured here."""
    runner = experiments_runner.Runner(settings, dict(os.environ))
    plan = arms.all_arms(experiments_runner.repository_path(settings.experiment_dir), runner.env)
    there, cards = cost.sizes(settings), cost.cards(settings)
    lines, data = ["at most, from nothing:"], {}
    for name, ways in (("experiment 1", ("1",)), ("the plan, longest way", ("1", "2", "4a", "4b", "3"))):
        walked = [arm for way in ways for arm in plan[way]]
        prompts, operations = forecast.total(runner, walked, there, rival=len(ways) > 1)
        data[name] = {"prompts": prompts, "operations": operations}
        lines.append(f"{name}: {prompts:,} LVLM prompts; {cost.operations_line(operations, cards)}")
        if operations is not None and rates.get("flops"):
            hours = operations / rates["flops"] / 3600
            data[name]["device_hours"] = hours
            lines.append(f"  as measured here: {hours:.2g} device hours, {hours / cards:.2g} h on {cards} device(s)")
        elif "flops" not in rates and rates:
            data[name]["hours"] = prompts / rates["prompts_per_second"] / 3600
            lines.append(f"  as measured here: {data[name]['hours']:.2g} h")
    return lines, data


def _fp32_is_too_large(settings: DoctorSettings, device: Any) -> bool:
    sizes = cost.sizes(settings).model
    return sizes is not None and 1.3 * 4 * sizes.weights > open_mmicl_memory.device_free(device)


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.stage_main(DoctorSettings, run, __doc__ or "", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    raise SystemExit(main())
