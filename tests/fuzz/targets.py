"""What is fuzzed: each reader with whole files of its form, and what is then read or asked of them."""

import contextlib
import dataclasses
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lever_plus import config, io, paths, provenance, shards
from lever_plus import main as command
from lever_plus.data import dataset
from lever_plus.data.beam_data import load_beam_data, load_pools
from lever_plus.data.channels import load_array
from lever_plus.data.embeddings import ModalityFile, load_embeddings
from lever_plus.data.parquet import read_parquet
from lever_plus.data.readers import read_csv, read_json, read_jsonl
from lever_plus.data.rl_data import load_rl_data
from lever_plus.experiments import export, record
from lever_plus.experiments.arms import arms_of, check
from lever_plus.picker import read_demos
from lever_plus.selectors.checkpoint import load_selector
from lever_plus.selectors.pointer import PointerSelector
from lever_plus.settings import loading, names
from lever_plus.settings.registry import STAGE_SETTINGS
from lever_plus.settings.shared import SharedSettings
from lever_plus.stages.convert_checkpoint import convert
from open_mmicl import answer_cache
from open_mmicl.interface.config import InferModelConfig, read_yaml
from open_mmicl.interface.fingerprint import weight_digest
from open_mmicl.interface.images import ImageFiles, load_rgb
from tests.data import make
from tests.fuzz import damage
from tests.reference.fake_run import make_samples, write_run, write_training

