"""The frame around every command: options, ``--help``, the log file, exit codes."""

import ctypes
import dataclasses
import difflib
import errno
import io
import locale
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lever_plus import config, ranks, tells_interruptions
from lever_plus.paths import log_path
from lever_plus.settings import help, loading, names
from lever_plus.settings.names import dataset_paths
from lever_plus.settings.shared import SharedSettings
from open_mmicl.errors import DamagedInputError, LeverError, MissingInputError, UsageError, is_no_memory, plain

log = logging.getLogger("lever_plus")
FULL = (errno.ENOSPC, errno.EDQUOT)


def parse_options(cls: type, argv: Sequence[str]) -> tuple[dict[str, str], bool, bool]:
    """Read ``--name value`` / ``--name=value`` / ``NAME=value`` words.

    Returns: (values by environment name, help asked for, dry run asked for).

    Raises:
        UsageError: an unknown option (names the nearest), or one without a value.
    """
    names = {config.env_name(f.name) for f in dataclasses.fields(cls)} | dataset_paths()
    values, want_help, dry_run, words = {}, False, False, list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            want_help = True
            continue
        if word in ("-n", "--dry-run"):
            dry_run = True
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.upper().replace("-", "_")
        if name not in names or not (word.startswith("--") or equals):
            near = difflib.get_close_matches(name, names, n=1)
            raise UsageError(f"unknown option {word!r}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        if not equals:
            if not words:
                raise UsageError(f"option {word} needs a value")
            value = words.pop(0)
        values[name] = value
    return values, want_help, dry_run


def positional(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the words before the first option, the rest)."""
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    return list(argv[:first]), list(argv[first:])


def guard(body: Callable[[], Any], log_path: Callable[[], Path | None] = lambda: None) -> int:
    """Run ``body``; turn what it raises into one line on standard error and its exit code (README, Troubleshooting).

    The traceback goes to the log file where ``log_path`` names one (and to standard error with
    ``LEVER_DEBUG=1``). SIGTERM counts as an interruption; a second Ctrl-C ends the process at once. Exit code 1 is
    left for a defect of this program.
    """
    _speak_utf8()
    for number, usual in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) == usual:
            signal.signal(number, _interrupt)
            sys.unraisablehook = _interrupt_again
    if os.environ.get("LEVER_CHILD"):
        _end_with_parent(os.environ["LEVER_CHILD"])
    try:
        config.export_dotenv()
        result = body()
        if sys.stdout is not None:
            sys.stdout.flush()
    except LeverError as error:
        return _refuse(error, log_path())
    except KeyboardInterrupt:
        if tells_interruptions():
            print("\ninterrupted: what is done is kept; run the same command again to resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        return _refuse(of_the_system(error), log_path())
    except Exception as error:  # noqa: BLE001 - the outermost frame: reported, logged, exit 1
        if is_no_memory(error):
            return _refuse(UsageError(_no_memory(error)), log_path())
        _end_bars()
        where = _keep_traceback(log_path()) or _keep_traceback(_scratch_log())
        told = f" (traceback in {where})" if where else " (LEVER_DEBUG=1 shows the traceback)"
        print(plain(f"error: {type(error).__name__}: {error}") + told, file=sys.stderr)
        return 1
    return result if isinstance(result, int) else 0


def of_the_system(error: OSError) -> LeverError:
    """What the system says against a file or folder, as one of our errors: which, and what to do."""
    where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    said = f"{where}: {error.strerror}" if where else str(error.strerror or error)
    if error.errno in FULL:
        return UsageError(f"disk full ({said}); nothing is lost: make room and run the same command again")
    if error.errno == errno.ENOENT:
        return MissingInputError(f"{said}; was it moved or removed?")
    if error.errno in (errno.EIO, errno.ESTALE):
        return DamagedInputError(f"{said}; the disk or network drive does not answer as it should")
    if isinstance(error, (ConnectionError, TimeoutError)):
        return MissingInputError(f"network: {said}")
    return UsageError(f"{said}; check RESULT_DIR, the paths that are set, and who may write there")


def _refuse(error: LeverError, log_path: Path | None) -> int:
    _end_bars()
    _keep_traceback(log_path)
    if _first_to_say():
        print(f"error: {error}", file=sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # the very error that has been told: not again at the interpreter's end
        _drop_output()
    return error.exit_code


def _end_bars() -> None:
    """End the line of each progress bar that an error has cut off: the error has a line of its own."""
    if "tqdm" in sys.modules:
        for bar in list(getattr(sys.modules["tqdm"].tqdm, "_instances", ())):
            bar.close()


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _no_memory(error: Exception) -> str:
    said = f" ({plain(' '.join(str(error).split()), 200)})" if str(error) else ""
    return f"not enough memory{said}: lower BATCH_SIZE, TOKEN_BUDGET, HIDDEN_DIM or NPROC, or raise the limit"


def _scratch_log() -> Path | None:
    """A file for the traceback of a defect that shows before there is a log."""
    try:
        return Path(tempfile.gettempdir()) / f"lever-plus-defect-{os.getpid()}.log"
    except OSError:
        return None


def _speak_utf8() -> None:
    """UTF-8 for files, names and pipes whatever the locale; a screen that cannot show a character gets an escape.

    How Python reads names of files and the environment is settled when it starts: in another locale it starts again.
    """
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8") and "LEVER_UTF8" not in os.environ:
        environment = {**os.environ, "PYTHONUTF8": "1", "LEVER_UTF8": "1"}
        os.execve(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]], environment)
    os.environ["PYTHONUTF8"] = "1"
    charset = locale.getencoding()
    known = charset.lower() in ("utf-8", "utf8", "ascii", "ansi_x3.4-1968", "646")  # in the C locale most show UTF-8
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if known or not stream.isatty() else charset
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def stage_main(
    settings_class: type,
    run: Callable[[Any, bool], Any],
    doc: str,
    argv: Sequence[str] | None = None,
    load: Callable[[dict[str, str]], Any] | None = None,
    reads: Sequence[type] = (),
    name: str = "",
) -> int:
    """Entry of ``python -m lever_plus.stages.X``: resolve the settings, then ``run(settings, dry_run)``.

    ``load`` turns command-line values into settings (default: :func:`lever_plus.settings.loading.load`, which
    adds the data set's YAML defaults). ``reads``: the settings of further steps that the command runs. ``name``: the
    log file's, by default that of the module that ``run`` is written in. Returns the exit code.
    """
    argv = sys.argv[1:] if argv is None else argv
    log_file: list[Path] = []

    def body() -> Any:
        values, want_help, dry_run = parse_options(settings_class, argv)
        if want_help:
            print(
                f"{doc.strip()}\n\nSettings (environment variable, or option --name value):\n"
                + help.table([settings_class])
            )
            return 0

        names.tell([settings_class, *reads])
        settings = load(values) if load else loading.load(settings_class, values)
        stage = name or Path(run.__code__.co_filename).stem.removesuffix("_online")
        log_file.append(setup_logging(settings, stage))
        return run(settings, dry_run)

    return guard(body, lambda: log_file[0] if log_file else None)


def command_main(
    settings_class: type, run: Callable[[list[str], Any, bool], Any], doc: str, argv: Sequence[str]
) -> int:
    """As :func:`stage_main`, for a command with words before its options: ``run(words, settings, dry_run)``."""
    words, rest = positional(argv)
    name = Path(run.__code__.co_filename).stem
    return stage_main(settings_class, lambda settings, dry_run: run(words, settings, dry_run), doc, rest, name=name)


def setup_logging(settings: SharedSettings, stage: str) -> Path:
    """Log to ``<result dir>/<data set>/logs/<stage>.log`` and, briefly, to standard output; returns the file."""
    path = log_path(settings, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = _LogFile(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_screen = _Screen()
    to_screen.setFormatter(_OnScreen("%(message)s"))
    to_screen.setLevel(logging.INFO if ranks.rank() == 0 else logging.ERROR)
    for handler in list(log.handlers):
        log.removeHandler(handler)
    log.addHandler(to_file)
    log.addHandler(to_screen)
    log.setLevel(logging.INFO)
    log.propagate = False
    return path


def on_screen(text: str) -> str:
    """Lines without what a terminal would obey: names from files and settings reach them."""
    return "\n".join(plain(line, sys.maxsize) for line in text.split("\n"))


class _OnScreen(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return on_screen(super().format(record))


class _Raising(logging.Handler):
    """A line that cannot be written (a full disk, a closed pipe) is an error like any other, not a traceback."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        raise  # noqa: PLE0704 - called while the error is handled


class _LogFile(_Raising, logging.FileHandler):
    pass


class _Screen(_Raising, logging.StreamHandler):
    """Writes to what standard output is at the moment, which a notebook or a test may replace."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """Standard output."""
        return sys.stdout


def _first_to_say() -> bool:
    """Whether no other process of the same launch has reported an error yet (one line, not one a rank)."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if not run_id or run_id == "none":
        return True
    try:
        os.close(os.open(error_marker(run_id), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # no folder for it: rather twice than not at all
        return True
    return True


def error_marker(run_id: str) -> Path:
    """The file whose being there says that a process of this launch has reported an error; the launcher removes it."""
    return Path(tempfile.gettempdir()) / f"lever-plus-{run_id}.error"


def call(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a program of ours (``python -m module …``, ``bash script …``) and return its exit code. It ends when this
    process ends, however that ends; an interruption is passed on, and it decides how to end.

    Raises:
        KeyboardInterrupt: this process or the program was interrupted; the program has ended.
    """
    child = subprocess.Popen(command, env={**env, "LEVER_CHILD": str(os.getpid())})
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise
    if code < 0:
        code = killed(command[2] if command[1] == "-m" else command[1], -code)
    if code == 130:
        raise KeyboardInterrupt
    return code


def killed(what: str, signum: int) -> int:
    """Say what a process of ours that a signal killed could not say itself; returns the shell's exit code for it."""
    if signum == signal.SIGINT:  # before it could take the interruption itself
        return 130
    memory = ", as the system does where memory runs out" if signum == signal.SIGKILL else ""
    print(f"error: a process of {what} was killed by signal {signum}{memory}; what is done is kept", file=sys.stderr)
    return 128 + signum


def _end_with_parent(parent: str) -> None:
    """Ask Linux to kill this process when the one that started it (number ``parent``) ends, however that ends (kill -9
    too).

    SIGKILL, since a process that waits for other ranks inside a collective would not see a SIGTERM; every file
    is written so that it can be cut off at any moment.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if parent != str(os.getppid()):  # it ended while this one was starting
            os.kill(os.getpid(), signal.SIGKILL)
        os.environ["LEVER_CHILD"] = str(os.getpid())  # for the processes that this one starts


def _interrupt(signum: int, frame: Any) -> None:
    """The first interruption lets the process end in order; that its parent passes it on must not disturb that."""
    if signal.getsignal(signal.SIGTERM) == _interrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if signal.getsignal(signal.SIGINT) == _interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _interrupt_again(lost: Any) -> None:
    """An interruption that came while an object was being removed, where Python drops what is raised: once more."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


def _keep_traceback(path: Path | None) -> Path | None:
    if os.environ.get("LEVER_DEBUG") == "1":
        traceback.print_exc()
    if path is None:
        return None
    try:
        with path.open("a", encoding="utf-8") as handle:
            traceback.print_exc(file=handle)
    except OSError:  # a full disk, perhaps the very error that is to be told
        return None
    return path
