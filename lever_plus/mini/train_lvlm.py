"""Train the tiny Qwen2.5-VL from nothing: first its eyes (stage A), then its language model (stage B).

    OMP_NUM_THREADS=1 python -m lever_plus.mini.train_lvlm --out lever_plus/mini/weights/lvlm

Everything runs by steps and fixed seeds, on the CPU. The language model's loss falls on every answer of a
sequence of up to seven items, so it learns zero- to six-shot prompts at once.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from lever_plus.mini.episodes import EpisodeConfig, Item, episode
from lever_plus.mini.lvlm_model import IMAGE_TOKENS, build_model, image_processor, positions, save_folder
from lever_plus.mini.render import render_batch, rng_for
from lever_plus.mini.vocabulary import COLOR_NAMES, SHAPES, TYPES
from lever_plus.mini.wordpieces import qwen_tokenizer
from open_mmicl.arguments import Parser, whole
from open_mmicl.interface.prompts import Demo, Prompt, PromptFormat

PAIRS = len(SHAPES) * len(COLOR_NAMES)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of both stages; learning rates are peaks."""

    seed: int = 0
    renders: int = 40  # pictures of each (shape, color) pair
    vision_steps: int = 800
    vision_batch: int = 192
    vision_lr: float = 2e-3
    steps: int = 4000
    batch: int = 24
    lr: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.05
    log_every: int = 100
    save_at: tuple[int, ...] = (600, 1200, 2000, 3000)


class Log:
    """JSON lines to a file and to the screen."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.start = path, time.time()
        path.write_text("")

    def __call__(self, **row: object) -> None:
        row["seconds"] = round(time.time() - self.start, 1)
        line = json.dumps(row)
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def descend(
    loss: torch.Tensor,
    params: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """One step of the optimiser and its schedule, the gradient clipped at norm 1."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    schedule.step()


def pixels_of(shapes: np.ndarray, colors: np.ndarray, *keys: int | str) -> torch.Tensor:
    """Processed pictures [n, 16, 1176]; picture i is drawn from the stream ``(*keys, i)``."""
    images = render_batch(shapes, colors, *keys)
    values = image_processor()(images=images, return_tensors="pt")["pixel_values"]
    return values.reshape(len(images), 16, -1)


