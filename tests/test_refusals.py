"""What a user can get wrong: names that would leave their folder, numbers without limits, paths that cannot be."""

import contextlib
import dataclasses
import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lever_plus import cli, config, paths, programs, provenance, ranks
from lever_plus.experiments.arms import seeds_of
from lever_plus.settings.registry import STAGE_SETTINGS
from lever_plus.stages import launch
from open_mmicl.errors import DamagedInputError, LeverError, UsageError, foreign, plain

ROOT = Path(__file__).resolve().parent.parent
FIELDS = {f"{s}.{f.name}": f for s, cls in STAGE_SETTINGS.items() for f in dataclasses.fields(cls)}
NUMBERS = {name: field for name, field in FIELDS.items() if field.type in ("int", "float", int, float)}
TEXTS = {name: field for name, field in FIELDS.items() if field.type in ("str", str)}
NAMES = {name: field for name, field in TEXTS.items() if field.metadata["is_name"]}
ANY_TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["../../x", "/tmp/x", "a/b", "a\\b", "..", ".", "a\nb", "\x1b[31mx", "x" * 300]),
)


def settings_of(**values: str) -> object:
    cls = STAGE_SETTINGS["experiment"]
    return dataclasses.replace(cls(), dataset="mini_okvqa", result_dir="/results", **values)


@settings(max_examples=40)
@given(ANY_TEXT)
def test_a_name_never_leaves_its_folder(text: str) -> None:
    """Through the settings and past them: whatever path is built lies in the folder that it is built in."""
    for build in (
        lambda: paths.v3_dir(settings_of(exp_name=text)),
        lambda: paths.inference_dir(settings_of(), text),
        lambda: paths.experiment_dir(settings_of(), text),
    ):
        try:
            built = build()
        except UsageError:
            continue
        inside = Path(os.path.normpath(built))
        assert inside == built and inside.is_relative_to("/results/mini_okvqa") and len(inside.parts) == 5
        assert str(built).isprintable() and len(built.name.encode()) < 200
    with pytest.raises(LeverError):
        paths.dataset_name(dataclasses.replace(settings_of(), dataset="no" + text))
    with pytest.raises(LeverError):
        paths.lvlm_name(dataclasses.replace(settings_of(), beam_model="no" + text))


@given(st.sampled_from(sorted(NAMES)), ANY_TEXT)
def test_the_settings_refuse_what_the_paths_would(name: str, text: str) -> None:
    try:
        value = config.parse_value(NAMES[name], text)
    except UsageError:
        return
    assert value == "" or config.is_name(value)


@given(st.sets(st.integers(1, 12)), st.sampled_from(["", "previous_x", "previous_3_old", "previous_٣"]))
def test_a_folder_put_aside_takes_a_free_number(tmp_path_factory, taken: set[int], other: str) -> None:
    folder = tmp_path_factory.mktemp("v3")
    for number in taken:
        (folder / f"previous_{number}").mkdir()
    (folder / other).mkdir(exist_ok=True)
    assert launch._next_free(folder) == folder / f"previous_{max(taken, default=0) + 1}"


@given(st.sampled_from(sorted(NUMBERS)), st.one_of(st.integers(), st.integers(-(10**60), 10**60), st.floats()))
@example("train_v3.seed", 2**64)
@example("train_v3.batch_size", 10**29)
@example("train_v3.hidden_dim", 10**8)
def test_every_number_has_limits(name: str, number: float) -> None:
    field = NUMBERS[name]
    low, high = field.metadata["lo"], field.metadata["hi"]
    assert high is None or low is not None
    try:
        value = config.parse_value(field, str(number))
    except UsageError as error:
        assert len(str(error)) < 400
        return
    assert abs(value) <= max(config.LARGEST, config.LARGEST_SEED)
    assert (low is None or value >= low) and (high is None or value <= high)
    assert value == number


@given(st.sampled_from(sorted(NUMBERS)), st.text(max_size=8))
@example("train_v3.batch_size", "1_000")
@example("train_v3.batch_size", "٣")
@example("train_v3.rce_lr", "1_0.5")
def test_a_number_is_written_in_ascii_digits(name: str, text: str) -> None:
    try:
        config.parse_value(NUMBERS[name], text)
    except UsageError:
        return
    assert set(text.strip()) <= set("0123456789+-.eE")


