"""v2 with LoRA: CLIP's attention (LoRA, peft) and the selector trained together, from images and questions.

V2_MODE=lora of lever_plus.stages.train_v2. Writes <v2 checkpoint>_lora.ckpt and, beside it, the folder …_lora_clip:
CLIP with the LoRA matrices merged in. METHODS=v2_lora evaluates it (the pipeline makes its embeddings beside the
standard ones); to start v3 from it, set CLIP_PATH to that folder and SFT_CKPT to the checkpoint.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lever_plus import io, paths, provenance
from lever_plus.cli import log
from lever_plus.config import as_dict
from lever_plus.data import channel_names
from lever_plus.data.beam_data import BeamData, BeamQuery
from lever_plus.data.clip_features import load_pretrained
from lever_plus.data.dataset import load_split, split_by_image
from lever_plus.rl import losses, reporters
from lever_plus.rl.deepspeed_engine import Engine, Processes, start_processes
from lever_plus.rl.trainer import epoch_generator
from lever_plus.selectors import PointerSelector, SelectorConfig
from lever_plus.selectors.lora import ItemReader, LoraSelector
from lever_plus.selectors.pointer import native_checkpoint
from lever_plus.settings.selector import TrainV2Settings
from lever_plus.stages import launch, training_inputs
from lever_plus.stages.export_embeddings import clip_path
from open_mmicl.lazy import lazy

transformers = lazy("transformers")


def output_paths(settings: TrainV2Settings) -> tuple[Path, Path]:
    """(selector, folder of the adapted CLIP)."""
    return paths.v2_checkpoint(settings, "v2_lora"), paths.lora_clip(settings)


def narrow(query: BeamQuery, size: int, generator: torch.Generator | None) -> tuple[np.ndarray, list[list[int]]]:
    """A smaller pool: the beams' candidates and random others, and the pointers as positions in it.

    A softmax over 64 candidates would cost 64 images per anchor and step; a sample of them, the beams' own
    always among them, gives the same ranking to learn. ``generator`` None: the whole pool.
    """
    if generator is None or size >= len(query.pool_ids):
        return query.pool_ids, [list(p) for p in query.pointers]
    own = sorted({position for pointer in query.pointers for position in pointer})
    others = [i for i in torch.randperm(len(query.pool_ids), generator=generator).tolist() if i not in own]
    kept = own + others[: max(0, size - len(own))]
    place = {position: i for i, position in enumerate(kept)}
    return query.pool_ids[kept], [[place[i] for i in pointer] for pointer in query.pointers]


def collate(
    queries: list[BeamQuery], reader: ItemReader, size: int, generator: torch.Generator | None, shots: int = 0
) -> dict[str, Any]:
    """One batch: CLIP's inputs of its distinct items, rows into them, pointers, scores and masks.

    ``shots``: the most picks of a pointer of all batches (one with fewer ends with a STOP); 0: of this batch.
    """
    narrowed = [narrow(query, size, generator) for query in queries]
    width = max(len(ids) for ids, _ in narrowed)
    beams = max(len(query.pointers) for query in queries)
    picks = shots or max(len(p) for query in queries for p in query.pointers)
    pool = np.zeros((len(queries), width), dtype=np.int64)
    pool_mask = torch.zeros(len(queries), width, dtype=torch.bool)
    pointers = torch.full((len(queries), beams, picks), -1)
    scores, mask = torch.zeros(len(queries), beams), torch.zeros(len(queries), beams, dtype=torch.bool)
    for i, (query, (ids, own)) in enumerate(zip(queries, narrowed, strict=True)):
        pool[i, : len(ids)], pool[i, len(ids) :] = ids, query.query_idx
        pool_mask[i, : len(ids)] = True
        for j, (pointer, score) in enumerate(zip(own, query.scores, strict=True)):
            pointers[i, j, : len(pointer)] = torch.tensor(pointer, dtype=torch.long)
            scores[i, j], mask[i, j] = score, True
    everything = np.concatenate([[query.query_idx for query in queries], pool.ravel()])
    rows, inverse = np.unique(everything, return_inverse=True)
    places = torch.from_numpy(inverse).to(reader.device)
    device = reader.device
    return {
        "inputs": (
            reader.read(rows.tolist()), places[: len(queries)], places[len(queries) :].view(pool.shape),
            pointers.to(device), pool_mask.to(device),
        ),
        "scores": scores.to(device), "mask": mask.to(device),
    }  # fmt: skip


class LoraTraining:
    """The loop: epochs, held-out loss, state after each epoch, the best epoch's weights."""

    def __init__(
        self, settings: TrainV2Settings, work: Path, processes: Processes, reader: ItemReader, shots: int = 0
    ) -> None:
        self.settings, self.work, self.processes, self.reader, self.shots = settings, work, processes, reader, shots

    def run(self, model: LoraSelector, train: list[BeamQuery], val: list[BeamQuery]) -> tuple[dict, list[dict]]:
        """Returns (the trained weights of the best epoch, the epoch records).

        Raises:
            NumericError: the loss became non-finite.
        """
        s, processes = self.settings, self.processes
        precision = "fp32" if s.precision == "auto" else s.precision
        state = self._load_state()
        if state:
            model.load_state_dict(state["model"], strict=False)  # the frozen weights are CLIP's own
        trained = Engine(
            model, processes, lr=s.v2_lr, weight_decay=s.weight_decay, grad_clip=s.grad_clip, batch=s.v2_batch_size,
            zero_stage=s.zero_stage, precision=precision,
        )  # fmt: skip
        records, best = [], {}
        if state:
            trained.load_optimiser_state(state["optimiser"])
            records, best = json.loads(state["records"]), state["best"]
            log.info(f"v2 lora: going on after epoch {len(records)}")
        for epoch in range(len(records) + 1, s.v2_epochs + 1):
            if s.v2_patience and records and len(records) - _best(records)["epoch"] >= s.v2_patience:
                break
            loss = self._epoch(trained, train, epoch)
            record = {
                "phase": "v2",
                "epoch": epoch,
                "loss": loss,
                "val_rce_loss": self._held_out(trained, val) if val else None,
            }
            records.append(record)
            log.info(f"v2 lora: epoch {epoch}  loss {loss:.4f}  {_told(record)}")
            weights = trained.state_dict(trained_only=True)
            best = weights if _best(records) is record else best
            content = {
                "model": weights,
                "optimiser": trained.optimiser_state(),
                "best": best,
                "records": json.dumps(records),
            }
            io.save_torch(self._state_file(epoch), content)
            processes.barrier()
            self._state_file(epoch - 1).unlink(missing_ok=True)
        trained.close()
        return best, records

    def _state_file(self, epoch: int) -> Path:
        """Where this process keeps its state after an epoch; the last one's stays until all have saved the next."""
        return self.work / f"state_{epoch}.rank{self.processes.rank}.pt"

    def _load_state(self) -> dict | None:
        """The state after the last epoch that every process has saved; None: there is none."""
        mine = {epoch for epoch in range(1, self.settings.v2_epochs + 1) if self._state_file(epoch).is_file()}
        common = set.intersection(*self.processes.gather(mine))
        return io.load_torch(self._state_file(max(common)), "training state") if common else None

    def _epoch(self, trained: Engine, train: list[BeamQuery], epoch: int) -> float:
        s, processes = self.settings, self.processes
        generator = epoch_generator(s.seed, "v2_lora", epoch)
        torch.manual_seed(generator.initial_seed() + processes.rank)
        trained.module.train()
        total, batches = 0.0, torch.randperm(len(train), generator=generator).split(s.v2_batch_size)
        for number, whole in enumerate(tqdm(batches, desc=f"v2 lora {epoch}", leave=False, disable=None)):
            own = whole[processes.rank :: processes.world]
            share = len(own) / len(whole)
            own = own if len(own) else whole[:1]
            pools = epoch_generator(s.seed, f"v2_lora_pools_{number}_{processes.rank}", epoch)
            batch = collate([train[i] for i in own.tolist()], self.reader, s.lora_pool, pools, self.shots)
            log_probs, _ = trained.module(*batch["inputs"])
            loss = losses.rce_loss(log_probs, batch["scores"], batch["mask"], s.v2_beam_tau)
            trained.step(loss * share * processes.world, s.v2_lr)
            total += float(processes.sum(loss.detach() * share)) * len(whole)
        return total / len(train)

    @torch.no_grad()
    def _held_out(self, trained: Engine, val: list[BeamQuery]) -> float:
        """Loss over whole pools; every process computes it (ZeRO-3 needs all of them in the forward)."""
        trained.module.eval()
        total = 0.0
        for start in range(0, len(val), self.settings.v2_batch_size):
            part = val[start : start + self.settings.v2_batch_size]
            batch = collate(part, self.reader, 0, None, self.shots)
            log_probs, _ = trained.module(*batch["inputs"])
            loss = losses.rce_loss(log_probs, batch["scores"], batch["mask"], self.settings.v2_beam_tau)
            total += float(loss) * len(part)
        return total / len(val)


