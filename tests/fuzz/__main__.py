"""A fuzz of every reader, thousands of cases a minute in one process.

    python -m tests.fuzz [--minutes M | --cases N] [--seed S] [--only TARGET] [--out FOLDER]

A case damages one file of a target, or draws an environment or a command line, and reads. It holds where the target
takes the input or refuses it with one printable line and exit code 2, 3, 4 or 5, within its limit of CPU time, and has
written nothing but what it may and started no program. Everything else is a finding, printed once a kind with the case
that shows it, which FOLDER keeps. Exit code 1 where there are findings.
"""

import contextlib
import faulthandler
import io
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from open_mmicl.arguments import Parser  # noqa: E402
from open_mmicl.errors import LeverError  # noqa: E402
from tests.fuzz import damage  # noqa: E402
from tests.fuzz.targets import Target, targets  # noqa: E402

CPU_SECONDS = 20  # of one case
MORE_MEMORY = 6 << 30  # bytes beyond what the process has at the start
LONGEST = 1200  # characters of a line
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pty.spawn")
ROOT = Path(__file__).resolve().parents[2]


class Hang(BaseException):
    """The case took too long."""


class Watch:
    """What the process starts and writes while a case runs."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        self.inside = ""
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        """The audit hook."""
        if not self.on:
            return
        if event in STARTS:
            self.seen.append(f"{event} {str(arguments)[:80]}")
        elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[1], str):
            path = os.path.abspath(arguments[0])  # noqa: PTH100 - links are not to be followed
            if set(arguments[1]) & set("wax+") and not Path(path).is_relative_to(self.inside):
                self.seen.append(f"writes {arguments[0][:80]}")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """CPU time of a case."""

    def too_long(number: int, frame: Any) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


class Fuzz:
    """The targets in folders of their own, and what was found."""

    def __init__(self, chosen: list[Target], folder: Path, out: Path | None) -> None:
        self.chosen, self.folder, self.out, self.watch = chosen, folder, out, Watch()
        self.counts: Counter[str] = Counter()
        self.kinds: dict[str, str] = {}
        self.good: dict[str, dict[Path, bytes]] = {}
        for target in chosen:
            place = folder / target.name.replace(" ", "_")
            place.mkdir()
            with contextlib.chdir(place):
                files = target.files(place)
                self.good[target.name] = {path: path.read_bytes() for path in files}

    def case(self, number: int, seed: int) -> None:
        """One input; what is wrong with it is kept."""
        rng = random.Random(f"{seed} {number}")
        target = self.chosen[number % len(self.chosen)]
        if rng.random() > target.share:
            return
        place, good = self.folder / target.name.replace(" ", "_"), self.good[target.name]
        hit = rng.choice(list(good))
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
        how = rng.choice(target.damages) if target.damages and rng.random() < 0.7 else damage.of_bytes
        try:
            bad = how(rng, good[hit])
        except (ValueError, RecursionError, OverflowError, TypeError, RuntimeError, NotImplementedError):
            return  # this damage cannot be written
        hit.write_bytes(bad)
        before[hit] = hit.stat().st_mtime_ns
        problem, told = self.read(target, place, rng)
        after = {path: path.stat().st_mtime_ns for path in place.rglob("*") if path.is_file()}
        changed = [p for p in {*before, *after} if before.get(p) != after.get(p)]
        mine = {path for pattern in target.writes for path in place.glob(pattern)}
        odd = [path for path in changed if path not in mine and not any(path.match(w) for w in target.writes)]
        if odd and not problem:
            problem = f"{target.name}: wrote {odd[0].name}"
        for path in [*odd, *mine]:
            if path not in good and path.is_file():
                path.unlink()
        for path, content in good.items():
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        self.counts["cases"] += 1
        if problem:
            self.found(problem, f"{seed} {number}: {hit.name} by {how.__name__}\n{told}", hit, bad)

    def read(self, target: Target, place: Path, rng: random.Random) -> tuple[str, str]:
        """Run a target; (what is wrong or "", more about it)."""
        out, err = io.StringIO(), io.StringIO()
        self.watch.inside, self.watch.seen = str(self.folder), []
        code, problem, told = 0, "", ""
        environment = dict(os.environ)
        try:
            with contextlib.chdir(place), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited():
                self.watch.on = True
                result = target.read(place, rng)
                code = result if isinstance(result, int) and not isinstance(result, bool) else 0
        except LeverError as error:
            self.counts[f"exit {error.exit_code}"] += 1
            said = str(error)
            if not said.isprintable() or not said or len(said) > LONGEST or error.exit_code not in (2, 3, 4, 5):
                problem = f"{target.name}: says {ascii(said[:60])} in {len(said)} characters, exit {error.exit_code}"
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except Hang:
            problem, told = f"{target.name}: hangs in {where()}", traceback.format_exc(limit=-6)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            problem, told = f"{target.name}: {type(error).__name__} in {where()}", traceback.format_exc(limit=-6)
        finally:
            self.watch.on = False
            os.environ.clear()
            os.environ.update(environment)
        lines = [line for line in err.getvalue().split("\n") if line]
        if code not in (0, 2, 3, 4, 5) and not problem:
            problem, told = f"{target.name}: exit code {code}", err.getvalue()[-2000:]
        if code:
            self.counts[f"exit {code}"] += 1
            errors = [line for line in lines if not line.startswith(("note: ", "warning: "))]
            if len(errors) != 1 or len(errors[0]) > LONGEST or not errors[0].startswith("error: "):
                problem = problem or f"{target.name}: {len(errors)} lines for exit code {code}"
                told = told or err.getvalue()[:2000]
        shown = out.getvalue() + err.getvalue()
        if not problem and not all(c.isprintable() or c in "\n\r" for c in shown):
            problem, told = f"{target.name}: prints control characters", ascii(shown[:600])
        if self.watch.seen and not problem:
            problem = f"{target.name}: {self.watch.seen[0]}"
        return problem, told

    def found(self, problem: str, about: str, path: Path, bad: bytes) -> None:
        """Keep a finding once a kind."""
        self.counts["findings"] += 1
        if problem in self.kinds:
            return
        self.kinds[problem] = about
        print(f"FAILS {problem}\n  case {about}", flush=True)
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / f"{len(self.kinds):03d}-{path.name}").write_bytes(bad)


def where() -> str:
    """The last of our own lines in the traceback that is being handled."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    ours = [frame for frame in frames if "/lever_plus/" in frame.filename or "/open_mmicl/" in frame.filename]
    last = (ours or frames)[-1]
    return f"{Path(last.filename).name}:{last.name}:{last.lineno}"


