"""LVLM engine: naive path against fast path on the same inputs in one run.

    python -m lever_plus.benchmark_lvlm [--anchors N] [--queries N] [--growth N] [--device cpu|cuda] [--out FILE]
    python -m lever_plus.benchmark_lvlm --arch qwen2.5_vl_3B --random-weights --device cuda --precision bf16

Measures (a) InfoScore beam search (beam 5, 2 shots, pools of 64), (b) RL-data answering (12 pointers a query: a
generated answer, the annotators' answers and the true one scored), (c) inference with shots 1-4, (d) all of it again
from the answer cache; for each prompts/s, exactness, images and tokens that really went through the model (counted
in it), then whether cost and memory stay flat over thousands of prompts, and the share of the machine's matmul rate.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lever_plus import cli, config, io, paths
from lever_plus.benchmark_arch import need_gpu, random_pair
from lever_plus.data.dataset import load_split
from lever_plus.devices import matmul_rate, synchronise
from lever_plus.infoscore import beam_search
from lever_plus.settings import names
from lever_plus.settings.shared import LvlmSettings
from open_mmicl.arguments import Parser, whole
from open_mmicl.errors import NumericError
from open_mmicl.interface import load_interface
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.prompts import Demo, Prompt
from open_mmicl.lazy import lazy
from open_mmicl.metrics.vqa import gt_weights

PIL = lazy("PIL")
mini_world = lazy("lever_plus.mini.world")
open_mmicl_engine = lazy("open_mmicl.engine")
torch = lazy("torch")

POOL, BEAMS, SHOTS, POINTERS, INFER_SHOTS = 64, 5, 2, 12, 4
MINI_TARGETS = {"a": 4.0, "b": 3.0, "c": 3.0}  # the embedded model on a CPU: times as fast as the naive path
CACHE_TARGET = 50.0  # of what is read from the answer cache, whatever the model
KEPT = 0.9  # of the operations saved, the part that must be saved in time where matrix products dominate
MAX_LOG_PROB_DIFFERENCE = 1e-4
BLOCK = 1000  # prompts between two looks at cost and memory
_CALL = 50  # prompts in one call of the growth test
SEED = 7
ARCH_IMAGE = (640, 480)  # width, height of the images that a full-size architecture is measured with


@dataclass
class Side:
    """What one path did in one part: counted in the model's own modules."""

    prompts: int = 0
    seconds: float = 0.0
    images: int = 0
    tokens: int = 0
    patches: int = 0
    log_probs: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Prompts per second."""
        return self.prompts / self.seconds


class Counter:
    """Counts images, vision patches and language-model tokens that pass through a model, for the side that is on."""

    def __init__(self, model: Any) -> None:
        self.side = Side()
        model.model.visual.register_forward_pre_hook(self._vision, with_kwargs=True)
        once = model.model.language_model.rotary_emb  # called once a pass by either path
        once.register_forward_pre_hook(self._tokens)

    def _vision(self, module: Any, args: tuple, kwargs: dict) -> None:
        grids = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        self.side.images += len(grids)
        self.side.patches += int(grids.prod(-1).sum())

    def _tokens(self, module: Any, args: tuple) -> None:
        self.side.tokens += args[0].shape[0] * args[0].shape[1]


class World:
    """Questions to ask: the embedded benchmark's, with images in the size the model is to be measured at."""

    def __init__(self, folder: Path, size: tuple[int, int] | None) -> None:
        mini_world.generate(folder, n_train=1200, n_val=300)
        self.train = load_split(paths.dataset(LvlmSettings(dataset="mini_okvqa", mini_okvqa_path=str(folder))), "train")
        if size is not None:
            _enlarge({self.train.image_path(row) for row in range(len(self.train))}, size)
        self.random = np.random.default_rng(SEED)

    def prompt(self, rows: list[int], query: int) -> Prompt:
        """Demonstrations in prompt order, then the query."""
        demos = tuple(self.train.demo(row) for row in rows)
        assert all(isinstance(demo, Demo) for demo in demos)
        return Prompt(demos, self.train.image_path(query), self.train.question(query))

    def draw(self, pool: int) -> tuple[int, list[int]]:
        """A query and its pool."""
        rows = self.random.choice(len(self.train), pool + 1, replace=False).tolist()
        return rows[0], rows[1:]


