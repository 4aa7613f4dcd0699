"""Ways to damage a file: its bytes, the values of its structure, what a pickle or a table in it holds."""

import io
import json
import pickle
import random
import sqlite3
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Damage = Callable[[random.Random, bytes], bytes]
TEXTS = [
    "",
    " ",
    "x" * 100_000,
    "\x1b]0;title\x07\x1b[31m",
    "../../../x",
    "/etc/passwd",
    "a\nb",
    "a\0b",
    "\ud800",
    "\u202e\u2028",
    "1_000",
    "٣",
    "nan",
    "-1",
    "1e999",
    "<script>",
    "{{ 7*7 }}",
    "${jndi:x}",
    "$(touch exploded)",
    "`touch exploded`",
    "';touch exploded;'",
    "%n%s",
    "~nosuchuser/x",
    "~",
    "é" * 300,
    "C:\\x",
    "--",
    "-n",
    "=",
    "a=b",
    "{root}/{0.__class__}",
]
NUMBERS = [
    "0",
    "-1",
    "1",
    "2",
    "1e308",
    "-1e308",
    "1e999",
    "NaN",
    "-Infinity",
    "0.5",
    "-0.0",
    str(2**31),
    str(2**62),
    str(2**63),
    str(2**64),
    "9" * 5000,
    "1e-320",
    "01",
    "1_0",
]
OTHERS = [
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "[[]]",
    '{"": {}}',
    "[null]",
    '{"a": 1, "a": 2}',
    "[" * 3000 + "]" * 3000,
]
_RAW = "@@raw@@"


def of_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut off, changed, inserted, repeated, or numbers put in their place."""
    content = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(content) + 1)
        how = rng.choice(["cut", "byte", "insert", "number", "repeat", "whole"])
        if how == "cut":
            del content[at:]
        elif how == "byte" and at < len(content):
            content[at] = rng.randrange(256)
        elif how == "insert":
            content[at:at] = rng.randbytes(rng.randrange(1, 12))
        elif how == "number":
            content[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))
        elif how == "repeat":
            content[at:at] = content[at : at + 40] * rng.choice([1, 1, 100])
        elif rng.random() < 0.1:
            content = bytearray(rng.choice([b"", b"\0" * 64, b"\x1f\x8b\x08", "x".encode("utf-16"), b"\xff" * 9]))
    return bytes(content)


def token(rng: random.Random) -> str:
    """A JSON value that is hostile, in its text form."""
    kind = rng.randrange(3)
    if kind == 0:
        return json.dumps(rng.choice(TEXTS))
    return rng.choice(NUMBERS if kind == 1 else OTHERS)


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value below this one."""
    found, left = [], [value]
    while left:
        one = left.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else []
        for key in keys:
            found.append((one, key))
            left.append(one[key])
    return found


def of_structure(rng: random.Random, value: Any) -> str:
    """A JSON text of the value in which one or two things are replaced, removed, renamed, doubled."""
    raw: list[str] = []
    for _ in range(rng.choice([1, 1, 2])):
        there = places(value)
        if not there:
            break
        container, key = rng.choice(there)
        how = rng.randrange(5)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[json.loads(json.dumps(rng.choice(TEXTS)))] = container.pop(key)
        elif how == 2 and isinstance(container, list):
            container.insert(key, container[key])
        else:
            container[key] = f"{_RAW}{len(raw)}"
            raw.append(token(rng))
    text = json.dumps(value)
    for number, new in enumerate(raw):
        text = text.replace(json.dumps(f"{_RAW}{number}"), new)
    return text


def of_json(rng: random.Random, data: bytes) -> bytes:
    """Of a JSON file."""
    return of_structure(rng, json.loads(data)).encode("utf-8", "surrogatepass")


def of_lines(rng: random.Random, data: bytes) -> bytes:
    """Of a file of JSON lines: one of them."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = of_structure(rng, json.loads(lines[at])).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:
        lines.insert(at, rng.choice(lines))
    return b"\n".join(lines) + b"\n"


def of_text(rng: random.Random, data: bytes) -> bytes:
    """Of YAML, CSV and .env: words and lines exchanged for hostile ones."""
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    how = rng.randrange(5)
    text = rng.choice([rng.choice(TEXTS), rng.choice(NUMBERS), rng.choice(OTHERS)])
    if how == 0:
        lines.insert(at, lines[at])
    elif how == 1:
        lines[at] = text
    elif how == 2:
        del lines[at]
    else:
        for mark in (":", "=", ","):
            head, sign, rest = lines[at].partition(mark)
            if sign:
                lines[at] = f"{head}{sign} {text}" if how == 3 else f"{text}{sign}{rest}"
                break
    return "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")


class Bomb:
    """Its pickle would make a file named ``exploded``."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("exploded"),)


