"""Linear layers in fp32 on this CPU: torch's own product against oneDNN's, by rows, in turns, one thread, CPU seconds.

    python -m benchmarks.products [--model middle|3b] [--rows 4,16,128,512,1500] [--rounds 9]

What open_mmicl/wide.py chooses rests on it. "kept": the weight is in oneDNN's order already, as that of a 16-bit model
of up to half a billion parameters is.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional

from benchmarks.peers import MIDDLE_TEXT
from lever_plus import cli
from lever_plus.benchmark_arch import TEXT_3B
from open_mmicl import wide
from open_mmicl.arguments import Parser, whole
from open_mmicl.errors import UsageError
from open_mmicl.memory import keep_freed

_COPIES = 4  # of a weight of up to 16 MB, so that none is in the CPU's cache from the round before
_SMALL = 1 << 22  # numbers in it
MODELS = {"middle": MIDDLE_TEXT, "3b": TEXT_3B}


def layers(model: str) -> list[tuple[int, int]]:
    """(inputs, outputs) of a decoder layer's four products."""
    text = MODELS[model]
    hidden, mlp, heads = text["hidden_size"], text["intermediate_size"], text["num_attention_heads"]
    joined = hidden + 2 * text["num_key_value_heads"] * hidden // heads  # queries, keys and values side by side
    return [(hidden, joined), (hidden, hidden), (hidden, 2 * mlp), (mlp, hidden)]


def in_turns(sides: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median CPU seconds of each side."""
    taken: list[list[float]] = [[] for _ in sides]
    for _, (side, times) in itertools.product(range(rounds + 1), list(zip(sides, taken, strict=True))):
        started = time.process_time()
        side()
        times.append(time.process_time() - started)
    return [statistics.median(times[1:]) for times in taken]  # a first call costs extra


@torch.inference_mode()
def measure(inputs: int, outputs: int, rows: int, rounds: int) -> list[float]:
    """CPU seconds of torch's product, of oneDNN's, and of oneDNN's with the weight kept in its order."""
    count = _COPIES if inputs * outputs <= _SMALL else 1
    weights = [torch.randn(outputs, inputs) for _ in range(count)]
    kept = [wide.reordered(weight) for weight in weights]
    hidden = torch.randn(rows, inputs)
    sides: list[Callable[[], object]] = [
        lambda: [functional.linear(hidden, weight) for weight in weights],
        lambda: [wide.by_onednn(hidden, weight, None) for weight in weights],
        lambda: [wide.by_onednn(hidden, weight, None) for weight in kept],
    ]
    return [seconds / count for seconds in in_turns(sides, rounds)]


def main(argv: list[str]) -> int:
    """Print a table."""
    parser = Parser(prog="python -m benchmarks.products", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="middle", choices=list(MODELS))
    rows = [4, 16, 128, 512, 1500]
    parser.add_argument("--rows", type=_numbers, default=rows, metavar="N,N,…", help=f"of a product ({rows})")
    parser.add_argument("--rounds", type=whole(1), default=9, help="medians (%(default)s)")
    options: argparse.Namespace = parser.parse_args(argv)
    if not wide.has_onednn():
        raise UsageError("this build of torch has no oneDNN: there is nothing to compare, and the engine does without")
    torch.set_num_threads(1)
    keep_freed()  # as the engine does
    print(f"{'inputs':>7}{'outputs':>8}{'rows':>6}{'torch ms':>10}{'oneDNN':>8}{'kept':>7}   (times as fast)")
    for rows in options.rows:
        sums = [0.0] * 3
        for inputs, outputs in layers(options.model):
            found = measure(inputs, outputs, rows, options.rounds)
            sums = [a + b for a, b in zip(sums, found, strict=True)]
            print(_line(f"{inputs:>7}{outputs:>8}{rows:>6}", found), flush=True)
        print(_line(f"{'the layer':>15}{rows:>6}", sums), flush=True)
    return 0


def _numbers(text: str) -> list[int]:
    return [whole(1)(part) for part in text.split(",")]


def _line(head: str, seconds: list[float]) -> str:
    torchs, plain, kept = seconds
    return f"{head}{1e3 * torchs:>10.2f}{torchs / plain:>8.2f}{torchs / kept:>7.2f}"


if __name__ == "__main__":
    raise SystemExit(cli.guard(lambda: main(sys.argv[1:])))
