"""Damaged files, hundreds: each gives one clear error with exit code 4, runs no code and writes nothing.

Every reader meets its own file damaged in some way. All of them run in this process; one of each kind also goes
through the command line. The damage is generated from a fixed seed, so a failure names a case that can be rerun.
"""

import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lever_plus import paths
from lever_plus.data import dataset
from lever_plus.data.beam_data import load_beam_data
from lever_plus.data.embeddings import ModalityFile, load_embeddings
from lever_plus.data.rl_data import load_rl_data
from lever_plus.selectors import PointerSelector
from lever_plus.selectors.checkpoint import load_selector
from lever_plus.settings.shared import SharedSettings
from lever_plus.stages import convert_checkpoint
from open_mmicl.errors import DamagedInputError
from tests.data import make

ROWS = make.ROWS


class Bomb:
    """A pickle of it would create a file named ``exploded`` in the working directory."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("exploded"),)


@dataclass
class Reader:
    """A reader, and its valid file: ``write`` makes it in a folder and returns the file that gets damaged."""

    read: Callable[[Path], Any]
    write: Callable[[Path], Path]


def selector_content() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    state = {
        "input_proj.weight": torch.randn(8, 12, generator=g),
        "cross_attn_layers.0.in_proj_weight": torch.randn(24, 8, generator=g),
        "cross_attn_layers.0.in_proj_bias": torch.zeros(24),
        "cross_attn_layers.0.out_proj.weight": torch.randn(8, 8, generator=g),
        "cross_attn_layers.0.out_proj.bias": torch.zeros(8),
        "attn_norms.0.weight": torch.ones(8),
        "attn_norms.0.bias": torch.zeros(8),
        "query_proj.weight": torch.randn(8, 8, generator=g),
        "cand_proj.weight": torch.randn(8, 8, generator=g),
    }
    return {"epoch": 3, "phase": "rce", "model_state_dict": state, "kl_beta": 0.1, "metrics": {"val_loss": 1.0}}


def v2_content() -> dict[str, Any]:
    state = {f"lever_lm.pointer_selector.{n}": v for n, v in selector_content()["model_state_dict"].items()}
    return {
        "epoch": 3,
        "state_dict": {**state, "lever_lm.img_model.x": torch.zeros(3)},
        "hyper_parameters": {"lr": 1e-4},
    }


def embedding_content() -> torch.Tensor:
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1))


def torch_file(name: str, content: Callable[[], Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(content(), folder / name)
        return folder / name

    return write


def json_file(name: str, content: Callable[[], Any]) -> Callable[[Path], Path]:
    return lambda folder: make.write(folder / name, content())


def vqa_folder(damaged: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        for split in ("train", "val"):
            questions, annotations = make.vqa_json([4, 5, 6])
            make.write(folder / f"OpenEnded_mscoco_{split}2014_questions.json", questions)
            make.write(folder / f"mscoco_{split}2014_annotations.json", annotations)
        return folder / damaged

    return write


def read_vqa(path: Path) -> Any:
    dataset._SPLITS.clear()
    return dataset.load_split(paths.dataset(SharedSettings(dataset="okvqa_local", okvqa_path=str(path.parent))), "val")


QUESTIONS, ANNOTATIONS = "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"
JSON_READERS = {
    "rl": Reader(lambda p: load_rl_data(p, ROWS), json_file("rl.json", make.rl_json)),
    "beam": Reader(lambda p: load_beam_data(p, ROWS), json_file("beam.json", make.beam_json)),
    "beam as rl": Reader(lambda p: load_rl_data(p, ROWS), json_file("beam.json", make.beam_json)),
    "questions": Reader(read_vqa, vqa_folder(QUESTIONS)),
    "annotations": Reader(read_vqa, vqa_folder(ANNOTATIONS)),
}
TORCH_READERS = {
    "embeddings": Reader(lambda p: load_embeddings(p, "query embeddings", ROWS), torch_file("e.pt", embedding_content)),
    "modalities": Reader(
        lambda p: dict(ModalityFile(p, "CLIP embeddings", ROWS)),
        torch_file("clip.pt", lambda: {"image": embedding_content(), "text": embedding_content()}),
    ),
    "v3": Reader(lambda path: load_selector(path, PointerSelector), torch_file("rce_epoch3.pt", selector_content)),
    "v2": Reader(lambda path: load_selector(path, PointerSelector), torch_file("best.ckpt", v2_content)),
}
READERS = {**JSON_READERS, **TORCH_READERS}


# ---- damage to the bytes of any file ------------------------------------------------------------------------------


def cut(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return damage


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def as_utf16(data: bytes) -> bytes:
    return data.decode("utf-8", errors="replace").encode("utf-16")


BYTES: dict[str, Callable[[Path], None]] = {
    **{f"cut to {share:.0%}": cut(share) for share in (0.0, 0.01, 0.3, 0.6, 0.9, 0.99)},
    "gzip in disguise": rewrite(gzip.compress),
    "zeros": rewrite(lambda data: b"\0" * len(data)),
    "a pickle that runs code": rewrite(lambda data: pickle.dumps(Bomb())),
    "a torch file that runs code": lambda path: torch.save({"state_dict": Bomb(), "model_state_dict": Bomb()}, path),
    "text": rewrite(lambda data: b"not this file at all\n"),
    "html": rewrite(lambda data: b"<!DOCTYPE html><html>404</html>"),
}
TEXT_BYTES: dict[str, Callable[[Path], None]] = {
    "UTF-16": rewrite(as_utf16),
    "Latin-1": rewrite(lambda data: data.replace(b'"', b'"\xe9\xff', 1)),
    "NaN": rewrite(lambda data: data.replace(b": [", b": [NaN, ", 1)),
    "two objects": rewrite(lambda data: data + data),
    "a list": rewrite(lambda data: b"[" + data + b"]"),
    "null": rewrite(lambda data: b"null"),
    "an empty object": rewrite(lambda data: b"{}"),
    "nested without end": rewrite(lambda data: b'{"3": ' + b"[" * 100_000),
    "an endless number": rewrite(lambda data: b'{"3": ' + b"9" * 10_000 + b"}"),
}


# ---- damage to the content ----------------------------------------------------------------------------------------


def edit(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


def assign(*place: Any, value: Any) -> Callable[[Path], None]:
    """Put a value at a place inside the JSON."""

    def change(content: Any) -> None:
        for step in place[:-1]:
            content = content[step]
        content[place[-1]] = value

    return edit(change)


def remove(*place: Any) -> Callable[[Path], None]:
    def change(content: Any) -> None:
        for step in place[:-1]:
            content = content[step]
        del content[place[-1]]

    return edit(change)


def repeat_key(path: Path) -> None:
    text = path.read_text()
    path.write_text(text[:-1] + ', "3": ' + json.dumps(json.loads(text)["3"]) + "}")


CANDIDATE = ("8", "pointer_candidates", 1)
BAD_POINTERS = ([1, 1], [1, -1], [1, 6], [1, 2.0], ["1", "2"], [], None, 3, {}, [True, False], [1, 2**80])
RL_CONTENT: dict[str, Callable[[Path], None]] = {
    **{f"pointer {v!r}": assign(*CANDIDATE, value=make.candidate(v, 1)) for v in BAD_POINTERS},
    **{
        f"{name} {value!r}": assign(*CANDIDATE, name, value=value)
        for name, values in {
            "vqa_acc_score": (1.5, -0.1, "0.6", None, [], 1e400, True),
            "vqa_correct": (2, -1, "1", 0.5, None),
            "vqa_gt_prob": (1.2, "x"),
            "beam_score": ("0.1", 1e999, []),
            "logprob_score": (float("-inf"), {}),
            "temperature": (-1, "hot"),
            "beam_rank": (-1, 0.5),
            "gen_method": (3,),
            "vqa_pred_answer": (3, "\ud800"),
            "pointer_global": ([1, 39], [1], "x"),
        }.items()
        for value in values
    },
    "no pointer": remove(*CANDIDATE, "pointer"),
    "no score": remove(*CANDIDATE, "vqa_acc_score"),
    "a candidate is a list": assign(*CANDIDATE, value=[1, 2]),
    "candidates are an object": assign("8", "pointer_candidates", value={}),
    "no candidates": remove("8", "pointer_candidates"),
    "prompt order": assign("8", "prompt_order", value="sideways"),
    "picks the query": assign("8", "candidate_pool_ids", value=[0, 8, 2, 39, 4, 6]),
}
POOL_CONTENT: dict[str, Callable[[Path], None]] = {
    f"pool {what}": assign("8", "candidate_pool_ids", value=value)
    for what, value in {
        "with an index twice": [0, 1, 2, 39, 4, 4],
        "with an index out of range": [0, 1, 2, 39, 4, ROWS],
        "with a negative index": [0, 1, 2, 39, 4, -6],
        "with text": [0, 1, 2, 39, 4, "6"],
        "with a fraction": [0, 1, 2, 39, 4, 6.5],
        "of another size": [0, 1, 2, 39, 4],
        "as text": "0,1,2",
        "as null": None,
        "empty": [],
    }.items()
}
KEY_CONTENT: dict[str, Callable[[Path], None]] = {
    "query out of range": edit(lambda content: content.update({str(ROWS): content.pop("8")})),
    "query no number": edit(lambda content: content.update({"eight": content.pop("8")})),
    "query negative": edit(lambda content: content.update({"-8": content.pop("8")})),
    "query twice": repeat_key,
    "query twice, written differently": edit(lambda content: content.update({"03": content["3"]})),
    "query is a list": assign("8", value=[1]),
}
BEAM_CONTENT: dict[str, Callable[[Path], None]] = {
    "no query at the end": edit(lambda content: content["8"]["id_list"][0].pop()),
    "another query at the end": assign("8", "id_list", 0, -1, value=9),
    "a demonstration twice": assign("8", "id_list", 0, value=[4, 4, 8]),
    "a demonstration out of the pool": assign("8", "id_list", 0, value=[4, 7, 8]),
    "a demonstration out of range": assign("8", "id_list", 0, value=[4, ROWS, 8]),
    "a demonstration as text": assign("8", "id_list", 0, value=["4", 1, 8]),
    "no demonstration": assign("8", "id_list", 0, value=[8]),
    "a beam as number": assign("8", "id_list", 0, value=8),
    "no beams": assign("8", "id_list", value=[]),
    "fewer scores": edit(lambda content: content["8"]["score_list"].pop()),
    "a score as text": assign("8", "score_list", 0, value="0.5"),
    "a score not finite": assign("8", "score_list", 0, value=1e400),
    "no scores": remove("8", "score_list"),
    "no ids": edit(lambda content: [entry.pop("id_list") for entry in content.values()]),
    "no pool": remove("8", "candidate_pool_ids"),
    "construct order": assign("8", "construct_order", value=["left"]),
    "beams twice": edit(lambda content: content["8"]["id_list"].__setitem__(1, content["8"]["id_list"][0])),
}
QUESTION_CONTENT: dict[str, Callable[[Path], None]] = {
    "question id twice": assign("questions", 1, "question_id", value=100),
    "question id as text": assign("questions", 1, "question_id", value="103"),
    "question id as fraction": assign("questions", 1, "question_id", value=103.5),
    "image id negative": assign("questions", 1, "image_id", value=-5),
    "image id beyond 64 bit": assign("questions", 1, "image_id", value=2**70),
    "image id of another question": assign("questions", 1, "image_id", value=99),
    "no question": remove("questions", 1, "question"),
    "question as number": assign("questions", 1, "question", value=5),
    "question as broken text": assign("questions", 1, "question", value="\udc00"),
    "a question missing": remove("questions", 1),
    "an unknown question": assign("questions", 1, "question_id", value=777),
    "an element is text": assign("questions", 1, value="x"),
    "questions are an object": assign("questions", value={}),
    "no questions": assign("questions", value=[]),
    "no such key": edit(lambda content: content.update(items=content.pop("questions"))),
}
ANNOTATION_CONTENT: dict[str, Callable[[Path], None]] = {
    "nine answers": edit(lambda content: content["annotations"][1]["answers"].pop()),
    "eleven answers": edit(lambda content: content["annotations"][1]["answers"].append({"answer": "x"})),
    "no answers": remove("annotations", 1, "answers"),
    "answers as text": assign("annotations", 1, "answers", value="yes"),
    "an answer as number": assign("annotations", 1, "answers", 3, "answer", value=3),
    "an answer as list": assign("annotations", 1, "answers", 3, "answer", value=["x"]),
    "an answer without text": assign("annotations", 1, "answers", 3, value={"answer_id": 4}),
    "an answer as null": assign("annotations", 1, "answers", 3, value=None),
    "an annotation twice": assign("annotations", 1, "question_id", value=100),
    "an annotation missing": remove("annotations", 2),
    "an annotation as null": assign("annotations", 2, value=None),
    "a text twice in an answer": rewrite(lambda data: data.replace(b'"answer":', b'"answer": "x", "answer":', 1)),
    "an id twice in an element": rewrite(lambda data: data.replace(b'"image_id":', b'"image_id" : 5, "image_id":', 1)),
}


def change_tensor(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda path: torch.save(change(torch.load(path, weights_only=True)), path)


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 2] = value
        return tensor

    return change


EMBEDDING_CONTENT: dict[str, Callable[[Path], None]] = {
    "NaN embedding": change_tensor(with_value(float("nan"))),
    "infinite embedding": change_tensor(with_value(float("inf"))),
    "all NaN": change_tensor(lambda t: t * float("nan")),
    "integers": change_tensor(lambda t: t.long()),
    "one dimension": change_tensor(lambda t: t[0]),
    "three dimensions": change_tensor(lambda t: t[None]),
    "a row too few": change_tensor(lambda t: t[1:].clone()),
    "no columns": change_tensor(lambda t: t[:, :0].clone()),
    "a dict with ids beside": change_tensor(lambda t: {"embeddings": t, "ids": t[:, 0].long()}),
    "a ragged list": change_tensor(lambda t: [*t[:-1], t[-1, :-1]]),
    "numpy": lambda path: torch.save(np.zeros((ROWS, 8), dtype=np.float32), path),
    "sparse": change_tensor(lambda t: t.to_sparse()),
    "complex": change_tensor(lambda t: t.to(torch.complex64)),
}
MODALITY_CONTENT: dict[str, Callable[[Path], None]] = {
    "one modality": change_tensor(lambda parts: {"image": parts["image"]}),
    "one NaN": change_tensor(lambda parts: {**parts, "text": with_value(float("nan"))(parts["text"])}),
    "one short": change_tensor(lambda parts: {**parts, "text": parts["text"][1:].clone()}),
    "one a list": change_tensor(lambda parts: {**parts, "text": [1.0]}),
}


def change_state(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content["model_state_dict"])
        torch.save(content, path)

    return damage


SELECTOR_CONTENT: dict[str, Callable[[Path], None]] = {
    "NaN weight": change_state(lambda s: s["query_proj.weight"].fill_(float("nan"))),
    "missing weight": change_state(lambda s: s.pop("cand_proj.weight")),
    "unknown weight": change_state(lambda s: s.update({"decoder_gru.weight_ih": torch.zeros(4)})),
    "weight of another width": change_state(lambda s: s.update({"cand_proj.weight": torch.zeros(8, 9)})),
    "weight as list": change_state(lambda s: s.update({"cand_proj.weight": [1.0]})),
    "weight as integers": change_state(lambda s: s.update({"cand_proj.weight": torch.zeros(8, 8, dtype=torch.int64)})),
    "weight twice": change_state(lambda s: s.update({"attn_norm.weight": torch.ones(8)})),
    "no weights": change_state(lambda s: s.clear()),
    "state as list": lambda path: torch.save({"model_state_dict": [1, 2]}, path),
    "other keys": lambda path: torch.save({"weights": {"a": 1}}, path),
    "a number": lambda path: torch.save(3, path),
    "a newer format": lambda path: torch.save({"format": "lever_plus.selector/2"}, path),
    "a format without config": lambda path: torch.save(
        {"format": "lever_plus.selector/1", "model_state_dict": {}}, path
    ),
}
CONTENT = {
    "rl": {**RL_CONTENT, **POOL_CONTENT, **KEY_CONTENT},
    "beam": {**BEAM_CONTENT, **POOL_CONTENT, **KEY_CONTENT},
    "beam as rl": {
        "a score as text": BEAM_CONTENT["a score as text"],
        "query no number": KEY_CONTENT["query no number"],
    },
    "questions": QUESTION_CONTENT,
    "annotations": ANNOTATION_CONTENT,
    "embeddings": EMBEDDING_CONTENT,
    "modalities": MODALITY_CONTENT,
    "v3": SELECTOR_CONTENT,
    "v2": {
        "no selector in it": lambda path: torch.save({"state_dict": {"lever_lm.img_model.x": torch.zeros(3)}}, path)
    },
}
DAMAGES = {
    reader: {**BYTES, **(TEXT_BYTES if reader in JSON_READERS else {}), **CONTENT[reader]} for reader in READERS
}


def fault(reader: str, damage: Callable[[Path], None], folder: Path) -> str:
    """What is wrong with what a reader says of its damaged file, "" for nothing."""
    path = READERS[reader].write(folder)
    damage(path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    try:
        READERS[reader].read(path)
    except DamagedInputError as error:
        message = str(error)
    else:
        return "was read"
    message.encode()
    if path.name not in message or "\n" in message or len(message) >= len(str(path)) + 400:
        return f"is no short line that names the file: {message}"
    return "" if {p.name: p.read_bytes() for p in folder.iterdir()} == before else "something was written or run"


@pytest.mark.parametrize("reader", READERS)
def test_the_file_is_read_and_each_damage_to_it_is_one_clear_error(reader, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    READERS[reader].read(READERS[reader].write(tmp_path / "whole"))
    wrong = {}
    for number, (name, damage) in enumerate(DAMAGES[reader].items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        wrong[name] = fault(reader, damage, folder)
    assert len(wrong) > 10 and {name: said for name, said in wrong.items() if said} == {}


COMMANDS = [
    ("annotations", "nine answers"), ("annotations", "cut to 60%"), ("questions", "UTF-16"),
    ("questions", "gzip in disguise"), ("questions", "question id twice"),
]  # fmt: skip


@pytest.mark.parametrize(("reader", "name"), COMMANDS)
def test_the_check_command(reader, name, tmp_path):
    path = READERS[reader].write(tmp_path)
    DAMAGES[reader][name](path)
    code, error = command("lever_plus.data.dataset", "check", "okvqa_local", OKVQA_PATH=tmp_path)
    assert code == 4 and path.name in error


@pytest.mark.parametrize("name", ["a torch file that runs code", "cut to 90%", "missing weight", "text"])
def test_the_convert_command(name, tmp_path, capsys):
    path = READERS["v3"].write(tmp_path)
    DAMAGES["v3"][name](path)
    before = path.read_bytes()
    assert convert_checkpoint.main(["--trust", str(path)]) == 4
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and path.name in lines[0]
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_the_convert_command_as_a_process(tmp_path):
    path = READERS["v2"].write(tmp_path)
    BYTES["cut to 60%"](path)
    code, error = command("lever_plus.stages.convert_checkpoint", "--trust", str(path), cwd=tmp_path)
    assert code == 4 and path.name in error and [p.name for p in tmp_path.iterdir()] == [path.name]


TRAINING = [
    ("rl", "pointer [1, 6]"), ("rl", "NaN"), ("embeddings", "NaN embedding"),
    ("embeddings", "a torch file that runs code"), ("v3", "weight of another width"),
]  # fmt: skip


@pytest.mark.parametrize(("reader", "name"), TRAINING)
def test_training_on_damaged_files_leaves_its_folder_alone(reader, name, tmp_path, monkeypatch, capsys):
    from lever_plus import cli
    from lever_plus.settings.selector import TrainV3Settings
    from lever_plus.stages import train_v3

    inputs = {n: READERS[n].write(tmp_path) for n in ("rl", "embeddings")}
    content = selector_content()
    del content["model_state_dict"]["input_proj.weight"]  # it reads embeddings as wide as it is
    torch.save(content, tmp_path / "sft.pt")
    inputs["v3"] = tmp_path / "sft.pt"
    DAMAGES[reader][name](inputs[reader])
    out = tmp_path / "out"
    out.mkdir()
    (out / "rce_epoch9.pt").write_bytes(b"of an earlier run")
    words = {
        "DATASET": "mini_okvqa", "RESULT_DIR": tmp_path / "results", "DEVICE": "cpu", "OUTPUT_DIR": out,
        "RL_DATA_PATH": inputs["rl"], "QUERY_EMB_PATH": inputs["embeddings"], "SFT_CKPT": inputs["v3"],
    }  # fmt: skip
    argv = [f"{key}={value}" for key, value in words.items()]
    assert cli.stage_main(TrainV3Settings, train_v3.run, train_v3.__doc__ or "", argv) == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and inputs[reader].name in lines[0]
    assert [p.name for p in out.iterdir()] == ["rce_epoch9.pt"]


def command(module: str, *words: str, cwd: Path | None = None, **env: Any) -> tuple[int, str]:
    """Exit code and error line of a command; asserts that there is one line and no traceback."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        env={**os.environ, "PYTHONPATH": str(root), **{k: str(v) for k, v in env.items()}},
        cwd=cwd or root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return done.returncode, lines[0]
