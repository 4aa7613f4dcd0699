"""Choose demonstrations from Python: an image, a question, a folder of examples in; the best of them, the prompt out.

    from lever_plus.picker import Picker

    picker = Picker.from_run(dataset="mini_okvqa", exp_name="exp1")
    examples = picker.read("my_examples")                       # my_examples/demos.jsonl and its images
    best = picker.pick("photo.png", "what is it?", examples, shots=4)
    print(picker.prompt("photo.png", "what is it?", best), picker.answer("photo.png", "what is it?", best))

A picker is a trained selector with what it reads by: CLIP, the LVLM whose hidden states and answer embeddings are its
channels, and the mean and spread that were taken off these in training. ``save_pretrained``, ``from_pretrained`` and
``push_to_hub`` are huggingface_hub's; the folder holds safetensors, plain JSON and a model card. CLIP's and the LVLM's
weights are not in it: it names them.
"""

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from safetensors.torch import load_file, load_model, save_file, save_model

from lever_plus import io, paths
from lever_plus.config import config_file
from lever_plus.data import channel_names
from lever_plus.data.channels import load_tables
from lever_plus.data.clip_features import ClipEncoder, combine_modalities
from lever_plus.data.readers import read_jsonl
from lever_plus.devices import torch_device
from lever_plus.experiments import words
from lever_plus.infoscore import prompt_order
from lever_plus.selectors import PointerSelector, SelectorConfig
from lever_plus.selectors.policy import FixedShots, picks
from lever_plus.settings import names, word_lists
from lever_plus.settings.inference import InferenceSettings
from lever_plus.settings.loading import load
from lever_plus.stages import lvlm
from lever_plus.stages.checkpoint_choice import choose_v3
from lever_plus.stages.export_embeddings import clip_path
from open_mmicl.engine import Engine, GenerationSettings
from open_mmicl.errors import DamagedInputError, MissingInputError, UsageError, foreign, plain
from open_mmicl.interface.config import InferModelConfig
from open_mmicl.interface.prompts import Demo, Prompt

CONFIG, WEIGHTS, CENTRES, CARD = "config.json", "selector.safetensors", "centres.safetensors", "README.md"
FORMAT = "lever_plus.picker/1"
LIST = "demos.jsonl"
_DOWNLOAD = ("revision", "cache_dir", "force_download", "local_files_only", "token")


@dataclass(frozen=True)
class Examples:
    """Demonstrations to choose from, and their rows as candidates (N, d_c)."""

    demos: tuple[Demo, ...]
    rows: torch.Tensor

    def __len__(self) -> int:
        return len(self.demos)