@given(st.text(max_size=20))
@example("1_0")
@example("٣ 4")
@example("18446744073709551616")
def test_seeds_have_limits_too(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert all(0 <= seed <= config.LARGEST_SEED for seed in seeds_of(text))
        assert text.isascii()


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]), st.text(max_size=8)))
@example({"RANK": "2", "WORLD_SIZE": "2"})
@example({"WORLD_SIZE": "٣"})
@example({"LOCAL_WORLD_SIZE": "0"})
def test_what_job_operators_set_is_checked(env: dict[str, str]) -> None:
    assume(not any("\0" in value or not value.isprintable() for value in env.values()))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        for name, value in env.items():
            patch.setenv(name, value)
        with contextlib.suppress(UsageError):
            assert 0 <= ranks.rank() < ranks.world_size()
            assert ranks.local_rank() >= 0 and ranks.local_world_size() >= 1


@given(st.sampled_from(sorted(TEXTS)), st.text(st.characters(), max_size=30))
@example("train_v3.result_dir", "~nosuchuser/x")
@example("train_v3.result_dir", "a\0b")
@example("train_v3.result_dir", "x" * 5000)
@example("train_v3.result_dir", "\udcff")
def test_a_text_can_be_handed_to_the_system(name: str, text: str) -> None:
    try:
        value = config.parse_value(TEXTS[name], text)
    except UsageError as error:
        assert str(error).isprintable() and len(str(error)) < 500
        return
    os.fsencode(value)
    assert "\0" not in value and "\n" not in value and len(value.encode()) <= 4096
    if name.endswith(("_path", "_dir", "_ckpt", "_cache")):
        assert not value.startswith("~")


@given(st.one_of(st.text(), st.text(max_size=2000).map(lambda text: text * 60)))
@example("\x1b]0;title\x07\r\n\u202e" + "x" * 100_000)
def test_an_error_is_one_printable_line(text: str) -> None:
    said = str(DamagedInputError(text))
    assert said.isprintable() and len(said) < 12_000 and (plain(said) == said or len(said) > 1000)
    assert not text.isprintable() or len(text) > 1000 or said == text


SYSTEM = {
    errno.ENOSPC: (2, "disk full"), errno.EDQUOT: (2, "disk full"), errno.ENOENT: (3, ""), errno.EIO: (4, ""),
    errno.EROFS: (2, ""), errno.EACCES: (2, ""), errno.ENAMETOOLONG: (2, ""), errno.ENOTDIR: (2, ""),
}  # fmt: skip


@given(st.sampled_from([*SYSTEM, *errno.errorcode]), st.booleans(), st.text(min_size=1, max_size=9))
def test_what_the_system_refuses_is_one_line_and_never_exit_1(tmp_path_factory, number: int, logged: bool, name: str):
    log_file = tmp_path_factory.mktemp("log") / "stage.log"
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr(cli, "print", lambda text, file: said.append(text), raising=False)

        def body() -> None:
            raise OSError(number, os.strerror(number), name)

        code = cli.guard(body, lambda: log_file if logged else None)
    if number in (errno.EPIPE, errno.ESHUTDOWN):
        return  # the reader of the output has gone: nobody is there to be told
    expected, words = SYSTEM.get(number, (code, ""))
    assert code == expected and code in (2, 3, 4)
    assert len(said) == 1 and said[0].isprintable() and said[0].startswith("error: ") and words in said[0]
    assert log_file.exists() == logged


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:115] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread"), RuntimeError(ALLOCATOR)])
def test_too_little_memory_is_one_line(error: Exception, capsys) -> None:
    def body() -> None:
        raise error

    assert cli.guard(body) == 2
    said = capsys.readouterr().err
    assert "not enough memory" in said and "BATCH_SIZE" in said and len(said.splitlines()) == 1