def _best(records: list[dict]) -> dict:
    """The epoch of the lowest held-out loss; with nothing held out the last."""
    return records[-1] if records[-1]["val_rce_loss"] is None else min(records, key=lambda r: r["val_rce_loss"])


def _told(record: dict) -> str:
    value = record["val_rce_loss"]
    return "nothing held out, the last epoch is taken" if value is None else f"val_rce_loss {value:.4f}"


def train(settings: TrainV2Settings, made_from: provenance.Recipe, beams: BeamData) -> int:
    """Train in this process (one of those of the process group)."""
    started = time.perf_counter()
    output, clip_folder = output_paths(settings)
    work = output.with_name(output.name + ".work")
    state = launch.agreed_state(work, made_from, settings)
    processes = start_processes(launch.device_of(settings, threads=None))
    launch.prepare_work(work, made_from, state, settings, processes)
    split, model_path = load_split(paths.dataset(settings), "train"), clip_path(settings)
    clip = load_pretrained(transformers.CLIPModel, model_path)
    reader = ItemReader(split, model_path, clip.config.text_config.max_position_embeddings, processes.device)
    s = settings
    word = channel_names.item_word(s.embedding)
    both = s.lever_lm == "query_img_text_icd_img_text" and word == "concat"
    torch.manual_seed(s.seed)
    shape = training_inputs.shape_of(s) | {"dropout": s.v2_dropout}
    shape |= {"stop_shots": beams.max_shot or 0} if s.stop else {}
    config = SelectorConfig(input_dim=clip.config.projection_dim * (2 if both else 1), **shape)
    model = LoraSelector(clip, PointerSelector(config, s.init), s.lora_rank, s.lora_alpha, word, s.lever_lm)
    by_row = {q.query_idx: q for q in beams.queries}
    images = training_inputs.image_ids(dataclasses.replace(s, query_emb_path=""), len(split))[0]
    train_rows, val_rows = split_by_image(list(by_row), images, s.val_fraction, s.data_seed)
    parts = [by_row[int(row)] for row in train_rows], [by_row[int(row)] for row in val_rows]
    count = sum(p.numel() for p in model.trained().values())
    log.info(
        f"v2 lora: {len(parts[0])} anchors, {len(parts[1])} held out by image; {count} weights train; CLIP {model_path}"
    )
    best, records = LoraTraining(s, work, processes, reader, beams.max_shot or 0).run(model, *parts)
    if processes.first:
        # A fresh CLIP takes the best weights: under ZeRO the trained module's are partitioned or cast.
        merged = LoraSelector(
            load_pretrained(transformers.CLIPModel, model_path),
            PointerSelector(config),
            s.lora_rank,
            s.lora_alpha,
            word,
            s.lever_lm,
        )
        merged.load_state_dict(best, strict=False)
        selector_state = {name: value.clone() for name, value in merged.selector.state_dict().items()}
        record = _best(records)
        origin = {**provenance.provenance(), "clip": str(clip_folder)}
        content = native_checkpoint(config, selector_state, "v2", record["epoch"], record, as_dict(s), origin)
        provenance.begin(output)
        merged.merged_clip().save_pretrained(clip_folder)
        reader.save_beside(clip_folder)
        io.save_torch(output, content)
        provenance.stamp(output, made_from, time.perf_counter() - started, {"records": records})
        for tracker in reporters.start(s.report_to, work, s.exp_name or output.stem, as_dict(s)):
            for one in records:
                tracker.log(reporters.scalars(one), one["epoch"])
            tracker.close()
        launch.keep_curves(work, output)
        log.info(f"v2 lora: epoch {record['epoch']} is taken ({_told(record)}): {output}")
        log.info("to evaluate it: METHODS=v2_lora, or the version v2_lora of bash scripts/inference.sh")
    launch.remove_work(work, processes)
    return 0