def main(argv: list[str]) -> int:
    """Parse, measure, print a table, write JSON; returns 0, or raises."""
    options = _options(argv)

    names.tell([])
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory(prefix="lever_benchmark_") as scratch:
        lvlms, size = _models(options)
        world = World(Path(scratch) / "world", size)
        counters = [Counter(model) for model in {id(lvlm.model): lvlm.model for lvlm in lvlms}.values()]
        naive = open_mmicl_engine.Engine(lvlms[0], "naive", None, 0, 0)
        fast = open_mmicl_engine.Engine(lvlms[1], "fast", Path(scratch) / "answers.sqlite", options.token_budget, 0)
        report: dict[str, Any] = {
            "arch": options.arch, "device": options.device, "precision": lvlms[0].dtype_name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__, "token_budget": fast.token_budget, "naive_batch": lvlms[0].config.naive_batch,
            "parts": {},
        }  # fmt: skip
        if options.device == "cuda":
            report["gpu"] = torch.cuda.get_device_name()
        works = _works(world, options)
        _warm_up(world, naive, fast)
        total = {"naive": Side(), "fast": Side()}
        for name, work in works.items():
            sides = _measure(work, {"naive": naive, "fast": fast}, counters, options.device)
            report["parts"][name] = _compare(sides)
            for side, done in sides.items():
                total[side].prompts += done.prompts
                total[side].seconds += done.seconds
                total[side].texts += done.texts
                total[side].log_probs += done.log_probs
        every = [work for some in works.values() for work in some]
        again = _measure(every, {"fast": fast}, counters, options.device)
        report["parts"]["d"] = _compare({"naive": total["naive"], **again})
        _count_operations(report, lvlms[1])
        report["rate_of_matmul"] = _utilisation(report, lvlms[1], options.device)
        report["growth"] = _growth(world, fast, options)
    report["targets"] = _targets(report)
    io.write_json(options.out, report, indent=1)
    print(_table(report))
    print(f"written: {options.out}")
    worst = max(part["max_log_prob_difference"] for part in report["parts"].values())
    same = min(part["identical_answers"] for part in report["parts"].values())
    if report["precision"] == "fp32" and (worst > MAX_LOG_PROB_DIFFERENCE or same < 1):
        raise NumericError(
            f"the fast path is not exact: log-probabilities differ by {worst:.2e}, {same:.2%} identical answers"
        )
    return 0


def _options(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m lever_plus.benchmark_lvlm", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--arch", default="mini", choices=["mini", "qwen2.5_vl_3B"])
    parser.add_argument(
        "--random-weights", action="store_true", help="a random model of the architecture: nothing is downloaded"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(%(default)s)")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--anchors", type=whole(1), default=4, help="beam searches, 379 prompts each (%(default)s)")
    parser.add_argument("--queries", type=whole(1), default=12, help="queries of (b) and (c) (%(default)s)")
    parser.add_argument("--growth", type=int, default=8, help="thousands of prompts of the growth test (%(default)s)")
    parser.add_argument("--token-budget", type=int, default=0, help="tokens in a pass; 0: the configuration's")
    parser.add_argument("--out", type=Path, default=None, help="the JSON that is written (in results/benchmark)")
    options = parser.parse_args(argv)
    if options.device == "cuda":
        need_gpu()
    options.out = options.out or config.HOME / "results" / "benchmark" / f"lvlm_{options.arch}_{options.device}.json"
    return options


def _models(options: argparse.Namespace) -> tuple[list[Any], tuple[int, int] | None]:
    """(the naive and the fast path's wrapper, image size or None for the embedded images)."""
    folder = config.CONFIG_DIR / "infer_model"
    if options.arch == "mini":
        cfg = InferModelConfig.load(folder / "mini_qwen2.5_vl.yaml")
        return [load_interface(cfg, options.device, options.precision) for _ in range(2)], None
    cfg = InferModelConfig.load(folder / f"{options.arch}.yaml")
    if options.random_weights:
        return random_pair(cfg, options.device, options.precision), ARCH_IMAGE
    return [load_interface(cfg, options.device, options.precision) for _ in range(2)], ARCH_IMAGE


Work = Callable[[Any, Side], None]