@given(st.sampled_from([ValueError, KeyError, MemoryError, RecursionError, ZeroDivisionError, OSError, SystemError]))
def test_whatever_a_library_raises_names_the_file(kind: type[Exception]) -> None:
    with pytest.raises(DamagedInputError, match="the thing /x/y"), foreign("the thing", "/x/y"):
        raise kind("a\nb")
    with pytest.raises(KeyboardInterrupt), foreign("the thing", "/x/y"):
        raise KeyboardInterrupt


def test_programs_that_are_not_there_are_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert programs.ask([sys.executable, "-c", "print('é')"]) is not None
    (tmp_path / "git").write_text("no program")
    (tmp_path / "git").chmod(0o755)
    for path in ("", str(tmp_path)):
        monkeypatch.setenv("PATH", path)
        provenance._provenance.cache_clear()
        assert provenance.provenance()["git"] is None
    provenance._provenance.cache_clear()


def test_the_commit_is_not_that_of_a_repository_around_this_one(monkeypatch, tmp_path: Path) -> None:
    answers = {"--show-toplevel": str(tmp_path), "HEAD": "c0ffee", "--porcelain": ""}
    monkeypatch.setattr(provenance, "ask", lambda words, folder: answers[words[-1]])
    provenance._provenance.cache_clear()
    assert provenance.provenance()["git"] is None
    provenance._provenance.cache_clear()


RUN = [sys.executable, "-m", "lever_plus.stages.prepare_dataset", "--dry-run"]


def process(env: dict[str, str], command: list[str] = RUN) -> subprocess.CompletedProcess:
    given = {**os.environ, "DATASET": "mini_okvqa", "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, check=False)


@pytest.mark.parametrize(
    "locale",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
)
def test_any_locale_reads_and_writes_utf8(locale: dict[str, str], tmp_path: Path) -> None:
    results = tmp_path / "Ergebnisse 结果"
    done = process({"RESULT_DIR": str(results), **locale})
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert (results / "mini_okvqa" / "logs").is_dir() and b"Ergebnisse" in done.stdout
    done = process({"RESULT_DIR": str(results), "SAMPLER": "结果", **locale}, [*RUN[:2], "lever_plus.pipeline", "v3"])
    assert done.returncode == 2 and b"SAMPLER=" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("place", "says"),
    [("~nosuchuser/x", "no home folder"), ("{file}", "{file}"), ("{file}/x", "{file}"), ("/sys/x", "/sys/x"),
     ("x" * 300, "xxx"), ("x/" * 2000, "at most 200 folders"),
     ("x" * 5000, "at most 4096 bytes"), ("a\nb", "line breaks"), (b"/tmp/\xff\xfe", "UTF-8")],
)  # fmt: skip
def test_a_result_dir_that_cannot_be(place, says: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    text = place if isinstance(place, bytes) else place.format(file=file)
    done = process({"RESULT_DIR": text})
    said = done.stderr.decode()
    assert done.returncode == 2 and len(said.strip().splitlines()) == 1 and says.format(file=file) in said, said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_screen_and_under_the_log(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        env = {**os.environ, "DATASET": "mini_okvqa", "RESULT_DIR": str(tmp_path)}
        done = subprocess.run(RUN, cwd=ROOT, env=env, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and "disk full" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    logs = tmp_path / "mini_okvqa" / "logs"
    for path in logs.iterdir():
        path.unlink()
        path.symlink_to("/dev/full")
    done = process({"RESULT_DIR": str(tmp_path)})
    assert done.returncode == 2 and b"disk full" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_escapes_in_names_do_not_reach_the_screen(capsys, tmp_path: Path) -> None:
    shared = SimpleNamespace(result_dir=str(tmp_path), dataset="mini_okvqa", **{
        name: "" for name in ("okvqa_path", "vqav2_path", "coco_path", "mini_okvqa_path")})  # fmt: skip
    cli.setup_logging(shared, "stage")
    try:
        cli.log.info("read \x1b[2J\nnext")
    finally:
        for handler in list(cli.log.handlers):
            cli.log.removeHandler(handler)
            handler.close()
        cli.log.setLevel(logging.NOTSET)
        cli.log.propagate = True
    assert capsys.readouterr().out == "read \\x1b[2J\nnext\n"