def visual_tokens(model: Qwen2_5_VLForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Merged visual tokens [n, 4, d] of pictures [n, 16, 1176]."""
    grid = torch.tensor([[1, 4, 4]]).expand(len(pixels), 3)
    merged = model.model.visual(pixels.reshape(-1, pixels.shape[-1]), grid_thw=grid).pooler_output
    return merged.reshape(len(pixels), IMAGE_TOKENS, -1)


def train_vision(model: Qwen2_5_VLForConditionalGeneration, config: TrainConfig, log: Log) -> torch.Tensor:
    """Stage A: linear shape and colour heads on the layer-normed tokens, then the eyes are frozen.

    Returns the cached visual tokens [24 * 8, renders, 4, d] of the training pictures.
    """
    shapes = np.repeat(np.arange(len(SHAPES)), len(COLOR_NAMES) * config.renders)
    colors = np.tile(np.repeat(np.arange(len(COLOR_NAMES)), config.renders), len(SHAPES))
    pixels = pixels_of(shapes, colors, "vision-train", config.seed)
    shape_ids, color_ids = torch.from_numpy(shapes), torch.from_numpy(colors)
    log(stage="vision", images=len(pixels))
    dim = model.config.vision_config.out_hidden_size
    heads = nn.ModuleList([nn.Linear(dim, len(SHAPES)), nn.Linear(dim, len(COLOR_NAMES))])
    params = [*model.model.visual.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr=config.vision_lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.vision_lr, total_steps=config.vision_steps)
    rng = rng_for("vision-batches", config.seed)

    def head_loss(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = F.layer_norm(visual_tokens(model, pixels[rows]), (dim,))
        shape_logits, color_logits = heads[0](tokens), heads[1](tokens)  # [b, 4, classes]
        loss = torch.zeros(())
        for logits, target, weight in ((shape_logits, shape_ids[rows], 1.0), (color_logits, color_ids[rows], 0.5)):
            each = F.cross_entropy(logits.flatten(0, 1), target.repeat_interleave(IMAGE_TOKENS))
            loss = loss + weight * (F.cross_entropy(logits.mean(1), target) + 0.3 * each)
        hit = (shape_logits.mean(1).argmax(1) == shape_ids[rows]).float().mean()
        return loss, hit

    for step in range(1, config.vision_steps + 1):
        rows = torch.from_numpy(rng.randint(len(pixels), size=config.vision_batch))
        loss, hit = head_loss(rows)
        descend(loss, params, optimizer, schedule)
        if step % config.log_every == 0:
            log(stage="vision", step=step, loss=round(loss.item(), 4), shape_train=round(hit.item(), 4))

    model.model.visual.requires_grad_(False)
    shapes, colors = np.arange(1536) % 24, np.arange(1536) // 24 % 8
    held_out = F.layer_norm(cache_tokens(model, pixels_of(shapes, colors, "vision-held-out", config.seed)), (dim,))
    with torch.no_grad():
        accuracy = [(head(held_out).mean(1).argmax(1) == torch.from_numpy(labels)).float().mean().item()
                    for head, labels in zip(heads, (shapes, colors), strict=True)]  # fmt: skip
    tokens = cache_tokens(model, pixels)
    rms = tokens.square().mean().sqrt().item()
    log(stage="vision", held_out_shape=round(accuracy[0], 4), held_out_color=round(accuracy[1], 4), rms=round(rms, 3))
    return tokens.reshape(PAIRS, config.renders, IMAGE_TOKENS, dim)


@torch.no_grad()
def cache_tokens(model: Qwen2_5_VLForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Visual tokens [n, 4, d] without gradients, in blocks."""
    return torch.cat([visual_tokens(model, block) for block in pixels.split(256)])


class Encoder:
    """Turns items into token ids with the model's own chat template, once per distinct piece of text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.format = PromptFormat()
        self.image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._asked: dict[str, list[int]] = {}
        self._answered: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        expanded = text.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)
        return self.tokenizer(expanded, add_special_tokens=False).input_ids

    def ask(self, question: str) -> list[int]:
        """Ids of the user turn up to and with ``assistant\\n``."""
        if question not in self._asked:
            messages = self.format.messages(Prompt((), "", question))
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            self._asked[question] = self._ids(text)
        return self._asked[question]

    def answer(self, answer: str) -> list[int]:
        """Ids of the answer, its end mark and the newline after it."""
        if answer not in self._answered:
            pair = Prompt((Demo("", "x", answer),), "", "x")
            text = self.tokenizer.apply_chat_template(self.format.messages(pair)[:2], tokenize=False)
            self._answered[answer] = self._ids(text.split("assistant\n", 1)[1])
        return self._answered[answer]

    def batch(self, episodes: list[list[Item]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Right-padded ids and labels [B, L]; labels are -100 outside of answers (and on wrong ones)."""
        rows: list[tuple[list[int], list[int]]] = []
        for items in episodes:
            ids: list[int] = []
            labels: list[int] = []
            for item in items:
                asked, said = self.ask(TYPES[item.kind].questions[item.paraphrase]), self.answer(item.answer)
                ids += asked + said
                labels += [-100] * len(asked) + (said[:-1] if not item.wrong else [-100] * (len(said) - 1)) + [-100]
            rows.append((ids, labels))
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (length - len(labels)) for _, labels in rows])
        return ids, labels


