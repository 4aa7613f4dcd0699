"""Train the tiny CLIP of the embedded benchmark from nothing.

    OMP_NUM_THREADS=1 python -m lever_plus.mini.train_clip --out lever_plus/mini/weights/clip

Stage 1: pictures against captions (contrastive), with a shape classifier on the side: captions always name the
colour, and without the classifier colour is all that is learnt. Stage 2: the text tower learns the questions
(paraphrases together, types apart) and **stops at a chosen distance between types**. That distance is a
difficulty setting: too far apart, and raw cosine already finds the match; too near, and the type cannot be seen.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lever_plus.mini.lvlm_model import save_folder
from lever_plus.mini.render import SIZE, render_batch, rng_for
from lever_plus.mini.train_lvlm import Log, descend
from lever_plus.mini.vocabulary import COLOR_NAMES, SHAPES, TYPES
from lever_plus.mini.wordpieces import clip_tokenizer
from open_mmicl.arguments import Parser, whole

CAPTIONS = ("a photo of a {color} {shape}", "a {color} {shape}", "a picture of the {color} {shape}")


@dataclass(frozen=True)
class ClipTrainConfig:
    """Settings; cosines in [-1, 1]."""

    seed: int = 0
    renders: int = 40  # pictures of each (shape, color) pair
    steps: int = 900
    batch: int = 128
    lr: float = 1e-3
    shape_weight: float = 0.7
    question_lr: float = 1e-4
    question_temperature: float = 0.3
    question_gap: float = 0.35  # stage 2 stops when (cosine within a type) - (cosine across types) reaches this
    question_max_steps: int = 500


def image_processor() -> CLIPImageProcessorPil:
    """Leaves a 56 x 56 picture at its size."""
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A randomly initialised CLIP of about 0.4 M parameters (call ``torch.manual_seed`` first)."""
    tower = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length, **tower, **ids}
    vision = {"image_size": SIZE, "patch_size": 14, **tower}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def embed_texts(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Unit embeddings [n, d] of texts."""
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    features = model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    return F.normalize(features.pooler_output, dim=-1)


def embed_pixels(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """Unit embeddings [n, d] of processed pictures [n, 3, 56, 56]."""
    return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)


def train_pairs(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, config: ClipTrainConfig, log: Log) -> None:
    """Stage 1. Every batch holds each (shape, color) pair at most once, so there are no false negatives."""
    n_pairs = len(SHAPES) * len(COLOR_NAMES)
    pairs = np.repeat(np.arange(n_pairs), config.renders)
    images = render_batch(pairs // len(COLOR_NAMES), pairs % len(COLOR_NAMES), "clip-train", config.seed)
    pixels = image_processor()(images=images, return_tensors="pt")["pixel_values"]
    pixels = pixels.reshape(n_pairs, config.renders, *pixels.shape[1:])
    head = nn.Linear(model.config.projection_dim, len(SHAPES))
    params = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, lr=config.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps)
    rng = rng_for("clip-batches", config.seed)
    for step in range(1, config.steps + 1):
        chosen = rng.permutation(n_pairs)[: config.batch]
        shapes, colors = chosen // len(COLOR_NAMES), chosen % len(COLOR_NAMES)
        texts = [
            CAPTIONS[rng.randint(len(CAPTIONS))].format(color=COLOR_NAMES[color], shape=SHAPES[shape].replace("_", " "))
            for shape, color in zip(shapes, colors, strict=True)
        ]
        image = embed_pixels(model, pixels[chosen, rng.randint(config.renders, size=len(chosen))])
        logits = model.logit_scale.exp().clamp(max=100) * image @ embed_texts(model, tokenizer, texts).T
        target, shape_ids = torch.arange(len(chosen)), torch.from_numpy(shapes)
        shape_logits = head(image) * 10
        contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss = contrast + config.shape_weight * F.cross_entropy(shape_logits, shape_ids)
        descend(loss, params, optimizer, schedule)
        if step % 50 == 0 or step == config.steps:
            hit = (logits.argmax(1) == target).float().mean().item()
            shape_hit = (shape_logits.argmax(1) == shape_ids).float().mean().item()
            rates = {"loss": loss.item(), "retrieved": hit, "shape": shape_hit}
            log(stage="pairs", step=step, **{name: round(value, 4) for name, value in rates.items()})


def question_cosines(model: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """All questions' unit embeddings [24, d] and their types [24]."""
    texts = [question for kind in TYPES for question in kind.questions]
    return embed_texts(model, tokenizer, texts), torch.arange(len(TYPES)).repeat_interleave(3)


def train_questions(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, config: ClipTrainConfig, log: Log) -> None:
    """Stage 2: supervised contrast of paraphrases on the text tower only, until types are far enough apart."""
    params = [*model.text_model.parameters(), *model.text_projection.parameters()]
    optimizer = torch.optim.AdamW(params, lr=config.question_lr, weight_decay=0.0)
    for step in range(config.question_max_steps + 1):
        embeddings, kinds = question_cosines(model, tokenizer)
        cosine = embeddings @ embeddings.T
        same = kinds[:, None] == kinds[None, :]
        others = ~torch.eye(len(kinds), dtype=torch.bool)
        across = cosine[~same].mean().item()
        within = cosine[same & others].mean().item()
        log(stage="questions", step=step, across_types=round(across, 4), within_type=round(within, 4))
        if within - across >= config.question_gap:
            return
        logits = (cosine / config.question_temperature).masked_fill(~others, -torch.inf)
        log_probs = logits.log_softmax(1)
        loss = -log_probs[same & others].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise RuntimeError(f"the gap stayed below {config.question_gap} after {config.question_max_steps} steps")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = Parser(prog="python -m lever_plus.mini.train_clip", description="Train the tiny CLIP.")
    parser.add_argument("--out", type=Path, required=True, help="folder to save to")
    parser.add_argument("--log", type=Path, help="JSON-lines log (OUT/../train_clip.jsonl)")
    parser.add_argument("--seed", type=int, default=0, help="initialisation, pictures, batches (%(default)s)")
    parser.add_argument("--steps", type=whole(1), default=ClipTrainConfig.steps, help="steps of stage 1 (%(default)s)")
    gap = ClipTrainConfig.question_gap
    parser.add_argument("--question-gap", type=float, default=gap, help="difficulty of the benchmark (%(default)s)")
    args = parser.parse_args(argv)
    config = ClipTrainConfig(seed=args.seed, steps=args.steps, question_gap=args.question_gap)
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)
    log = Log(args.log or args.out.parent / "train_clip.jsonl")
    tokenizer = clip_tokenizer()
    model = build_model(tokenizer)
    log(stage="start", parameters=sum(p.numel() for p in model.parameters()), **asdict(config))
    train_pairs(model, tokenizer, config, log)
    train_questions(model, tokenizer, config, log)
    save_folder(model, [tokenizer, image_processor()], args.out)
    log(stage="end", saved=True)


if __name__ == "__main__":
    main()
