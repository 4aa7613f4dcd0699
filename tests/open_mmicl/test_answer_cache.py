"""The answer cache: whole after a kill, safe for several processes, never confuses two questions."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_mmicl import answer_cache
from open_mmicl.answer_cache import AnswerCache, Rate, entry_key, main, model_key
from open_mmicl.errors import DamagedInputError, LeverError, UsageError

ROOT = Path(__file__).resolve().parents[2]
WRITER = """
import sys
from pathlib import Path
from open_mmicl.answer_cache import AnswerCache
cache = AnswerCache(Path(sys.argv[1]))
model = cache.register("m", "model", {})
start, count = int(sys.argv[2]), int(sys.argv[3])
for batch in range(start, start + count):
    cache.put(model, [("score", f"{batch}/{i}".encode(), [batch, i]) for i in range(20)])
    print(batch, flush=True)
"""


def start_writer(path: Path, start: int, count: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(path), str(start), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def entries(path: Path) -> set[bytes]:
    with sqlite3.connect(path) as db:
        return {row[0] for row in db.execute("SELECT key FROM answers")}


def test_what_is_written_is_read_and_never_overwritten(tmp_path) -> None:
    cache = AnswerCache(tmp_path / "sub" / "a.sqlite")
    model = cache.register("m1", "model", {"dtype": "fp32"})
    cache.put(model, [("score", b"a", [-1.25, 2]), ("generate", b"b", ["zwölf 'Äpfel'"])])
    cache.put(model, [("score", b"a", [7.0, 2])])
    many = [f"none{i}".encode() for i in range(1200)]
    assert cache.get([b"a", *many, b"b"]) == {b"a": [-1.25, 2], b"b": ["zwölf 'Äpfel'"]}
    assert cache.register("m1", "model", {}) == model != cache.register("m2", "model", {})
    assert cache.stats() == [("model", "m1", "generate", 1), ("model", "m1", "score", 1)] and cache.verify() == 2


@pytest.mark.parametrize("seconds", [0.15, 0.3, 0.5])
def test_kill_9_leaves_whole_batches_only(tmp_path, seconds) -> None:
    path = tmp_path / "a.sqlite"
    writer = start_writer(path, 0, 100_000)
    assert writer.stdout.readline() == "0\n"
    time.sleep(seconds)
    writer.send_signal(signal.SIGKILL)
    done = [0, *map(int, writer.stdout.read().split())]
    writer.wait()
    cache = AnswerCache(path)
    found = cache.verify()
    assert found % 20 == 0 and len(done) <= found // 20 <= len(done) + 1


def test_two_processes_write_at_once(tmp_path) -> None:
    path = tmp_path / "a.sqlite"
    writers = [start_writer(path, 0, 150), start_writer(path, 100, 150)]
    assert [writer.communicate()[0] is not None and writer.returncode for writer in writers] == [0, 0]
    assert AnswerCache(path).verify() == 250 * 20 == len(entries(path))


OPEN_TOGETHER = """
import sys
from pathlib import Path
from open_mmicl.answer_cache import AnswerCache
for path in sys.argv[1:]:
    sys.stdin.readline()
    AnswerCache(Path(path)).close()
    print("open", flush=True)