ROWS = make.ROWS


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        files: writes whole files into a folder and returns those that are damaged.
        read: reads them in that folder; ``rng`` for what else is drawn.
        damages: besides bytes. writes: patterns of what the reader itself may write.
    """

    name: str
    files: Callable[[Path], Sequence[Path]]
    read: Callable[[Path, random.Random], Any]
    damages: tuple[damage.Damage, ...] = ()
    writes: tuple[str, ...] = ()
    share: float = 1.0
    keep: dict[str, Any] = field(default_factory=dict)


def one(name: str, write: Callable[[Path], Any]) -> Callable[[Path], list[Path]]:
    """The files of a target that has one."""

    def files(folder: Path) -> list[Path]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
        return [path]

    return files


def text(name: str, content: str) -> Callable[[Path], list[Path]]:
    """One text file."""
    return one(name, lambda path: path.write_text(content, encoding="utf-8"))


def of_json(name: str, content: Any) -> Callable[[Path], list[Path]]:
    """One JSON file."""
    return text(name, json.dumps(content))


def vqa(folder: Path) -> list[Path]:
    """The official layout."""
    files = []
    for split in ("train", "val"):
        for kind, content in zip(
            ("OpenEnded_mscoco_{}2014_questions", "mscoco_{}2014_annotations"), make.vqa_json([4, 5, 6]), strict=True
        ):
            files.append(make.write(folder / f"{kind.format(split)}.json", content))
    return files


def read_vqa(folder: Path, rng: random.Random) -> None:
    dataset._SPLITS.clear()
    for split in ("train", "val"):
        dataset.load_split(paths.dataset(SharedSettings(dataset="okvqa_local", okvqa_path=str(folder))), split)


def selector(path: Path) -> None:
    from lever_plus.selectors.pointer import PointerSelector, SelectorConfig

    torch.manual_seed(0)
    PointerSelector(SelectorConfig(input_dim=8, hidden_dim=8)).save(path, "rce", 1, {"val_loss": 1.0}, {}, {})


def run_folder(folder: Path) -> list[Path]:
    """A finished run with its training."""
    run = write_run(folder / "run", make_samples(1, n=6, shots=(1, 2), random_seeds=1), checkpoint="v3/grpo_epoch2.pt")
    training = write_training(folder / "v3")
    return [*sorted(run.iterdir()), *sorted(training.iterdir())]


def read_run(folder: Path, rng: random.Random) -> None:
    price = {"beam_data": None, "rl_data": None, "training": 0, "evaluation": None}
    run = record.load_run(folder / "run", folder / "v3")
    made = record.build([run], "exp1", price, {}, resamples=1000)
    for lang in ("zh", "en"):
        assert "\x1b" not in record.render(made, lang) + record.table(made, lang).replace("\x1b", "")
    json.dumps(made, allow_nan=False)
    shown = {"exp1": (made, [run])}
    export.accuracy_rows(shown), export.comparison_rows(shown), export.training_rows(shown)


def cache_file(path: Path) -> None:
    with contextlib.closing(answer_cache.AnswerCache(path)) as cache:
        model = cache.register("k" * 32, "tiny", {"dtype": "fp32"})
        cache.put(model, [("generate", bytes([i]) * 20, ["yes", i]) for i in range(30)])
        cache.add_rate(model, "generate", "cpu", answer_cache.Rate(1, 2, 3, 4.0))


def read_cache(folder: Path, rng: random.Random) -> None:
    with contextlib.closing(answer_cache.AnswerCache(folder / "a.sqlite")) as cache:
        model = cache.register("k" * 32, "tiny", {"dtype": "fp32"})
        cache.get([bytes([i]) * 20 for i in range(40)])
        cache.rates(), cache.stats(), cache.descriptions(), cache.claim(b"x" * 20)
        cache.put(model, [("generate", b"z" * 20, ["a"])], b"x" * 20)
        cache.verify(), cache.collect(["k"], 0.0)


def parquet_file(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (path.parent / "a.png").write_bytes(picture())
    rows = {
        "question_id": [1, 2],
        "question": ["what?", "é?"],
        "answers": [["a"], ["b", "c"]],
        "image": [{"bytes": picture(), "path": None}] * 2,
    }
    parquet.write_table(pyarrow.table(rows), path)


def picture(form: str = "PNG", size: tuple[int, int] = (9, 7)) -> bytes:
    import io as bytes_io

    buffer = bytes_io.BytesIO()
    Image.new("RGB", size, (1, 2, 3)).save(buffer, form)
    return buffer.getvalue()


def pictures(folder: Path) -> list[Path]:
    files = []
    for ending, form in (
        ("png", "PNG"),
        ("jpg", "JPEG"),
        ("gif", "GIF"),
        ("bmp", "BMP"),
        ("webp", "WEBP"),
        ("tiff", "TIFF"),
        ("ppm", "PPM"),
        ("ico", "ICO"),
        ("tga", "TGA"),
    ):
        files.append(folder / f"a.{ending}")
        files[-1].write_bytes(picture(form))
    return files


def read_pictures(folder: Path, rng: random.Random) -> None:
    for path in sorted(folder.glob("a.*")):
        for read in (load_rgb, ImageFiles().size):
            with contextlib.suppress(Exception) if path.suffix not in folder.name else contextlib.nullcontext():
                read(str(path))


def parts(folder: Path) -> list[Path]:
    rows = [{"fingerprint": "f" * 20, "key": str(i), "value": {"a": i}} for i in range(4)]
    path = folder / ".out.json.parts" / "ffff-1-1.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [path]


def stamped(folder: Path) -> list[Path]:
    out = folder / "out.json"
    io.write_json(out, [1])
    provenance.stamp(out, provenance.Recipe({"x": out}, {"a": 1}), 1.0)
    return [provenance.sidecar(out), out]


def read_stamped(folder: Path, rng: random.Random) -> None:
    out, made_from = folder / "out.json", provenance.Recipe({}, {"a": 2})
    if provenance.status(out, made_from) == "stale":
        provenance.changed(out, made_from)


DATASET_YAML = """name: mine
path_variable: MINE_PATH
default_path: "{result_dir}/mine"
reader: jsonl
files: {train: "{root}/a.jsonl", val: "{root}/b.jsonl"}
images: "{root}/images"
fields: {question: q, answers: a}
annotators: 3
settings: {RCE_EPOCHS: 3}
stand_in: {}
"""
MODEL_YAML = (config.CONFIG_DIR / "infer_model" / "qwen2.5_vl_3B_server.yaml").read_text(encoding="utf-8")
OFFICIAL_YAML = (config.CONFIG_DIR / "dataset" / "okvqa_local.yaml").read_text(encoding="utf-8")


def yaml_files(folder: Path) -> list[Path]:
    made = [
        *text("configs/dataset/mine.yaml", DATASET_YAML)(folder),
        *text("configs/dataset/theirs.yaml", OFFICIAL_YAML)(folder),
        *text("configs/infer_model/server.yaml", MODEL_YAML)(folder),
    ]
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text('{"question_id": 1, "q": "what?", "a": ["x", "y", "z"], "image_id": 1}\n')
    return made


def read_yaml_files(folder: Path, rng: random.Random) -> None:
    server = InferModelConfig.load(folder / "configs" / "infer_model" / "server.yaml")
    if server.interface == "openai":
        server.server_config.addresses({}), server.server_config.identity(), server.server_config.bound("float32")
    for name in ("mine", "theirs"):
        read_yaml(folder / "configs" / "dataset" / f"{name}.yaml")
        env = {
            "DATASET": name,
            "RESULT_DIR": str(folder / "results"),
            "MINE_PATH": str(folder),
            "OKVQA_PATH": str(folder),
        }
        loading.load(STAGE_SETTINGS["train_v3"], {}, env)
        found = paths.dataset(SharedSettings(dataset=name))
        found.found(), found.is_small(), [found.expected(split) for split in ("train", "val")]
    dataset._SPLITS.clear()
    dataset.load_split(paths.dataset(loading.load(SharedSettings, {}, {**env, "DATASET": "mine"})), "train")


SETTING_NAMES = sorted({f.name.upper() for cls in STAGE_SETTINGS.values() for f in dataclasses.fields(cls)})


def hostile(rng: random.Random) -> str:
    """A text for a setting, an argument."""
    pick = rng.random()
    made = rng.choice(damage.TEXTS) if pick < 0.5 else rng.choice(damage.NUMBERS)
    if pick > 0.85:
        made = "".join(chr(rng.choice([*range(1, 128), 0xE9, 0x663, 0x202E, 0x1F600])) for _ in range(rng.randrange(9)))
    return made.replace("\0", "").encode("utf-8", "ignore").decode()  # no environment holds others


def read_environment(folder: Path, rng: random.Random) -> None:
    env = {rng.choice(SETTING_NAMES): hostile(rng) for _ in range(rng.choice([1, 1, 2, 5]))}
    if rng.random() < 0.2:
        env[hostile(rng).replace("=", "") or "x"] = hostile(rng)
    env.setdefault("DATASET", "mini_okvqa")
    env.pop("LEVER_PLUGINS", None)  # names a file that is to be run
    cls = rng.choice(list(STAGE_SETTINGS.values()))
    for line in names.lines(names.fields_of([cls]), env, {}):
        assert "\n" not in line
    resolved = loading.load(cls, {}, env)
    if "check" in rng.choice(["check", ""]) and cls is STAGE_SETTINGS["train_v3"]:
        from lever_plus.stages import train_v3

        train_v3.check_settings(resolved, quiet=True)


DOTENV = "export A=1\nB = \"two words\"\n# c\nRCE_EPOCHS=3\nRESULT_DIR=~/x\nD='$HOME'\nE=a b # c\n"
EXP = "RCE_EPOCHS=10 20\nGRPO_EPOCHS=0\nRCE_LR=1e-5\nKL_BETA=0.1\nBATCH_SIZE=4\n"


def read_exp(folder: Path, rng: random.Random) -> None:
    arms = arms_of("x", folder, {"DATASET": "mini_okvqa"})
    check(arms, {"DATASET": "mini_okvqa", "RESULT_DIR": str(folder)})


def call(folder: Path, rng: random.Random) -> int:
    """A command through its own frame; one that would start work is not among them."""
    file = rng.choice(["a.sqlite", "a.pt", "a.json", ".", "nothing", "run", hostile(rng)])
    words = rng.choice(
        [
            [hostile(rng)],
            [rng.choice(list(command.COMMANDS)), f"--{hostile(rng)}"],
            [rng.choice(list(command.COMMANDS)), "-h"],
            ["compare", hostile(rng), hostile(rng)],
            ["compare", "run", file],
            ["compare", "run:v3", "run:v2", f"--delta={hostile(rng)}"],
            ["dataset", "check", hostile(rng)],
            ["dataset", hostile(rng)],
            ["dataset", "check", "mini_okvqa", f"NPROC={hostile(rng)}"],
            ["convert_checkpoint", "--trust", file, "-n"],
            ["convert_checkpoint", hostile(rng)],
            ["run_experiment", hostile(rng), "-n"],
            ["train_v3", "vqa", "auto", "0", "", "", "", *[hostile(rng)] * 3],
            ["benchmark_rl", "--queries", hostile(rng), "x"],
            ["inference", "imgcap"],
            ["train_lever_lm", "vqa", "mini_okvqa", "0", "", "", "", hostile(rng), "-n", "--", "x"],
            ["generate_data", "--assume"],
            [
                "CACHE",
                rng.choice(["stats", "verify", "gc", hostile(rng)]),
                file,
                *(["--older-than", hostile(rng)] if rng.random() < 0.5 else ["--keep", hostile(rng)]),
            ],
        ]
    )
    words = [word.replace("\0", "") for word in words]
    if words[0] == "CACHE":
        return answer_cache.main(words[1:])
    return command.main(words)


def call_files(folder: Path) -> list[Path]:
    cache_file(folder / "a.sqlite")
    selector(folder / "a.pt")
    (folder / "a.json").write_text("{}")
    write_run(folder / "run", make_samples(1, n=6, shots=(1, 2), only=("v3", "v2")))
    return [folder / "a.sqlite", folder / "a.pt"]


def targets() -> list[Target]:
    """All of them."""
    embeddings = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1))
    both = {"image": embeddings, "text": embeddings.clone()}
    lines = "".join(json.dumps({"question_id": i, "question": "what?", "answers": ["a"]}) + "\n" for i in range(4))
    demos = json.dumps({"image": "a.png", "question": "what?", "answer": "a"}) + "\n"

    def lists(read: Callable[..., Any], name: str) -> Callable[[Path, random.Random], list]:
        return lambda folder, rng: list(read(folder / name))

    def safetensors(path: Path) -> None:
        from safetensors.torch import save_file

        save_file({"w": torch.ones(3)}, str(path))

    def demo_files(folder: Path) -> list[Path]:
        (folder / "a.png").write_bytes(picture())
        return text("demos.jsonl", demos)(folder)

    structure, by_line, words = (damage.of_json,), (damage.of_lines,), (damage.of_text,)
    return [
        Target(
            "rl data", of_json("r.json", make.rl_json()), lambda f, rng: load_rl_data(f / "r.json", ROWS), structure
        ),
        Target(
            "beam data",
            of_json("b.json", make.beam_json()),
            lambda f, rng: (load_beam_data(f / "b.json", ROWS), load_rl_data(f / "b.json", ROWS)),
            structure,
        ),
        Target(
            "pools", of_json("p.json", make.sampler_cache()), lambda f, rng: load_pools(f / "p.json", ROWS), structure
        ),
        Target("vqa json", vqa, read_vqa, structure),
        Target(
            "json reader",
            of_json("q.json", [json.loads(line) for line in lines.split("\n") if line]),
            lists(read_json, "q.json"),
            structure,
        ),
        Target("jsonl reader", text("q.jsonl", lines), lists(read_jsonl, "q.jsonl"), by_line),
        Target(
            "csv",
            text("q.csv", 'question_id,question,answers\n1,"what, that?","[""a""]"\n2,who,b\n'),
            lists(read_csv, "q.csv"),
            words,
        ),
        Target(
            "parquet",
            one("q.parquet", parquet_file),
            lambda f, rng: list(read_parquet(f / "q.parquet", f / "out")),
            (),
            ("out/*",),
        ),
        Target("demonstrations", demo_files, lambda f, rng: read_demos(f), by_line),
        Target(
            "embeddings",
            one("e.pt", lambda p: torch.save(embeddings, p)),
            lambda f, rng: load_embeddings(f / "e.pt", "embeddings", ROWS),
            (damage.of_torch,),
        ),
        Target(
            "modalities",
            one("m.pt", lambda p: torch.save(both, p)),
            lambda f, rng: dict(ModalityFile(f / "m.pt", "embeddings", ROWS)),
            (damage.of_torch,),
        ),
        Target(
            "selector",
            one("s.pt", selector),
            lambda f, rng: load_selector(f / "s.pt", PointerSelector),
            (damage.of_torch,),
        ),
        Target("conversion", one("s.pt", selector), lambda f, rng: convert(f / "s.pt"), (damage.of_torch,)),
        Target(
            "array",
            one("a.npy", lambda p: np.save(p, np.ones((3, 4), np.float32))),
            lambda f, rng: load_array(f / "a.npy", "array"),
            (damage.of_npy,),
        ),
        Target(
            "safetensors",
            one("a.safetensors", safetensors),
            lambda f, rng: weight_digest(f / "a.safetensors"),
            (damage.of_safetensors,),
        ),
        Target("pictures", pictures, read_pictures),
        Target("answer cache", one("a.sqlite", cache_file), read_cache, (damage.of_sqlite,), ("a.sqlite*",), 0.5),
        Target("run", run_folder, read_run, (of_run,), share=0.5),
        Target("parts", parts, lambda f, rng: shards._read_parts(f / ".out.json.parts", "f" * 20), by_line),
        Target("provenance", stamped, read_stamped, structure),
        Target("yaml", yaml_files, read_yaml_files, words),
        Target("dotenv", text("e.env", DOTENV), lambda f, rng: config.read_dotenv(f / "e.env"), words),
        Target("experiment file", text("expx.env", EXP), read_exp, words),
        Target("environment", text("nothing", "x"), read_environment),
        Target("command", call_files, call, (damage.of_sqlite,), ("a.sqlite*", "results/**/*"), 0.3),
    ]


def of_run(rng: random.Random, data: bytes) -> bytes:
    """Of a run's files: JSON or JSON lines."""
    try:
        json.loads(data)
    except ValueError:
        return damage.of_lines(rng, data)
    return damage.of_json(rng, data)


os.environ.setdefault("LEVER_NAMES_CHECKED", "1")
