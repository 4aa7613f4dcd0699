"""Every answer and score an LVLM ever gave, kept in one SQLite file that several processes may use at once.

    python -m open_mmicl.answer_cache stats|verify FILE
    python -m open_mmicl.answer_cache gc FILE --keep MODEL [MODEL …] | --older-than DAYS

A key is the hash of everything the answer depends on (see :func:`entry_key`); a value is written once and never
changed. One batch is one transaction, so a process that is killed loses at most the batch it was computing.
Only the engine writes here.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import os
import platform
import sqlite3
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_mmicl.arguments import Parser
from open_mmicl.errors import DamagedInputError, LeverError, MissingInputError, UsageError, foreign, plain

SCHEMA = 1
BUSY_SECONDS = 60
CLAIM_SECONDS = 600
_SELECT_AT_ONCE = 500
_SMALLEST_PAGE = 512
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS models (
    id INTEGER PRIMARY KEY, key TEXT UNIQUE NOT NULL, name TEXT NOT NULL, description TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY, model INTEGER NOT NULL, kind TEXT NOT NULL, value TEXT NOT NULL, written INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS rates (
    model INTEGER NOT NULL, kind TEXT NOT NULL, device TEXT NOT NULL, prompts INTEGER NOT NULL, tokens INTEGER NOT NULL,
    images INTEGER NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (model, kind, device)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claims (key BLOB PRIMARY KEY, owner TEXT NOT NULL, beat REAL NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Rate:
    """Measured speed: prompts, computed tokens and encoded images in ``seconds`` of work."""

    prompts: int
    tokens: int
    images: int
    seconds: float


def model_key(parts: Mapping[str, object]) -> str:
    """Hash of what every answer of a loaded model depends on (fingerprint, prompt format, dtype, processor, …)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def entry_key(stem: bytes, kind: str, words: Iterable[object]) -> bytes:
    """20-byte key of (stem, kind, words). The engine's stems: the model key for a prompt (then its ICDs' image digests,
    questions and answers in prompt order and the query's), the prompt's own key for what is asked of it.
    """
    digest = hashlib.sha256(stem)
    for word in (kind, *words):
        data = word.encode() if isinstance(word, str) else repr(word).encode()
        digest.update(b"%d:" % len(data))  # length first, so that no two lists of words run into one another
        digest.update(data)
    return digest.digest()[:20]