class Picker(ModelHubMixin):
    """A trained selector and what it reads by. Made by :meth:`from_run`, :meth:`from_pretrained` or, before any
    training, :meth:`untrained`.
    """

    def __init__(
        self,
        selector: PointerSelector,
        config: dict[str, Any],
        centres: dict[str, tuple[torch.Tensor, torch.Tensor]],
        engine: Any = None,
    ) -> None:
        """
        Args:
            config: ``channels``, ``item_word``, ``lever_lm``, ``layers``, ``pool``, ``clip``, ``lvlm`` (a file of
                configs/infer_model), ``prompt_order``, ``generation`` and what the card says.
            centres: (mean, spread) of a channel's dimensions, (d,) each, of ``lvlm`` and ``answer``.
            engine: the LVLM; None loads that of the configuration when it is first needed.
        """
        self.selector, self.config, self.centres, self._given = selector.eval(), config, centres, engine

    @classmethod
    def from_run(cls, **settings: object) -> "Picker":
        """The best v3 selector of a run, found as ``scripts/inference.sh`` finds it.

        Args:
            settings: by their names in small letters: ``dataset``, ``exp_name``, ``beam_model``, ``sampler``,
                ``result_dir``, ``lever_lm_checkpoint_path``, … The environment and .env fill what is not given.

        Raises:
            UsageError: a setting. MissingInputError: there is no such run, or a file of it is gone.
        """
        s = _settings(settings)
        chosen = choose_v3(s)
        tables = load_tables(channel_names.table_files(s), None)
        selector = PointerSelector.load(chosen["path"], tables.widths)
        centres = {}
        for part in tables.candidates.parts if tables.split else ():
            if part.mean is not None:
                centres[part.name] = (part.mean, part.spread)
        config = _config(s, selector, list(channel_names.names(s))) | {
            "checkpoint": {"phase": chosen.get("phase"), "epoch": chosen.get("epoch"), "why": chosen["why"]},
            "record": _record(paths.experiment_dir(s, s.exp_name or paths.v3_dir(s).name) / "record.json"),
        }
        return cls(selector, config, centres, functools.partial(lvlm.load_engine, s))

    @classmethod
    def untrained(cls, **settings: object) -> "Picker":
        """The examples nearest to a query by CLIP's image and question: a first look, before anything is trained.

        Args:
            settings: as for :meth:`from_run`; ``dataset`` decides which CLIP and LVLM, and need not be there.

        Raises:
            UsageError: a setting. MissingInputError, DamagedInputError: CLIP's files.
        """
        s = _settings(settings)
        clip = ClipEncoder(clip_path(s), torch_device(s.device))
        width = 2 * clip.model.config.projection_dim
        # As wide as its input, a selector's first weights are a rotation: they leave the cosine as it is.
        selector = PointerSelector(SelectorConfig(width, width, num_layers=0, encoder="metric", query_dim=width))
        config = _config(s, selector, ["clip_image", "clip_text"]) | {"checkpoint": None, "record": None}
        picker = cls(selector, config, {}, functools.partial(lvlm.load_engine, s))
        picker.clip = clip
        return picker

    @functools.cached_property
    def engine(self) -> Any:
        """The LVLM, loaded when it is first needed. Raises: as :meth:`open_mmicl.engine.Engine.load`."""
        if self._given is not None:
            return self._given() if callable(self._given) else self._given
        return Engine.load(InferModelConfig.load(config_file("infer_model", self.config["lvlm"])))

    @functools.cached_property
    def clip(self) -> ClipEncoder:
        """CLIP, loaded when it is first needed."""
        return ClipEncoder(lvlm.repo_path(self.config["clip"]), torch_device(load(InferenceSettings, {}).device))

    # ---- from files to rows -------------------------------------------------------------------------------------

    def read(self, folder: str | Path) -> Examples:
        """The examples of a folder: ``demos.jsonl``, a line {"image", "question", "answer"} each, images beside it.

        Raises:
            MissingInputError: the list or an image is not there. DamagedInputError: a line of another form.
        """
        return self.examples(read_demos(Path(folder)))

    def examples(self, demos: Sequence[Demo]) -> Examples:
        """Embed demonstrations once, so that any number of queries can choose from them.

        Raises:
            UsageError: there is none, or one is no demonstration. MissingInputError, DamagedInputError: an image.
        """
        demos = _checked(demos)
        if not demos:
            raise UsageError("no demonstrations to choose from")
        images, questions = [demo.image for demo in demos], [demo.question for demo in demos]
        return Examples(demos, self._rows(images, questions, [demo.answer for demo in demos]))

    def _rows(self, images: list[str], questions: list[str], answers: list[str] | None) -> torch.Tensor:
        """Rows of items as queries (N, d_q), or with their answers as candidates (N, d_c)."""
        channels = self.config["channels"]
        clip = {}
        if not channels or {"clip_image", "clip_text"} & set(channels):
            clip = {"image": self._images(images), "text": self.clip.texts(questions, "questions")}
        if not channels:
            return combine_modalities(clip, self.config["item_word"], self.config["lever_lm"])
        parts = []
        for name in channels:
            if name in ("clip_image", "clip_text"):
                parts.append(clip[name.removeprefix("clip_")])
            elif name == "lvlm":
                prompts = [Prompt((), image, question) for image, question in zip(images, questions, strict=True)]
                states = self.engine.hidden_states(prompts, self.config["layers"], self.config["pool"]).flatten(1)
                parts.append(self._centred(name, states))
            elif answers is not None:
                by_clip = name == "answer_clip"
                values = self.clip.texts(answers, "answers") if by_clip else self.engine.answer_embeddings(answers)
                parts.append(self._centred(name, values))
        return torch.cat([torch.nn.functional.normalize(part.float(), dim=1) for part in parts], dim=1)

    def _images(self, images: list[str]) -> torch.Tensor:
        distinct = list(dict.fromkeys(images))
        place = {image: i for i, image in enumerate(distinct)}
        return self.clip.images(distinct, "images")[torch.tensor([place[image] for image in images])]

    def _centred(self, name: str, values: torch.Tensor) -> torch.Tensor:
        mean, spread = self.centres[name]
        return (values.float() - mean) / spread

    # ---- choosing and asking ------------------------------------------------------------------------------------

    @torch.inference_mode()
    def pick(
        self, image: str | Path, question: str, examples: Examples | Sequence[Demo], shots: int | None = 4
    ) -> list[Demo]:
        """The demonstrations for a query, best first.

        Args:
            examples: from :meth:`read` or :meth:`examples` (or the demonstrations, then embedded again each time).
            shots: how many; None lets a selector that was trained with STOP=1 decide, up to four.

        Raises:
            UsageError: fewer examples than ``shots``, None for a selector that cannot stop, or no path, no text.
        """
        among = examples if isinstance(examples, Examples) else self.examples(examples)
        path, text = _query(image, question)
        query = self._rows([path], [text], None)
        if shots is None and not self.selector.config.stop:
            raise UsageError("this selector was not trained to stop (STOP=1): say how many demonstrations (shots=4)")
        policy = self.selector if shots is None else FixedShots(self.selector)
        chosen = policy.select(query, among.rows[None], min(4, len(among)) if shots is None else shots)
        return [among.demos[place] for place in picks(chosen)[0]]

    def prompt(self, image: str | Path, question: str, demos: Sequence[Demo]) -> str:
        """The text that the LVLM reads, images as its marks. ``demos`` best first, as :meth:`pick` gives them."""
        asked = self._prompt(image, question, demos)
        return self.engine.lvlm.layout.text(asked)

    def answer(self, image: str | Path, question: str, demos: Sequence[Demo] = ()) -> str:
        """The LVLM's answer with some demonstrations, best first."""
        kind, asked = GenerationSettings(*self.config["generation"]), self._prompt(image, question, demos)
        return self.engine.generate([asked], kind)[0].strip()

    def _prompt(self, image: str | Path, question: str, demos: Sequence[Demo]) -> Prompt:
        demos, (path, text) = _checked(demos), _query(image, question)
        order = prompt_order(range(len(demos)), self.config["prompt_order"])
        return Prompt(tuple(demos[place] for place in order), path, text)

    # ---- huggingface_hub's save_pretrained, from_pretrained, push_to_hub ----------------------------------------

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self.selector, str(save_directory / WEIGHTS))
        both = {f"{name}.{what}": value.contiguous() for name, pair in self.centres.items()
                for what, value in zip(("mean", "spread"), pair, strict=True)}  # fmt: skip
        save_file(both, str(save_directory / CENTRES))
        io.write_json(save_directory / CONFIG, self.config, indent=1)
        io.write_text(save_directory / CARD, model_card(self.config))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, engine: Any = None, **options: Any
    ) -> "Picker":
        """What ``save_pretrained`` or ``push_to_hub`` kept.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the Hub.
            options: ``revision``, ``cache_dir``, ``force_download``, ``local_files_only``, ``token`` of a download.

        Raises:
            UsageError: no name, or another option. MissingInputError: nothing of that name here, nor fetched.
            DamagedInputError: a file of it.
        """
        name = pretrained_model_name_or_path
        if not isinstance(name, str | os.PathLike):
            raise UsageError(f"from_pretrained: a folder or a name on the Hub is expected, not {type(name).__name__}")
        if unknown := sorted(options.keys() - set(_DOWNLOAD)):
            raise UsageError(f"from_pretrained: no option {unknown[0]}; there are: engine, {', '.join(_DOWNLOAD)}")
        return cls._from_pretrained(model_id=os.fspath(name), engine=engine, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, engine: Any = None, **options: Any) -> "Picker":
        folder = Path(model_id)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(model_id, allow_patterns=[CONFIG, WEIGHTS, CENTRES], **options))
            except (OSError, ValueError) as error:  # of the hub: no name, no such repository, no network
                why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
                raise MissingInputError(
                    f"{plain(model_id, 200)}: no such folder, nor fetched from the Hub ({plain(why)})"
                ) from error
        for name in (CONFIG, WEIGHTS, CENTRES):
            if not (folder / name).is_file():
                raise MissingInputError(f"{folder} has no {name}: it is no folder of save_pretrained")
        config = io.read_object(folder / CONFIG, "picker configuration")
        with foreign("picker", folder):
            selector = PointerSelector(SelectorConfig(**config["selector"]))
            load_model(selector, str(folder / WEIGHTS))
            both = load_file(str(folder / CENTRES))
            channels = {key.rsplit(".", 1)[0] for key in both}
            centres = {name: (both[f"{name}.mean"], both[f"{name}.spread"]) for name in channels}
        return cls(selector, config, centres, engine)