def odd_values(rng: random.Random) -> Any:
    """What a torch file can hold in place of a tensor or number."""
    return rng.choice(
        [
            lambda: None,
            lambda: "x" * 1000,
            lambda: -1,
            lambda: 2**70,
            lambda: float("nan"),
            lambda: {},
            lambda: [1, [2]],
            lambda: torch.zeros(0),
            lambda: torch.zeros(1),
            lambda: torch.full((3, 4), float("nan")),
            lambda: torch.zeros(1).expand(2**20, 2**10),
            lambda: torch.ones(3, dtype=torch.complex64),
            lambda: torch.ones(3, 3).to_sparse(),
            lambda: torch.ones(2, dtype=torch.int64),
            lambda: torch.zeros(2, 0, 3),
            lambda: torch.ones(4, 4, dtype=torch.bfloat16),
            lambda: torch.empty(3, device="meta"),
            lambda: {"\x1b[31m": 1},
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            lambda: np.float64(1.5),
            lambda: Bomb(),
            lambda: torch.ones(1, 1, 1, 1, 1, 1),
            lambda: {1: 2},
            lambda: torch.Size([1]),
            lambda: torch.float32,
        ]
    )()


def of_torch(rng: random.Random, data: bytes) -> bytes:
    """Of a torch file: a value of its content, a member of its archive, or a plain pickle instead."""
    how = rng.randrange(6)
    if how == 0 and zipfile.is_zipfile(io.BytesIO(data)):
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            names = old.namelist()
            hit = rng.choice(names)
            for name in names:
                inside = of_bytes(rng, old.read(name)) if name == hit else old.read(name)
                new.writestr(name if rng.random() < 0.95 else "../" + name, inside)
        return out.getvalue()
    value = torch.load(io.BytesIO(data), weights_only=True)
    there = places(value) or [([value], 0)]
    if isinstance(value, torch.Tensor):
        value = odd_values(rng)
    else:
        container, key = rng.choice(there)
        if how == 1:
            del container[key]
        else:
            container[key] = odd_values(rng)
    out = io.BytesIO()
    if how == 2:
        pickle.dump(value, out, protocol=rng.choice([0, 2, 4]))
    else:
        torch.save(value, out, _use_new_zipfile_serialization=rng.random() < 0.7)
    return out.getvalue()


def of_npy(rng: random.Random, data: bytes) -> bytes:
    """Of a .npy file: its header."""
    shape = rng.choice(
        [
            "(3, 4)",
            "(-1, 4)",
            f"({2**40}, 4)",
            "()",
            "(3,)",
            "(0, 4)",
            "3",
            "(3, 4" + ", 1" * 40 + ")",
            "(True, 4)",
            "(3.0, 4)",
        ]
    )
    kind = rng.choice(
        ["<f4", ">f4", "<f2", "<i8", "|O", "<U4", "|S4", "<c8", "<M8[s]", "f999", "|V8", "x", "[('a', '<f4')]"]
    )
    header = f"{{'descr': {kind!r}, 'fortran_order': {rng.choice(['True', 'False', '3'])}, 'shape': {shape}, }}"
    if rng.random() < 0.2:
        header = rng.choice(["__import__('os').system('touch exploded')", "{" * 500, "{'descr': '<f4'}", "[]", ""])
    words = (header + " " * (-(len(header) + 11) % 64) + "\n").encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(words)) + words + data[128:]


def of_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Of a safetensors file: the JSON at its beginning."""
    size = struct.unpack("<Q", data[:8])[0]
    header = of_structure(rng, json.loads(data[8 : 8 + size])).encode("utf-8", "surrogatepass")
    said = len(header) if rng.random() < 0.8 else rng.choice([0, 2**40, 2**64 - 1, len(data) * 2])
    return struct.pack("<Q", said) + header + data[8 + size :]


def of_sqlite(rng: random.Random, data: bytes) -> bytes:
    """Of the answer cache: values of other types, tables and versions."""
    values = [
        "NULL",
        "-1",
        "1e999",
        "x'00ff'",
        "''",
        "'\x1b[31m'",
        str(2**62),
        "'[1'",
        "'{}'",
        "'[]'",
        "zeroblob(100000)",
    ]
    columns = ["key", "model", "kind", "value", "written", "checksum"]
    statement = rng.choice(
        [
            f"UPDATE answers SET {rng.choice(columns)} = {rng.choice(values)}",
            f"UPDATE models SET {rng.choice(['name', 'key', 'description', 'id'])} = {rng.choice(values)}",
            f"PRAGMA user_version = {rng.choice([-1, 0, 99, 2**31 - 1])}",
            "DROP TABLE answers",
            "DROP TABLE models",
            "ALTER TABLE answers RENAME COLUMN value TO v",
            "CREATE TRIGGER t INSERT ON answers BEGIN DELETE FROM answers; END",
            f"INSERT INTO claims VALUES ({rng.choice(values)}, {rng.choice(values)}, {rng.choice(values)})",
            "DROP TABLE claims",
            "CREATE VIEW v AS SELECT * FROM answers",
        ]
    )
    db = sqlite3.connect(":memory:")
    try:
        db.deserialize(data[:18] + b"\1\1" + data[20:])  # not in WAL mode, which needs a file
        db.executescript("PRAGMA ignore_check_constraints = 1; PRAGMA foreign_keys = 0;")
        db.execute(statement)
        db.commit()
        return db.serialize()
    except sqlite3.Error:
        return of_bytes(rng, data)
    finally:
        db.close()