class AnswerCache:
    """The open file.

    Raises:
        DamagedInputError: not such a file, damaged, or written by a newer version.
    """

    def __init__(self, path: Path, create: bool = True):
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise MissingInputError(f"answer cache not found: {self.path}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._models: dict[str, int] = {}
        # SQLite takes a file of a few bytes for an empty one. Its size is asked, not its content: closing a second
        # handle would take this process's locks from a connection open elsewhere in it (POSIX advisory locks).
        if self.path.is_file() and 0 < self.path.stat().st_size < _SMALLEST_PAGE:
            raise DamagedInputError(f"answer cache {self.path} is damaged or no SQLite file")
        with self._guarded():
            self.db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            self._switch_to_wal()
            self.db.execute("PRAGMA synchronous=NORMAL")
            with self._transaction():
                version = self.db.execute("PRAGMA user_version").fetchone()[0]
                tables = {row[0] for row in self.db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
                if version not in (0, SCHEMA) or (tables and version == 0):
                    raise DamagedInputError(
                        f"{self.path} is no answer cache of this version (schema {version}, expected {SCHEMA})"
                    )
                if version == 0:
                    for statement in _TABLES.split(";\n"):
                        self.db.execute(statement)
                    self.db.execute(f"PRAGMA user_version = {SCHEMA}")

    def close(self) -> None:
        """Close the file."""
        self.db.close()

    def register(self, key: str, name: str, description: Mapping[str, object]) -> int:
        """Row id of a model key; ``description`` is kept for people to read."""
        if key not in self._models:
            with self._guarded():
                text = json.dumps(description, sort_keys=True, ensure_ascii=False)
                with self._transaction():
                    self.db.execute(
                        "INSERT OR IGNORE INTO models (key, name, description) VALUES (?, ?, ?)", (key, name, text)
                    )
                    self._models[key] = self.db.execute("SELECT id FROM models WHERE key = ?", (key,)).fetchone()[0]
        return self._models[key]

    def descriptions(self) -> dict[str, dict[str, Any]]:
        """Every model key with what was registered for it."""
        with self._guarded():
            rows = self.db.execute("SELECT key, description FROM models").fetchall()
        return {self._text(key, "a model's key"): self._description(text) for key, text in rows}

    def last_answer(self, key: str) -> int | None:
        """When anything was last written for a model key [s since 1970]; None where nothing ever was."""
        with self._guarded():
            text = "SELECT MAX(written) FROM answers WHERE model = (SELECT id FROM models WHERE key = ?)"
            return self.db.execute(text, (key,)).fetchone()[0]

    def get(self, keys: Sequence[bytes]) -> dict[bytes, list]:
        """Values of those keys that are there.

        Raises:
            DamagedInputError: a value does not fit its checksum.
        """
        found: dict[bytes, list] = {}
        with self._guarded():
            for start in range(0, len(keys), _SELECT_AT_ONCE):
                part = keys[start : start + _SELECT_AT_ONCE]
                marks = ",".join("?" * len(part))
                for key, value, checksum in self.db.execute(
                    f"SELECT key, value, checksum FROM answers WHERE key IN ({marks})", part
                ):
                    self._check(key, value, checksum)
                    found[key] = self._parsed(value, list, f"entry {key.hex()}")
        return found

    def put(self, model: int, entries: Sequence[tuple[str, bytes, list]], claim: bytes | None = None) -> bool:
        """Write (kind, key, value) entries in one transaction; what is there already stays. ``claim`` is given up.

        Returns: whether all of them are new.
        """
        now = int(time.time())
        texts = [(kind, key, json.dumps(value, ensure_ascii=False)) for kind, key, value in entries]
        rows = [(key, model, kind, text, now, _checksum(key, text)) for kind, key, text in texts]
        with self._guarded(), self._transaction():
            written = self.db.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", rows).rowcount
            if claim is not None:
                self.db.execute("DELETE FROM claims WHERE key = ?", (claim,))
        return not rows or written == len(rows)

    def claim(self, key: bytes) -> bool:
        """Announce that this process computes ``key``; False where another living process already does.

        A claim lapses when its process is gone (seen on the same machine) or after ten minutes.
        """
        with self._guarded(), self._transaction():
            row = self.db.execute("SELECT owner, beat FROM claims WHERE key = ?", (key,)).fetchone()
            if row is not None and row[0] != _me() and _is_recent(row[1]) and _may_live(row[0]):
                return False
            self.db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?)", (key, _me(), time.time()))
        return True

    def release(self, key: bytes) -> None:
        """Give a claim up without having written anything."""
        with self._guarded(), self._transaction():
            self.db.execute("DELETE FROM claims WHERE key = ? AND owner = ?", (key, _me()))

    def add_rate(self, model: int, kind: str, device: str, rate: Rate) -> None:
        """Add measured work to the totals of (model, kind, device)."""
        with self._guarded(), self._transaction():
            self.db.execute(
                "INSERT INTO rates VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (model, kind, device) DO UPDATE SET "
                "prompts = prompts + excluded.prompts, tokens = tokens + excluded.tokens, "
                "images = images + excluded.images, seconds = seconds + excluded.seconds",
                (model, kind, device, rate.prompts, rate.tokens, rate.images, rate.seconds),
            )

    def rates(self) -> list[tuple[str, dict, str, str, Rate]]:
        """(model name, its description, kind, device, rate) of everything measured."""
        with self._guarded():
            rows = self.db.execute(
                "SELECT m.name, m.description, r.kind, r.device, r.prompts, r.tokens, r.images, r.seconds "
                "FROM rates r JOIN models m ON m.id = r.model"
            ).fetchall()
        found = []
        for name, text, kind, device, *numbers in rows:
            if not all(type(n) in (int, float) and 0 <= n < float("inf") for n in numbers):
                raise self._damaged("a measured speed is no number")
            words = [self._text(word, "a measured speed's name") for word in (name, kind, device)]
            found.append((words[0], self._description(text), *words[1:], Rate(*numbers)))
        return found

    def stats(self) -> list[tuple[str, str, str, int]]:
        """(model name, model key, kind, entries)."""
        with self._guarded():
            rows = self.db.execute(
                "SELECT m.name, m.key, a.kind, COUNT(*) FROM answers a JOIN models m ON m.id = a.model "
                "GROUP BY m.id, a.kind ORDER BY m.id, a.kind"
            ).fetchall()
        return [(*(self._text(word, "a model's or an entry's name") for word in row[:3]), row[3]) for row in rows]

    def verify(self) -> int:
        """Check the file's structure and every value; returns the number of entries.

        Raises:
            DamagedInputError: says what and where.
        """
        with self._guarded():
            report = self.db.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if report != "ok":
                raise DamagedInputError(f"answer cache {self.path} is damaged: {' '.join(report.split())}")
            count = 0
            for key, value, checksum in self.db.execute("SELECT key, value, checksum FROM answers"):
                self._check(key, value, checksum)
                self._parsed(value, list, f"entry {key.hex()}")
                count += 1
        return count

    def collect(self, keep: Iterable[str] | None = None, older_than: float | None = None) -> int:
        """Delete entries of models not in ``keep`` (keys or beginnings) or older than a time; returns how many."""
        with self._guarded():
            with self._transaction():
                before = self.db.total_changes
                if keep is not None:
                    rows = self.db.execute("SELECT id, key FROM models").fetchall()
                    known = [(i, self._text(key, "a model's key")) for i, key in rows]
                    for word in keep:
                        if not any(key.startswith(word) for _, key in known):
                            raise UsageError(f"no model {word!r} in {self.path}; see: {_program()} stats {self.path}")
                    drop = [i for i, key in known if not any(key.startswith(word) for word in keep)]
                    self.db.executemany("DELETE FROM answers WHERE model = ?", [(i,) for i in drop])
                if older_than is not None:
                    self.db.execute("DELETE FROM answers WHERE written < ?", (int(max(older_than, 0.0)),))
                removed = self.db.total_changes - before
            self.db.execute("VACUUM")
        return removed

    def _damaged(self, problem: str) -> DamagedInputError:
        return DamagedInputError(f"answer cache {self.path} is damaged: {problem}")

    def _text(self, value: Any, what: str) -> str:
        """A text that a row holds: SQLite keeps any type in any column."""
        if not isinstance(value, str):
            raise self._damaged(f"{what} is no text")
        return value

    def _parsed(self, text: Any, kind: type, what: str) -> Any:
        with foreign("answer cache", self.path, f"is damaged: {what} is no JSON"):
            value = json.loads(self._text(text, what))
        if not isinstance(value, kind):
            raise self._damaged(f"{what} is no {kind.__name__}")
        return value

    def _description(self, text: Any) -> dict[str, Any]:
        return self._parsed(text, dict, "a model's description")

    def _check(self, key: Any, value: Any, checksum: Any) -> None:
        whole = isinstance(key, bytes) and isinstance(value, str) and _checksum(key, value) == checksum
        if not whole:
            name = key.hex() if isinstance(key, bytes) else repr(key)[:60]
            raise self._damaged(f"entry {name} does not fit its checksum")

    def _switch_to_wal(self) -> None:
        """Write-ahead logging, kept in the file. Of several processes that open a new file at once SQLite refuses all
        but one immediately, whatever the connection's timeout, so the waiting is done here.
        """
        deadline = time.monotonic() + BUSY_SECONDS
        while True:
            try:
                self.db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:  # an interruption may come before it begins, and SQLite itself may have ended it
                self.db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise UsageError(
                    f"answer cache {self.path} has been locked by another process for {BUSY_SECONDS} s"
                ) from error
            hint = " (is the disk full?)" if "I/O" in str(error) else ""
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
                raise UsageError(f"answer cache {self.path}: you may not write to it or its folder") from error
            raise DamagedInputError(f"answer cache {self.path} cannot be used: {error}{hint}") from error
        except sqlite3.Error as error:
            raise DamagedInputError(f"answer cache {self.path} is damaged or no SQLite file: {error}") from error


def _started(pid: int) -> str:
    """When a process of this machine began (clock ticks), so that a reused number is not mistaken; "" if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
    except OSError:
        return ""


def _may_live(owner: str) -> bool:
    """Whether the process that owns a claim may still run; of other machines nothing is known."""
    host, pid, started = owner.rsplit(" ", 2) if isinstance(owner, str) and owner.count(" ") > 1 else ("", "", "")
    if not pid.isdecimal():
        return False  # no process of ours wrote it
    if host != platform.node() or not Path("/proc/self/stat").exists():
        return True
    return _started(int(pid)) == started


def _is_recent(beat: Any) -> bool:
    """Whether a claim has not lapsed; one from the future (the clock was put back) counts for as long as any other."""
    return isinstance(beat, (int, float)) and abs(time.time() - beat) < CLAIM_SECONDS


def _me() -> str:
    """This process as the owner of a claim; asked each time, since a process may be forked."""
    return _owner(os.getpid())


@functools.lru_cache(maxsize=1)
def _owner(pid: int) -> str:
    return f"{platform.node()} {pid} {_started(pid)}"


def _checksum(key: bytes, value: str) -> int:
    return zlib.crc32(value.encode(), zlib.crc32(key))


def _program() -> str:
    return "python -m open_mmicl.answer_cache"


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit code (0, 2 usage, 3 missing, 4 damaged)."""
    parser = Parser(prog=_program(), description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("stats", "entries per model"),
        ("verify", "check every entry"),
        ("gc", "delete entries that are not needed"),
    ):
        command = commands.add_parser(name, help=words)
        command.add_argument("file", type=Path)
        if name == "gc":
            command.add_argument(
                "--keep", nargs="+", metavar="MODEL", help="model keys (or their beginnings) to keep; the others go"
            )
            command.add_argument(
                "--older-than", type=float, metavar="DAYS", help="delete what was written more than DAYS ago"
            )
    options = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with foreign("answer cache", options.file):
            lines = _answer(options)
        for line in lines:
            print(plain(line))
        sys.stdout.flush()
    except LeverError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\ninterrupted: nothing is lost", file=sys.stderr)
        return 130
    return 0


def _answer(options: argparse.Namespace) -> list[str]:
    """Do what a command line asks; the lines to print."""
    if options.command == "gc" and options.keep is None and options.older_than is None:
        raise UsageError("gc needs --keep MODEL … or --older-than DAYS")
    if options.command == "gc" and not 0 <= (options.older_than or 0) < float("inf"):
        raise UsageError(f"--older-than {options.older_than:g} is not allowed: a number of days >= 0")
    with contextlib.closing(AnswerCache(options.file, create=False)) as cache:
        if options.command == "stats":
            lines = [f"{name}  {key}  {kind}  {count} entries" for name, key, kind, count in cache.stats()]
            return [*lines, f"{options.file}: {options.file.stat().st_size / 2**20:.1f} MiB"]
        if options.command == "verify":
            return [f"{options.file}: {cache.verify()} entries, all whole"]
        since = None if options.older_than is None else time.time() - options.older_than * 86400
        return [f"{options.file}: {cache.collect(options.keep, since)} entries deleted"]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