def _settings(given: dict[str, object]) -> InferenceSettings:
    values = {name.upper(): str(value) for name, value in given.items()}
    names.check_file(values, "Picker")
    return load(InferenceSettings, values)


def _query(image: object, question: object) -> tuple[str, str]:
    """(path, question) of a query. Raises UsageError where the image is no path or the question no text."""
    if not isinstance(image, str | os.PathLike):
        raise UsageError(f"the image is the path of a file, not {type(image).__name__}; save it first")
    return os.fspath(image), _text(question, "the question")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{what} is a text that is not empty, not {plain(repr(value), 60)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{what} is no text in UTF-8: {plain(repr(value), 60)}") from error
    return value


def _checked(demos: object) -> tuple[Demo, ...]:
    """The demonstrations. Raises UsageError where one is none."""
    found = tuple(demos) if isinstance(demos, Iterable) else (demos,)
    if not all(isinstance(demo, Demo) for demo in found):
        raise UsageError("demonstrations are what read() or pick() gives, or a list of Demo(image, question, answer)")
    for demo in found:
        _query(demo.image, demo.question)
        _text(demo.answer, "a demonstration's answer")
    return found


def _config(s: InferenceSettings, selector: PointerSelector, channels: list[str]) -> dict[str, Any]:
    """What a picker keeps of the settings (see :class:`Picker`)."""
    return {
        "format": FORMAT, "selector": asdict(selector.config), "channels": channels,
        "item_word": channel_names.item_word(s.embedding), "lever_lm": s.lever_lm,
        "layers": list(word_lists.layers(s.lvlm_layers)), "pool": s.lvlm_pool, "clip": clip_path(s),
        "lvlm": paths.infer_model_yaml(s).stem, "prompt_order": s.prompt_order,
        "generation": [s.max_new_tokens, s.num_beams, s.length_penalty], "dataset": s.dataset,
    }  # fmt: skip


def read_demos(folder: Path) -> list[Demo]:
    """The demonstrations that a folder's demos.jsonl lists (see :meth:`Picker.read`)."""
    file = folder / LIST
    if not file.is_file():
        raise MissingInputError(f'{file} not found: a line {{"image": …, "question": …, "answer": …}} for each example')
    demos = []
    for where, entry in read_jsonl(file):
        if not isinstance(entry, dict) or not {"image", "question", "answer"} <= set(entry):
            raise DamagedInputError(f'{file}, {where}: no {{"image", "question", "answer"}}')
        image, question, answer = (entry[name] for name in ("image", "question", "answer"))
        if not all(isinstance(text, str) and text.strip() for text in (image, question, answer)):
            raise DamagedInputError(f"{file}, {where}: image, question and answer are texts, none of them empty")
        path = folder / image
        with foreign(f"{where} of", file, "names an image that cannot be"):
            there = path.is_file()
        if not there:
            raise MissingInputError(f"{file}, {where}: no such image: {path}")
        demos.append(Demo(os.fspath(path), question, answer))
    return demos


def _record(path: Path) -> dict[str, Any] | None:
    """What a card says of the run's record; None where there is none."""
    if not path.is_file():
        return None
    found = io.read_object(path, "record")
    wanted = ("experiment", "dataset", "n_queries", "accuracy", "price")
    return {name: found[name] for name in wanted if name in found}


def model_card(config: dict[str, Any]) -> str:
    """The README.md of a saved picker, in the Hub's form."""
    seen = " ".join(config["channels"]) or config["item_word"]
    made = f"A pointer selector (v3) that chooses in-context demonstrations for `{config['lvlm']}`, trained on "
    made += f"`{config['dataset']}`."
    if config["checkpoint"] is None:
        made = f"Chooses in-context demonstrations for `{config['lvlm']}` by similarity; it is not trained."
    lines = [
        "---", "library_name: lever-plus", "tags: [in-context-learning, visual-question-answering]", "---", "",
        "# Demonstration picker", "",
        f"{made} It reads {seen}.", "",
        "```python", "from lever_plus.picker import Picker", "", 'picker = Picker.from_pretrained("THIS_REPOSITORY")',
        'best = picker.pick("photo.png", "what is it?", picker.read("my_examples"), shots=4)', "```", "",
    ]  # fmt: skip
    record = config.get("record")
    if not record:
        return "\n".join([*lines, "No record was at hand when it was saved.", ""])
    shots = sorted({int(k) for by_shot in record["accuracy"].values() for k in by_shot})
    lines += [
        f"Accuracy in points on {record['n_queries']} validation queries of `{record['dataset']}`, 95 % interval:", "",
        "| method | " + " | ".join(f"shot {k}" for k in shots) + " |", "| --- |" + " --- |" * len(shots),
    ]  # fmt: skip
    for name, by_shot in record["accuracy"].items():
        lines.append(f"| {name} | " + " | ".join(words.accuracy(by_shot.get(str(k))) for k in shots) + " |")
    return "\n".join([*lines, ""])
