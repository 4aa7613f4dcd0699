"""A soak: one results folder, the pipeline again and again, killed at random moments, and what is left compared.

    python -m tests.soak [--minutes M] [--seed S] [--whole FOLDER] [--folder FOLDER]

An undisturbed run (FOLDER of --whole, made where it is not there) says what must come out. In the other folder the same
command is started and hit after a random time by SIGKILL, SIGTERM or SIGINT: the command itself, its whole group, or
one process of it. Once it has come through, its products must be the undisturbed run's byte for byte, its files as many
and as large, and nothing of an interrupted run may be left. Then some products are removed and it goes on. The largest
memory of a round must not grow. Exit code 1: something did not hold.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil

from lever_plus.config import REPO_ROOT
from open_mmicl.arguments import Parser
from tests.test_end_to_end import environment, products

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Interrupted, or killed: as Popen tells it of the command itself, and as the command tells it of one of its processes.
FINE = {0, 130, -9, -15, -2, 137, 143}
GROWTH = 1.3  # of the largest memory of a round
CACHE = "cache/answers.sqlite"
PARTS = ("generated_data", "model_cpk", "icl_inference", "experiments", CACHE, "cache/clip_val.pt")


def tree(process: psutil.Process) -> list[psutil.Process]:
    """A process and those below it that there are."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def memory(processes: list[psutil.Process]) -> int:
    """Bytes in memory that belong to no other process, together."""
    total = 0
    for one in processes:
        try:
            total += one.memory_info().rss
        except psutil.Error:
            continue
    return total


def files_of(results: Path) -> dict[str, int]:
    """Size of every file but the logs, whose lines tell of interruptions, and the answer cache's own."""
    found = {}
    for path in sorted(results.rglob("*")):
        name = str(path.relative_to(results))
        if path.is_file() and "/logs/" not in name and "answers.sqlite" not in name and "tfevents" not in name:
            found[name] = path.stat().st_size
    return found


class Soak:
    """The folder, what must come out, and what was seen."""

    def __init__(self, whole: Path, folder: Path, seed: int) -> None:
        self.whole, self.folder, self.rng = whole, folder, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.peaks: list[int] = [0]  # largest memory of each round in bytes
        self.usual = 60.0  # seconds that a round took, whole or not: when to kill is drawn from it
        self.log = folder.parent / "soak.log"

    def command(self, results: Path) -> subprocess.Popen:
        """Start the pipeline in a group of its own."""
        words = [sys.executable, "-m", "lever_plus.pipeline", "v3", "record"]
        with self.log.open("a") as out:
            return subprocess.Popen(
                words, cwd=REPO_ROOT, env=environment(results), stdout=out, stderr=out, start_new_session=True
            )

    def attempt(self, kill_after: float | None) -> int:
        """One start of the command; its exit code."""
        process, started, peak = self.command(self.folder), time.monotonic(), 0
        own = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(0.2)
            there = tree(own)
            peak = max(peak, memory(there))
            if kill_after is not None and time.monotonic() - started > kill_after and there:
                self.hit(there)
                kill_after = None
        self.peaks[-1] = max(self.peaks[-1], peak)
        for left in tree(own)[1:]:  # a process that outlives its command is waited for: it ends with its parent
            left.wait(60)
        self.counts[f"exit {process.returncode}"] += 1
        return process.returncode

    def hit(self, there: list[psutil.Process]) -> None:
        """Send a signal to the command, to all of its processes, or to one."""
        number, whom = self.rng.choice(SIGNALS), self.rng.choice(["command", "group", "one"])
        hit = {"command": there[:1], "group": there, "one": [self.rng.choice(there)]}[whom]
        self.counts[f"{number.name} to {whom}"] += 1
        for one in hit:
            try:
                one.send_signal(number)
            except psutil.Error:
                continue

    def until_done(self, ends: float) -> bool:
        """Start and kill until the command comes through; after the time is over it is left alone."""
        while True:
            left = ends - time.monotonic()
            started = time.monotonic()
            code = self.attempt(self.rng.uniform(0.2, self.usual) if left > 0 else None)
            self.usual = max(20.0, 0.5 * self.usual + 0.5 * (time.monotonic() - started))
            if code == 0:
                return True
            if code not in FINE:
                self.wrong.append(f"exit code {code}")
                return False

    def compare(self) -> None:
        """What came out against the undisturbed run."""
        want, have = products(self.whole), products(self.folder)
        self.wrong += [f"{name} differs" for name in sorted({*want, *have}) if want.get(name) != have.get(name)]
        before, now = files_of(self.whole), files_of(self.folder)
        extra = sorted(set(now) - set(before))
        self.wrong += [f"{name} is left over" for name in extra if "/previous_" not in name]
        self.wrong += [f"{name} is missing" for name in sorted(set(before) - set(now))]
        grown = [name for name in before if now.get(name, 0) > 2 * before[name] + 4096]
        self.wrong += [f"{name} grew from {before[name]} to {now[name]} bytes" for name in grown]
        if "Traceback" in self.log.read_text(errors="replace"):
            self.wrong.append(f"a traceback in {self.log}")

    def remove_some(self) -> None:
        """Take some products away, so that there is work."""
        parts = self.rng.sample(PARTS, self.rng.randint(1, 4))
        # Without the cache steps that share prompts may differ in a last digit (docs/engine.md): all go with it.
        for part in PARTS if CACHE in parts else parts:
            for path in [*self.folder.glob(f"mini_okvqa/{part}*")]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def run(self, minutes: float) -> None:
        """Everything."""
        if not self.whole.is_dir():
            assert self.command(self.whole).wait() == 0, f"the undisturbed run failed: {self.log}"
        ends = time.monotonic() + 60 * minutes
        while True:
            if not self.until_done(ends):
                return
            self.counts["rounds"] += 1
            self.compare()
            told = ", ".join(f"{name}: {count}" for name, count in sorted(self.counts.items()))
            print(f"{told}; peak {max(self.peaks) >> 20} MiB; {len(self.wrong)} faults", flush=True)
            if self.wrong or time.monotonic() > ends:
                return
            self.remove_some()
            self.peaks.append(0)

    def grew(self) -> bool:
        """Whether the largest memory of the second half of the rounds is above the first's."""
        half = len(self.peaks) // 2
        return half > 2 and max(self.peaks[half:]) > GROWTH * max(self.peaks[:half])


def main() -> int:
    """Command line; exit code 1 where something did not hold."""
    parser = Parser(prog="python -m tests.soak", description="The pipeline in one folder, killed again and again.")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long it is killed (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="when and what is killed (%(default)s)")
    parser.add_argument("--whole", type=Path, default=Path("results/soak/whole"), help="the undisturbed run's results")
    parser.add_argument("--folder", type=Path, default=Path("results/soak/killed"), help="the folder that is killed in")
    options = parser.parse_args()
    os.chdir(REPO_ROOT)
    options.folder.parent.mkdir(parents=True, exist_ok=True)
    soak = Soak(options.whole.absolute(), options.folder.absolute(), options.seed)
    soak.run(options.minutes)
    if soak.grew():
        soak.wrong.append(f"memory grew: {[peak >> 20 for peak in soak.peaks]} MiB")
    for line in soak.wrong:
        print(f"FAILS {line}")
    print(f"soak: {'holds' if not soak.wrong else f'{len(soak.wrong)} faults'}; log {soak.log}")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
