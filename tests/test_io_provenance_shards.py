"""Files appear whole or not at all; outputs know what they were made from; interrupted work resumes."""

import errno
import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lever_plus import io, provenance, shards
from lever_plus.config import REPO_ROOT
from open_mmicl.errors import DamagedInputError, MissingInputError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    io.write_json(path, {"x": 1})
    with pytest.raises(ValueError):
        io.write_json(path, {"x": float("nan")})
    with pytest.raises(RuntimeError), io.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"x": 1} and list(tmp_path.iterdir()) == [path]


def test_reading_names_what_is_wrong_and_where(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="bash make.sh"):
        io.read_json(tmp_path / "no.json", "beam data", "bash make.sh")
    (tmp_path / "cut.json").write_text('{"a": [1, 2')
    with pytest.raises(DamagedInputError, match="line 1, column 12"):
        io.read_json(tmp_path / "cut.json", "beam data")
    (tmp_path / "wide.json").write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(DamagedInputError, match="UTF-8"):
        io.read_json(tmp_path / "wide.json", "beam data")


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"x": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(DamagedInputError, match=r"convert_checkpoint\.sh --trust"):
        io.load_torch(tmp_path / "evil.pt", "checkpoint")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_a_truncated_tensor_file_is_damaged(tmp_path: Path, keep: int) -> None:
    torch.save({"x": torch.zeros(100)}, tmp_path / "x.pt")
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[:keep])
    with pytest.raises(DamagedInputError):
        io.load_torch(tmp_path / "x.pt", "embeddings")


def test_done_stale_foreign_missing(tmp_path: Path) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("1")
    recipe = provenance.Recipe({"in": source}, {"n": 3})
    assert provenance.status(output, recipe) == "missing"
    provenance.begin(output)
    output.write_text("made")
    assert provenance.status(output, recipe) == "missing"  # written, not stamped: the making was interrupted
    provenance.stamp(output, recipe, 0.1)
    assert provenance.status(output, recipe) == "current"
    other = provenance.Recipe({"in": source}, {"n": 4})
    assert provenance.status(output, other) == "stale" and provenance.changed(output, other) == ["n"]
    source.write_text("2")
    assert provenance.status(output, recipe) == "stale" and provenance.changed(output, recipe) == ["in"]
    output.write_text("edited by the user")
    assert provenance.status(output, recipe) == "foreign"


def test_what_a_killed_writer_left_goes_with_the_next_writing(tmp_path: Path) -> None:
    output, other = tmp_path / "out[1].json", tmp_path / ".other.json.1.tmp"
    for name in (".out[1].json.99.tmp", ".out[1].json.meta.json.99.tmp", other.name):
        (tmp_path / name).write_text("half")
    with provenance.writing(output):
        output.write_text("whole")
        provenance.stamp(output, provenance.Recipe({}), 0.1)
    assert sorted(tmp_path.iterdir()) == sorted([output, provenance.sidecar(output), other])


def test_a_lock_is_waited_for_and_ends_with_its_holder(tmp_path: Path) -> None:
    path, said = tmp_path / "new" / "a", []
    code = (
        "import sys, pathlib; from lever_plus import io\nwith io.locked(pathlib.Path(sys.argv[1])):\n"
        " print('held', flush=True)\n sys.stdin.readline()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPO_ROOT}
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes)
    assert holder.stdout.readline() == "held\n"

    def waiting() -> None:
        said.append(1)
        holder.kill()

    with io.locked(path, waiting):
        assert said == [1] and list(path.parent.iterdir()) == [path.with_name(".a.lock")]
    holder.communicate()
    with io.locked(path, waiting):
        pass
    assert said == [1] and list(path.parent.iterdir()) == []


def test_where_the_file_system_has_no_locks_the_work_is_done_and_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def without(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    io._warn_of_no_locks.cache_clear()
    with io.locked(tmp_path / "a"):
        pass
    assert shards.sharded_map(range(3), lambda k: k, tmp_path / "o.json", "f1", "t") == {"0": 0, "1": 1, "2": 2}
    assert [record.message for record in caplog.records if "has no file locks" in record.message] != []


def test_interrupted_work_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    output, seen = tmp_path / "o.json", []

    def work(key: int, stop: int | None = None) -> float:
        if key == stop:
            raise KeyboardInterrupt
        seen.append(key)
        return key / 3

    with pytest.raises(KeyboardInterrupt):
        shards.sharded_map(range(10), lambda k: work(k, 6), output, "f1", "t")
    part = next(shards.partial_dir(output).glob("*.jsonl"))
    part.write_text(part.read_text() + '{"fingerprint": "f1", "key": "6", "val')  # killed while writing
    result = shards.sharded_map(range(10), work, output, "f1", "t")
    assert seen == list(range(10)) and result == {str(k): k / 3 for k in range(10)}
    seen.clear()
    shards.sharded_map(range(3), work, output, "f2", "t")  # other inputs: nothing is reused
    assert seen == [0, 1, 2]
    shards.finish(output)
    assert not shards.partial_dir(output).exists()


def test_two_runs_for_one_output_leave_each_other_their_parts(tmp_path: Path) -> None:
    output, expected = tmp_path / "o.json", {str(k): k / 3 for k in range(6)}
    inner: list[dict] = []

    def work(key: int) -> float:
        if key == 3 and not inner:  # the other run begins, ends and cleans up while this one is at work
            inner.append({})
            inner[0] = shards.sharded_map(range(6), lambda k: k / 3, output, "f", "t")
            shards.finish(output)
        return key / 3

    assert shards.sharded_map(range(6), work, output, "f", "t") == expected == inner[0]
    shards.finish(output)
    assert not shards.partial_dir(output).exists()


def test_what_no_rank_took_is_still_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "world_size", lambda: 2)
    monkeypatch.setattr(shards, "_barrier", lambda: None)
    found = shards.sharded_map(range(5), lambda k: k * 2, tmp_path / "o.json", "f", "t")
    assert found == {str(k): k * 2 for k in range(5)}


def test_progress_counts_what_all_processes_have_done(tmp_path: Path) -> None:
    progress = shards._Progress(tmp_path, "f" * 64)
    assert progress.rows() == 0
    for number, rows in enumerate((3, 2)):
        (tmp_path / f"{'f' * 16}-{number}.jsonl").write_text("{}\n" * rows)
    (tmp_path / "other-0.jsonl").write_text("{}\n")
    assert progress.rows() == 5
    with (tmp_path / f"{'f' * 16}-0.jsonl").open("a") as handle:
        handle.write("{}\n{")  # the next row is just being written
    assert progress.rows() == progress.rows() == 6