"""


def test_two_processes_open_a_new_file_at_the_same_moment(tmp_path) -> None:
    """SQLite refuses the switch to WAL immediately then; without the waiting a third of these files fail."""
    paths = [str(tmp_path / f"{i}.sqlite") for i in range(40)]
    command = [sys.executable, "-c", OPEN_TOGETHER, *paths]
    openers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for _ in paths:
        for opener in openers:
            print("go", file=opener.stdin, flush=True)
        for opener in openers:
            assert opener.stdout.readline() == "open\n", opener.communicate()[1]
    assert [opener.wait() for opener in openers] == [0, 0]


def test_a_claim_holds_while_its_owner_lives(tmp_path, monkeypatch) -> None:
    cache = AnswerCache(tmp_path / "a.sqlite")
    model = cache.register("m", "model", {})
    assert cache.claim(b"x") and cache.claim(b"x")  # one's own claim may be taken up again
    other = answer_cache._me().replace(f" {os.getpid()} ", " 1 ")
    monkeypatch.setattr(answer_cache, "_me", lambda: other)
    assert not cache.claim(b"x")
    cache.release(b"x")  # not ours
    assert not cache.claim(b"x")
    monkeypatch.setattr(answer_cache, "CLAIM_SECONDS", 0)
    assert cache.claim(b"x")  # lapsed
    monkeypatch.undo()
    cache.put(model, [("score", b"k", [1])], claim=b"x")
    assert cache.db.execute("SELECT COUNT(*) FROM claims").fetchone() == (0,)


def test_a_claim_of_a_dead_process_lapses_at_once(tmp_path) -> None:
    path = tmp_path / "a.sqlite"
    code = (
        "import sys; from pathlib import Path; from open_mmicl.answer_cache import AnswerCache; "
        "AnswerCache(Path(sys.argv[1])).claim(b'x')"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True)
    assert AnswerCache(path).claim(b"x")


@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_different_words_have_different_keys(a, b) -> None:
    assert (entry_key(b"m", "score", a) == entry_key(b"m", "score", b)) == (a == b)
    assert entry_key(b"m", "score", a) != entry_key(b"n", "score", a) != entry_key(b"n", "generate", a)


def test_settings_of_another_kind_have_different_keys() -> None:
    assert len({entry_key(b"m", "g", words) for words in [(5, 3, 0.0), (5, 3, 1.0), (3, 5, 0.0), (True,), (1,)]}) == 5
    assert model_key({"dtype": "fp32"}) != model_key({"dtype": "bf16"})


def test_rates_add_up(tmp_path) -> None:
    cache = AnswerCache(tmp_path / "a.sqlite")
    model = cache.register("m", "model", {"mode": "fast"})
    for _ in range(2):
        cache.add_rate(model, "score", "cpu", Rate(10, 700, 3, 1.5))
    assert cache.rates() == [("model", {"mode": "fast"}, "score", "cpu", Rate(20, 1400, 6, 3.0))]


def test_gc_keeps_the_models_named(tmp_path, capsys) -> None:
    path = tmp_path / "a.sqlite"
    cache = AnswerCache(path)
    for key in ("abc1", "abd2", "xyz3"):
        cache.put(cache.register(key, "model " + key, {}), [("score", key.encode(), [1.0, 1])])
    assert main(["gc", str(path), "--keep", "ab"]) == 0 and entries(path) == {b"abc1", b"abd2"}
    assert main(["gc", str(path), "--older-than", "1"]) == 0 and len(entries(path)) == 2
    assert main(["gc", str(path), "--keep", "nobody"]) == 2 and "nobody" in capsys.readouterr().err
    assert main(["gc", str(path)]) == 2 and len(entries(path)) == 2
    for days in ("nan", "inf", "-1"):  # minus a day would be everything
        with pytest.raises(SystemExit) as refused:
            sys.exit(main(["gc", str(path), "--older-than", days]))
        assert refused.value.code == 2 and len(entries(path)) == 2


def test_command_line_on_whole_missing_and_damaged_files(tmp_path, capsys) -> None:
    path = tmp_path / "a.sqlite"
    assert main(["verify", str(path)]) == 3 and not path.exists()
    cache = AnswerCache(path)
    cache.put(cache.register("m", "model", {}), [("score", f"{i}".encode() * 20, [float(i), 1]) for i in range(3000)])
    cache.close()
    assert main(["verify", str(path)]) == 0 and main(["stats", str(path)]) == 0
    assert "3000 entries" in capsys.readouterr().out
    data = bytearray(path.read_bytes())
    at = data.index(b"[1234.0, 1]")
    data[at + 1 : at + 3] = b"99"
    (tmp_path / "bit.sqlite").write_bytes(data)
    (tmp_path / "half.sqlite").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.sqlite").write_text("these are not the bytes of a database\n" * 40)
    (tmp_path / "empty_but_foreign.sqlite").write_bytes(b"")
    for name in ("bit", "half", "text"):
        assert main(["verify", str(tmp_path / f"{name}.sqlite")]) == 4, name
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(DamagedInputError, match="checksum"):
        AnswerCache(tmp_path / "bit.sqlite").get([b"1234" * 20])


def test_a_foreign_or_newer_file_is_refused(tmp_path) -> None:
    foreign, newer = tmp_path / "foreign.sqlite", tmp_path / "newer.sqlite"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE other (x)")
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 99")
    for path in (foreign, newer):
        with pytest.raises(DamagedInputError, match="schema"):
            AnswerCache(path)
    foreign.write_bytes(b"S")  # SQLite itself would take it for an empty file and write over it
    with pytest.raises(DamagedInputError, match="no SQLite file"):
        AnswerCache(foreign)


@given(st.binary(max_size=3000))
def test_no_bytes_crash_it(data) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.sqlite"
        path.write_bytes(b"SQLite format 3\x00" + data)
        try:
            AnswerCache(path).verify()
        except LeverError as error:
            assert str(path) in str(error)
        else:
            pytest.fail("random bytes were taken for an answer cache")


VALUES = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=6), st.binary(max_size=6)
)
COLUMNS = (
    [("models", name) for name in ("key", "name", "description")]
    + [("answers", name) for name in ("key", "kind", "value", "written", "checksum", "model")]
    + [("rates", name) for name in ("kind", "device", "prompts", "tokens", "images", "seconds")]
    + [("claims", name) for name in ("owner", "beat")]
)


@given(place=st.sampled_from(COLUMNS), value=VALUES)
def test_any_value_in_any_column_is_one_line(tmp_path_factory, place, value) -> None:
    path = tmp_path_factory.mktemp("cache") / "a.sqlite"
    cache = AnswerCache(path)
    model = cache.register("m1", "model", {"a": 1})
    cache.put(model, [("score", b"a", [1.0]), ("score", b"b", [2.0])])
    cache.add_rate(model, "score", "cpu", Rate(1, 2, 3, 4.0))
    cache.claim(b"c")
    cache.close()
    table, column = place
    with sqlite3.connect(path) as db:
        try:
            db.execute(f"UPDATE {table} SET {column} = ?", (value,))  # noqa: S608 - names from the list above
        except sqlite3.IntegrityError:
            return
    for arguments in (["stats"], ["verify"], ["gc", "--older-than", "1e15"], ["gc", "--keep", "m"]):
        command, *rest = arguments
        assert main([command, str(path), *rest]) in (0, 2, 4)
    cache = AnswerCache(path)
    for use in (cache.descriptions, cache.rates, cache.stats, lambda: cache.get([b"a"]), lambda: cache.claim(b"c")):
        try:
            use()
        except LeverError as error:
            assert str(path) in str(error)  # noqa: PT017
    cache.close()


@pytest.mark.parametrize("days", ["0", "1e15", "1e300", "1.7e308"])
def test_any_age_is_a_number_of_days(tmp_path, days) -> None:
    cache = AnswerCache(tmp_path / "a.sqlite")
    cache.put(cache.register("m", "model", {}), [("score", b"a", [1.0])])
    cache.close()
    assert main(["gc", str(tmp_path / "a.sqlite"), "--older-than", days]) == 0
    assert len(entries(tmp_path / "a.sqlite")) == 1 or days == "0"


@pytest.mark.parametrize("version", [-1, -(2**31), 2, 2**31 - 1])
def test_another_version_is_refused(tmp_path, capsys, version) -> None:
    AnswerCache(tmp_path / "a.sqlite").close()
    with sqlite3.connect(tmp_path / "a.sqlite") as db:
        db.execute(f"PRAGMA user_version = {version}")
    assert main(["stats", str(tmp_path / "a.sqlite")]) == 4 and "schema" in capsys.readouterr().err


def test_a_cache_that_one_may_not_write_to_is_not_called_damaged(tmp_path, capsys, monkeypatch) -> None:
    file = tmp_path / "a.sqlite"
    AnswerCache(file).close()
    real = sqlite3.connect

    def only_read(_: object, **options: object) -> sqlite3.Connection:
        return real(f"file:{file}?mode=ro", **{**options, "uri": True})

    monkeypatch.setattr(sqlite3, "connect", only_read)
    assert main(["gc", str(file), "--older-than", "0"]) == UsageError.exit_code
    assert f"{file}: you may not write to it or its folder" in capsys.readouterr().err