def answer_logits(
    model: Qwen2_5_VLForConditionalGeneration, ids: torch.Tensor, labels: torch.Tensor, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, V] and targets [n] at the labelled positions. ``features`` [pictures, 4, d] in prompt order."""
    image_token = model.config.image_token_id
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == image_token).unsqueeze(-1), features.to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=positions(ids, image_token), attention_mask=None, use_cache=False
    ).last_hidden_state
    targets = labels[:, 1:]
    chosen = targets != -100
    return model.lm_head(hidden[:, :-1][chosen]), targets[chosen]


def draw_batch(
    encoder: Encoder, cache: torch.Tensor, episodes: EpisodeConfig, step: int, batch: int, rng: np.random.RandomState
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[Item]]]:
    """One batch of episodes of equal item count: ids, labels, visual tokens, the items."""
    n_items = int(rng.randint(episodes.min_items, episodes.max_items + 1))
    drawn = [episode(episodes, step, n_items, rng) for _ in range(batch)]
    pairs = np.array([item.shape * len(COLOR_NAMES) + item.color for items in drawn for item in items])
    features = cache[torch.from_numpy(pairs), torch.from_numpy(rng.randint(cache.shape[1], size=len(pairs)))]
    return *encoder.batch(drawn), features, drawn


@torch.no_grad()
def copy_accuracy(
    model: Qwen2_5_VLForConditionalGeneration, encoder: Encoder, cache: torch.Tensor, batches: int = 8
) -> dict[str, float]:
    """Greedy accuracy of whole answers on fresh wide episodes, by kind of item (teacher-forced, all tokens)."""
    rng = rng_for("lm-check")
    config = EpisodeConfig(wide_start=1.0, wide_end=1.0, wrong=0.0)
    hits: dict[str, list[bool]] = {"copy": [], "compose": [], "zero_known": [], "zero_unknown": []}
    for _ in range(batches):
        ids, labels, features, drawn = draw_batch(encoder, cache, config, 0, 64, rng)
        logits, targets = answer_logits(model, ids, labels, features)
        right = iter((logits.argmax(-1) == targets).tolist())
        for item in (item for items in drawn for item in items):
            hit = all([next(right) for _ in encoder.answer(item.answer)[:-1]])
            compositional = TYPES[item.kind].compositional
            if all(item.shown) and compositional:
                hits["compose"].append(hit)
            elif item.shown[0] and not compositional and not item.known:
                hits["copy"].append(hit)
            elif not item.shown[0] and not compositional:
                hits["zero_known" if item.known else "zero_unknown"].append(hit)
    return {name: round(float(np.mean(values)), 4) for name, values in hits.items()}


def train_language(
    model: Qwen2_5_VLForConditionalGeneration,
    encoder: Encoder,
    cache: torch.Tensor,
    config: TrainConfig,
    log: Log,
    out: Path,
) -> None:
    """Stage B: AdamW with warm-up and cosine to 5 %, loss on every right answer of every episode."""
    episodes = EpisodeConfig()
    log(stage="language", **asdict(episodes))
    params = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in params if p.ndim >= 2]
    plain = [p for p in params if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    rng = rng_for("lm-batches", config.seed)
    recent: list[float] = []
    for step in range(1, config.steps + 1):
        ids, labels, features, _ = draw_batch(encoder, cache, episodes, step, config.batch, rng)
        logits, targets = answer_logits(model, ids, labels, features)
        loss = F.cross_entropy(logits, targets)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {step}")
        descend(loss, params, optimizer, schedule)
        recent.append(loss.item())
        if step % config.log_every == 0:
            checks = copy_accuracy(model, encoder, cache, 2 if step < config.steps else 16)
            log(stage="language", step=step, loss=round(float(np.mean(recent)), 4), **checks)
            recent.clear()
        if step in config.save_at or step == config.steps:
            save_folder(model, [encoder.tokenizer, image_processor()], out)
            log(stage="language", step=step, saved=True)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = Parser(prog="python -m lever_plus.mini.train_lvlm", description="Train the tiny LVLM.")
    parser.add_argument("--out", type=Path, required=True, help="folder to save to")
    parser.add_argument("--log", type=Path, help="JSON-lines log (OUT/../train_lvlm.jsonl)")
    parser.add_argument("--seed", type=int, default=0, help="initialisation, pictures, episodes (%(default)s)")
    parser.add_argument("--steps", type=whole(1), default=TrainConfig.steps, help="language steps (%(default)s)")
    parser.add_argument("--vision-steps", type=whole(1), default=TrainConfig.vision_steps, help="(%(default)s)")
    parser.add_argument("--renders", type=whole(1), default=TrainConfig.renders, help="pictures per pair (%(default)s)")
    args = parser.parse_args(argv)
    config = TrainConfig(seed=args.seed, steps=args.steps, vision_steps=args.vision_steps, renders=args.renders)
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)
    log = Log(args.log or args.out.parent / "train_lvlm.jsonl")
    tokenizer = qwen_tokenizer()
    model = build_model(tokenizer)
    size = sum(p.numel() for p in model.parameters())
    log(stage="start", parameters=size, vocabulary=len(tokenizer), **asdict(config))
    cache = train_vision(model, config, log)
    train_language(model, Encoder(tokenizer), cache, config, log, args.out)


if __name__ == "__main__":
    main()