def _works(world: World, options: argparse.Namespace) -> dict[str, list[Work]]:
    """Small pieces of each part; both sides get the same ones, in turns."""
    settings, train = open_mmicl_engine.GenerationSettings(), world.train

    def search(query: int, pool: list[int]) -> Work:
        def work(engine: Any, side: Side) -> None:
            def score(contexts: Any) -> np.ndarray:
                prompts = [world.prompt([pool[i] for i in context], query) for context in contexts]
                found = [row[0].log_prob for row in engine.score(prompts, [[train.answer(query)]] * len(prompts))]
                side.prompts += len(prompts)
                side.log_probs += found
                return np.array(found)

            beams = beam_search(score, len(pool), BEAMS, SHOTS)
            side.texts.append(str([beam.pointer for beam in beams]))

        return work

    def answer(prompts: list[Prompt], answers: list[list[tuple[str, bool]]] | None) -> Work:
        def work(engine: Any, side: Side) -> None:
            replies = engine.ask(prompts, settings, answers)
            side.prompts += len(prompts)
            side.texts += [reply.text for reply in replies]
            side.log_probs += [score.log_prob for reply in replies for score in reply.scores]

        return work

    anchors = [world.draw(POOL) for _ in range(options.anchors)]
    asked = []
    for query, pool in (world.draw(POOL) for _ in range(options.queries)):
        chosen = [world.random.choice(POOL, SHOTS, replace=False) for _ in range(POINTERS)]
        prompts = [world.prompt([pool[i] for i in c], query) for c in chosen]
        scored = [(a, True) for a, _ in gt_weights(train.answers(query))] + [(train.answer(query), False)]
        asked.append((prompts, [scored] * len(prompts)))
    shots = []
    for query, pool in (world.draw(POOL) for _ in range(options.queries * 3)):
        shots += [world.prompt(pool[:k][::-1], query) for k in range(1, INFER_SHOTS + 1)]
    step = INFER_SHOTS * 12
    return {
        "a": [search(query, pool) for query, pool in anchors],
        "b": [answer(prompts, answers) for prompts, answers in asked],
        "c": [answer(shots[i : i + step], None) for i in range(0, len(shots), step)],
    }


def _measure(works: list[Work], engines: dict[str, Any], counters: list[Counter], device: str) -> dict[str, Side]:
    """Run the pieces on both sides in turns, so that a busy moment of the machine hits both."""
    sides = {name: Side() for name in engines}
    for work in works:
        for name, engine in engines.items():
            _timed(work, engine, sides[name], counters, device)
    return sides


def _timed(work: Work, engine: Any, side: Side, counters: list[Counter], device: str) -> None:
    for counter in counters:
        counter.side = side
    started = time.perf_counter()
    work(engine, side)
    synchronise(device)
    side.seconds += time.perf_counter() - started


def _warm_up(world: World, *engines: Any) -> None:
    """First calls allocate and compile; they are nobody's result."""
    prompts = [world.prompt([row + 1, row + 2], row) for row in range(4)]
    for engine in engines:
        engine.generate(prompts)
        engine.score(prompts, [[world.train.answer(0)]] * len(prompts))


def _compare(sides: dict[str, Side]) -> dict[str, Any]:
    naive, fast = sides["naive"], sides["fast"]
    difference = np.abs(np.array(naive.log_probs) - np.array(fast.log_probs))
    same = [a == b for a, b in zip(naive.texts, fast.texts, strict=True)]
    return {
        "prompts": naive.prompts,
        "speedup": fast.rate / naive.rate,
        "naive": _side(naive),
        "fast": _side(fast),
        "max_log_prob_difference": float(difference.max()) if difference.size else 0.0,
        "identical_answers": float(np.mean(same)),
    }


def _side(side: Side) -> dict[str, Any]:
    values = {k: v for k, v in asdict(side).items() if k not in ("log_probs", "texts")}
    return {**values, "prompts_per_second": side.rate}


def _count_operations(report: dict[str, Any], lvlm: Any) -> None:
    """Floating-point operations of both paths' linear layers: what went through them, by the model's geometry."""
    model = lvlm.model
    decoder = sum(p.numel() for p in model.model.language_model.layers.parameters())
    vision = sum(p.numel() for p in model.model.visual.blocks.parameters())
    for name in "abc":
        part = report["parts"][name]
        for side in (part["naive"], part["fast"]):
            side["operations"] = 2.0 * (decoder * side["tokens"] + vision * side["patches"])
        part["operations_ratio"] = part["naive"]["operations"] / part["fast"]["operations"]