def main() -> int:
    """Command line; exit code 1 where something was found."""
    parser = Parser(prog="python -m tests.fuzz", description="A fuzz of every reader.")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (%(default)s)")
    parser.add_argument("--cases", type=int, default=0, help="this many cases, instead of a time")
    parser.add_argument("--seed", type=int, default=0, help="what is drawn (%(default)s)")
    parser.add_argument("--start", type=int, default=0, help="number of the first case (%(default)s)")
    parser.add_argument("--only", default="", help="one target")
    parser.add_argument("--out", type=Path, help="folder that keeps the inputs of what is found")
    options = parser.parse_args()
    faulthandler.enable()
    chosen = [target for target in targets() if options.only in ("", target.name)]
    if not chosen:
        parser.error(f"--only: there are {', '.join(target.name for target in targets())}")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, resource.RLIM_INFINITY))
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        fuzz = Fuzz(chosen, folder, options.out)
        ends, number = time.monotonic() + 60 * options.minutes, options.start
        while number < options.start + options.cases if options.cases else time.monotonic() < ends:
            fuzz.case(number, options.seed)
            number += 1
    finally:
        os.chdir(ROOT)
        shutil.rmtree(folder, ignore_errors=True)
    told = ", ".join(f"{name}: {count}" for name, count in sorted(fuzz.counts.items()))
    print(f"fuzz: seed {options.seed}, {len(chosen)} targets, {told}, kinds of findings: {len(fuzz.kinds)}")
    return 1 if fuzz.kinds else 0


if __name__ == "__main__":
    raise SystemExit(main())