def _targets(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What each part's speed is held against. A model of real size spends its time in matrix products: there the naive
    path's operations over the fast path's say what can be won; the embedded one is bound by what a pass costs besides.
    """
    if report["arch"] == "mini" and report["device"] == "cpu":
        least = MINI_TARGETS
    else:
        least = {name: KEPT * report["parts"][name]["operations_ratio"] for name in "abc"}
    least = {**least, "d": CACHE_TARGET}
    return {name: {"at_least": t, "met": report["parts"][name]["speedup"] >= t} for name, t in least.items()}


def _utilisation(report: dict[str, Any], lvlm: Any, device: str) -> dict[str, float]:
    """Operations of the fast path's linear layers per second, beside a measured matmul rate."""
    parts = [report["parts"][name]["fast"] for name in "abc"]
    matmul = matmul_rate(device, lvlm.model.dtype)
    achieved = sum(part["operations"] for part in parts) / sum(part["seconds"] for part in parts)
    return {"achieved_flops": achieved, "matmul_flops": matmul, "share": achieved / matmul}


def _growth(world: World, engine: Any, options: argparse.Namespace) -> list[dict[str, float]]:
    """Cost and memory of each thousand prompts: both must stay flat."""
    found = []
    for thousand in range(1, options.growth + 1):
        seconds = 0.0
        for start in range(0, BLOCK, _CALL):
            query, pool = world.draw(_CALL + 1)
            prompts = [world.prompt([pool[i], pool[i + 1]], query) for i in range(min(_CALL, BLOCK - start))]
            started = time.perf_counter()
            engine.score(prompts, [[world.train.answer(query)]] * len(prompts))
            synchronise(options.device)
            seconds += time.perf_counter() - started
        found.append({"thousand": thousand, "seconds": seconds, "memory_mib": _memory(options.device)})
    return found


def _memory(device: str) -> float:
    """Peak memory so far [MiB]: of the GPU, or resident on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _enlarge(paths: set[str], size: tuple[int, int]) -> None:
    for path in paths:
        with PIL.Image.open(path) as image:
            larger = image.convert("RGB").resize(size, PIL.Image.Resampling.BICUBIC)
        larger.save(path, quality=90)


def _table(report: dict[str, Any]) -> str:
    titles = {
        "a": "InfoScore beam search",
        "b": "RL-data answering",
        "c": "inference, shots 1-4",
        "d": "again, from the cache",
    }
    lines = [
        f"{report['arch']} on {report['device']}, {report['precision']}, {report['threads']} thread(s)",
        f"{'':26}{'prompts':>8}{'naive/s':>9}{'fast/s':>9}{'ratio':>8}{'images':>15}{'tokens':>19}"
        f"{'max |d|':>9}{'same':>7}",
    ]
    for key, part in report["parts"].items():
        naive, fast = part["naive"], part["fast"]
        images = f"{naive['images']:,}>{fast['images']:,}" if key != "d" else f">{fast['images']:,}"
        tokens = f"{naive['tokens']:,}>{fast['tokens']:,}" if key != "d" else f">{fast['tokens']:,}"
        lines.append(
            f"({key}) {titles[key]:22}{part['prompts']:>8}{naive['prompts_per_second']:>9.1f}"
            f"{fast['prompts_per_second']:>9.1f}"
            f"{part['speedup']:>7.1f}x{images:>15}{tokens:>19}"
            f"{part['max_log_prob_difference']:>9.0e}{part['identical_answers']:>7.1%}"
        )
    use = report["rate_of_matmul"]
    lines.append(
        f"fast path: {use['achieved_flops'] / 1e9:,.0f} GFLOP/s, {use['share']:.0%} of this machine's matmul rate"
    )
    for row in report["growth"]:
        lines.append(f"thousand {row['thousand']}: {row['seconds']:.2f} s, peak memory {row['memory_mib']:,.0f} MiB")
    for name, target in report["targets"].items():
        ratio = report["parts"][name].get("operations_ratio")
        saved = "" if ratio is None else f" (operations: {ratio:.2f}x fewer)"
        lines.append(f"target ({name}) >= {target['at_least']:.3g}x: {'met' if target['met'] else 'NOT met'}{saved}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(cli.guard(lambda: main(sys.argv[1:])))
