"""The training loop of v2, RCE and GRPO: epochs over padded groups, validation, checkpoints, resume.

Everything random in an epoch follows from (seed, phase, epoch), so a run that was cut off starts its epoch
again and ends with the same weights, bit for bit (one process).
"""

import hashlib
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from lever_plus import io
from lever_plus.best import UNCOMPARED
from lever_plus.cli import log
from lever_plus.rl import losses
from lever_plus.rl.deepspeed_engine import Engine, Processes
from lever_plus.rl.groups import Groups
from lever_plus.rl.objectives import Batch, Objective, Scores
from lever_plus.rl.runlog import RunLog, plain
from lever_plus.rl.validation import greedy_value, validation_metrics
from lever_plus.selectors.pointer import PointerSelector, native_checkpoint

EVALUATION_BATCH = 256  # queries per forward without gradients
ITEM_TABLE_LIMIT = 1 << 27  # floats of all items' encodings kept at once (512 MiB)


@dataclass
class Options:
    """How to train, whatever the phase."""

    batch_size: int = 32
    zero_stage: int = 0
    precision: str = "fp32"
    weight_decay: float = 0.01
    start_decay: float = 0.0  # towards the weights that a phase starts from
    grad_clip: float = 1.0
    seed: int = 42
    warmup_steps: int = 0
    patience: int = 0
    keep_checkpoints: int = 0
    dropout: float = 0.0
    val_tau: float = 0.5
    # what the held-out groups' greedy pointers (Q, S) are worth, as validation records (CHECKPOINT_METRIC=answers)
    own_picks: Callable[[Tensor], dict[str, float]] | None = None
    metric: str = "metric"  # the validation record by which checkpoints are compared, higher is better
    settings: dict[str, Any] = field(default_factory=dict)  # stored in every checkpoint
    provenance: dict[str, Any] = field(default_factory=dict)


class Refresh(Protocol):
    """What may replace a phase's training groups before an epoch (online GRPO)."""

    def __call__(self, epoch: int, policy: PointerSelector) -> Groups | None:
        """The groups from ``epoch`` on, where they change."""

    def prompts(self) -> int:
        """What it has cost so far, in LVLM prompts."""


@dataclass
class Phase:
    """One phase, and how it is trained."""

    name: str
    epochs: int
    lr: float
    objective: Objective
    reference: PointerSelector | None = None  # None: the policy that the phase begins with
    refresh: Refresh | None = None
    lr_schedule: str = "constant"


def epoch_generator(seed: int, phase: str, epoch: int) -> torch.Generator:
    """The random numbers of one epoch."""
    digest = hashlib.sha256(f"{seed}:{phase}:{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def lr_at(step: int, total: int, peak: float, schedule: str, warmup: int) -> float:
    """Learning rate of optimiser step ``step`` (from 0) of ``total``: linear warm-up, then the schedule."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return peak
    left = 1 - (step - warmup) / max(1, total - warmup)
    return peak * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


class Scored(NamedTuple):
    """A policy on groups: ``log_probs`` (Q, M); ``greedy`` pointers (Q, S) where asked for; ``within`` (Q, M), the
    log-probabilities on the tree of scored pointers (:func:`.losses.tree_log_probs`) where the policy may stop.
    """

    log_probs: Tensor
    greedy: Tensor | None = None
    within: Tensor | None = None

    @property
    def weighed(self) -> Tensor:
        """The log-probabilities of which q is made: ``within`` where the policy may stop."""
        return self.log_probs if self.within is None else self.within


@torch.no_grad()
def score_groups(selector: PointerSelector, groups: Groups, greedy: bool = False) -> Scored:
    """What a policy makes of all scored pointers."""
    batches = range(0, len(groups), EVALUATION_BATCH)
    items = None
    if groups.table.shape[0] * selector.config.hidden_dim * 2 <= ITEM_TABLE_LIMIT:
        items = selector.encode_items(groups.table)
    log_probs, picks, within = [], [], []
    for start in batches:
        part = groups.take(slice(start, start + EVALUATION_BATCH))
        embeddings, queries, pools, pointers, mask = part.inputs() if items is None else (None, *part.rows())
        enc = selector.encode_rows(selector.encode_items(embeddings) if items is None else items, queries, pools, mask)
        steps = selector.step_log_probs(enc, pointers)
        log_probs.append(selector.pointer_log_probs(steps, pointers))
        if selector.stops:
            within.append(losses.tree_log_probs(steps, pointers, part.mask))
        if greedy:
            picks.append(selector.greedy(enc, pointers.shape[2]))
    return Scored(*(torch.cat(parts) if parts else None for parts in (log_probs, picks, within)))


class Trainer:
    """Runs phases over training groups, with validation groups held out."""

    def __init__(self, folder: Path, processes: Processes, options: Options, train: Groups, val: Groups) -> None:
        self.folder, self.processes, self.options = Path(folder), processes, options
        self.train, self.val = train.to(processes.device), val.to(processes.device)
        self.state_folder = self.folder / "state"
        self.history: list[dict[str, Any]] = []

    # ---- the run ----------------------------------------------------------------------------------------------

    def run(self, selector: PointerSelector, phases: list[Phase]) -> list[dict[str, Any]]:
        """Train through the phases, from the last finished epoch where there is one; returns the epoch records.

        Raises:
            NumericError: a loss became non-finite. UsageError: the interrupted run cannot be resumed like this.
        """
        names = [phase.name for phase in phases]
        resumed = self._load_latest(names)
        told = self.options.settings.get("REPORT_TO", "tensorboard") if self.processes.first else "none"
        run_log = RunLog(self.folder, told, self.options.settings)
        done: dict[str, int] = {}
        for record in self.history:
            done[record["phase"]] = max(done.get(record["phase"], -1), record["epoch"])
        if self.processes.first:
            run_log.rewind(done, names)
        self.processes.barrier()
        for index, phase in enumerate(phases):
            if phase.epochs == 0:
                continue
            here = resumed["state"] if resumed and resumed["phase"] == phase.name else None
            if resumed and index < names.index(resumed["phase"]):
                continue
            if here is not None:
                log.info(f"{phase.name}: going on after epoch {here['epoch']}")
                selector.load_state_dict(here["model"], strict=True)
            resumed = None
            selector = self._run_phase(selector, phase, here, run_log)
        run_log.close()
        return self.history

    def _run_phase(
        self, selector: PointerSelector, phase: Phase, here: dict[str, Any] | None, run_log: RunLog
    ) -> PointerSelector:
        options, objective = self.options, phase.objective
        first_epoch = here["epoch"] + 1 if here else 1
        if here and (here["finished"] or first_epoch > phase.epochs):
            return selector
        reference = self._reference(selector, phase, here)
        engine = self._engine(selector, phase)
        if here:
            engine.load_optimiser_state(here["optimiser"])
            objective.load_state(here["objective"])
        groups = self.train
        ref_log_probs = self._begin(groups, reference, objective)
        run_log.start_phase()
        if not here:
            self._record(run_log, phase, 0, 0, self._validate(engine, phase, {}))
        for epoch in range(first_epoch, phase.epochs + 1):
            started = time.perf_counter()
            policy = engine.policy().eval()
            fresh = phase.refresh(epoch, policy) if phase.refresh else None
            if fresh is not None:
                groups = fresh.to(self.processes.device)
                ref_log_probs = self._begin(groups, reference, objective)
            objective.begin_epoch(score_groups(policy, groups)[0] if objective.wants_old else None)
            selector.train()
            means = self._epoch(engine, phase, epoch, groups, reference, ref_log_probs, run_log)
            objective.end_epoch(means)
            record = self._validate(engine, phase, means)
            seconds = time.perf_counter() - started
            record |= {"seconds": round(seconds, 3), "queries_per_s": round(len(groups) / seconds, 1)}
            steps = -(-len(groups) // options.batch_size)
            record = self._record(run_log, phase, epoch, epoch * steps, record)
            stop = self._out_of_patience(phase)
            self._save(engine, phase, epoch, record, reference, stop)
            if stop:
                log.info(
                    f"{phase.name}: no better validation for {options.patience} epochs, stopped after epoch {epoch}"
                )
                break
        self._compare_with_start(phase)
        weights = engine.state_dict()
        engine.close()
        trained = PointerSelector(selector.config)
        trained.load_state_dict(weights, strict=True)
        return trained

    def _reference(self, selector: PointerSelector, phase: Phase, here: dict[str, Any] | None) -> PointerSelector:
        """The policy that the KL is measured from, in evaluation mode; ``here``: the state that a run resumes from."""
        reference = PointerSelector(selector.config)
        source = phase.reference if phase.reference is not None else selector
        reference.load_state_dict(here["reference"] if here else source.state_dict(), strict=True)
        return reference.to(self.processes.device).eval()

    def _engine(self, selector: PointerSelector, phase: Phase) -> Engine:
        """DeepSpeed around the selector, which trains from now on."""
        options = self.options
        selector.set_dropout(options.dropout)
        selector.train()
        return Engine(
            selector, self.processes, lr=phase.lr, weight_decay=options.weight_decay, grad_clip=options.grad_clip,
            batch=options.batch_size, zero_stage=options.zero_stage, precision=options.precision,
            start_decay=options.start_decay,
        )  # fmt: skip

    @staticmethod
    def _begin(groups: Groups, reference: PointerSelector, objective: Objective) -> Tensor:
        """Give the objective its groups; returns the reference's log-probabilities (Q, M) of their pointers."""
        objective.begin(groups)
        scored = score_groups(reference, groups)
        return scored.weighed if objective.wants_tree else scored.log_probs

    def _epoch(
        self, engine: Engine, phase: Phase, epoch: int, groups: Groups, reference: PointerSelector,
        ref_log_probs: Tensor, run_log: RunLog,
    ) -> dict[str, float]:  # fmt: skip
        options, processes = self.options, self.processes
        generator = epoch_generator(options.seed, phase.name, epoch)
        torch.manual_seed(generator.initial_seed() + processes.rank)  # dropout
        order = torch.randperm(len(groups), generator=generator).to(processes.device)
        batches = order.split(options.batch_size)
        total = phase.epochs * len(batches)
        sums: dict[str, float] = {}
        bar = tqdm(
            batches, desc=f"{phase.name} {epoch}/{phase.epochs}", leave=False, disable=None if processes.first else True
        )
        for number, whole in enumerate(bar):
            step = (epoch - 1) * len(batches) + number
            rows = whole[processes.rank :: processes.world]
            idle = len(rows) == 0  # fewer queries than processes: this one repeats a query with weight 0
            rows = whole[:1] if idle else rows
            part = groups.take(rows)
            inputs = part.inputs()
            ref_steps = None
            if phase.objective.wants_ref_steps:
                with torch.no_grad():
                    ref_steps = reference(*inputs)[1]
            log_probs, steps = engine.module(*inputs)
            if phase.objective.wants_tree and reference.stops:
                log_probs = losses.tree_log_probs(steps, part.pointers, part.mask)
            batch = Batch(whole, rows, part, ref_log_probs[rows], ref_steps, step / max(1, total - 1))
            loss, metrics = phase.objective.loss(batch, Scores(log_probs, steps, reference.stops))
            share = self._share(part, groups.mask[whole], idle)
            lr = lr_at(step, total, phase.lr, phase.lr_schedule, options.warmup_steps)
            norm = engine.step(loss * share * processes.world, lr)
            metrics = {"loss": loss.detach(), **metrics, **self._group_metrics(part, steps, reference.stops)}
            record = self._mean_over_processes(metrics, share) | {"grad_norm": norm, "lr": lr}
            run_log.step({"phase": phase.name, "epoch": epoch, "step": step + 1, **record})
            for name, value in record.items():
                sums[name] = sums.get(name, 0.0) + value * len(whole)
        return {name: value / len(groups) for name, value in sums.items()}

    def _share(self, part: Groups, whole_mask: Tensor, idle: bool) -> float:
        """This process's share of the batch's non-empty groups: the weight of its mean loss."""
        if self.processes.world == 1:
            return 1.0
        counted = int(whole_mask.any(1).sum())
        return 0.0 if idle or counted == 0 else int(part.mask.any(1).sum()) / counted

    @staticmethod
    def _group_metrics(part: Groups, steps: Tensor, stop: bool) -> dict[str, Tensor]:
        with torch.no_grad():
            rewards = part.rewards[part.mask]
            return {
                "reward_mean": losses.mean_over_groups(part.rewards, part.mask),
                "reward_std": rewards.std() if rewards.numel() > 1 else torch.zeros(()),
                "zero_variance": losses.zero_variance(part.rewards, part.mask).float().mean(),
                "entropy": losses.step_entropy(steps, part.pointers, part.mask, stop),
            }

    def _mean_over_processes(self, metrics: dict[str, Tensor], share: float) -> dict[str, float]:
        values = torch.stack([torch.as_tensor(v, device=self.processes.device).float() for v in metrics.values()])
        if self.processes.world > 1:
            values = self.processes.sum(values * share)
        return dict(zip(metrics, values.tolist(), strict=True))

    # ---- validation -------------------------------------------------------------------------------------------

    def _validate(self, engine: Engine, phase: Phase, means: dict[str, float]) -> dict[str, float]:
        val = self.val
        if len(val) == 0:
            return means
        policy = engine.policy().eval()
        log_probs, greedy, within = score_groups(policy, val, greedy=True)
        tau = self.options.val_tau
        found = validation_metrics(log_probs, val.rewards, val.accuracy, val.mask, greedy, val.pointers, tau, within)
        if self.options.metric == "val_label_accuracy":
            found[self.options.metric] = greedy_value(greedy, val.pointers, val.accuracy, val.mask)
        if self.options.own_picks is not None:
            found |= self.options.own_picks(greedy)
        if self.options.metric != "metric":
            sign = -1.0 if self.options.metric.endswith("loss") else 1.0
            found["metric"] = sign * found[self.options.metric]
        return means | found

    def _record(self, run_log: RunLog, phase: Phase, epoch: int, step: int, values: dict[str, float]) -> dict[str, Any]:
        record = plain({"phase": phase.name, "epoch": epoch, "step": step, **values, **phase.objective.state()})
        self.history.append(record)
        if self.processes.first:
            run_log.epoch(record)
        return record

    def best(self, phase: str | None = None) -> dict[str, Any] | None:
        """The epoch record with the highest validation metric (the earlier one on a tie), of one phase or of all.

        With nothing held out it is the last: training losses say nothing of what is best, least of all across phases.
        """
        trained = [r for r in self.history if r["epoch"] > 0 and phase in (None, r["phase"])]
        if len(self.val) == 0:
            return trained[-1] if trained else None
        return max(trained, key=lambda r: r["metric"], default=None)

    def _out_of_patience(self, phase: Phase) -> bool:
        if not self.options.patience:
            return False
        best, last = self.best(phase.name), self.history[-1]
        return last["epoch"] - best["epoch"] >= self.options.patience

    def _compare_with_start(self, phase: Phase) -> None:
        start = next((r for r in self.history if r["phase"] == phase.name and r["epoch"] == 0), None)
        best = self.best(phase.name)
        if start and best and "metric" in start and "metric" in best and best["metric"] < start["metric"]:
            log.warning(
                f"{phase.name}: no epoch is better on validation than what the phase started from "
                f"({best['metric']:.4f} at best, {start['metric']:.4f} at the start)"
            )

    # ---- files ------------------------------------------------------------------------------------------------

    def _save(
        self,
        engine: Engine,
        phase: Phase,
        epoch: int,
        record: dict[str, Any],
        reference: PointerSelector,
        finished: bool,
    ) -> None:
        """Checkpoint, resumable state, then the pointer to it: a cut anywhere leaves the last epoch whole."""
        model = engine.state_dict()
        state = {
            "phase": phase.name, "epoch": epoch, "finished": finished, "model": model,
            "optimiser": engine.optimiser_state(), "objective": phase.objective.state(),
            "reference": {name: value.cpu() for name, value in reference.state_dict().items()},
        }  # fmt: skip
        rank = self.processes.rank
        io.save_torch(self.state_folder / f"{phase.name}_{epoch}.rank{rank}.pt", state)
        if self.processes.first:
            options = self.options
            content = native_checkpoint(
                reference.config, model, phase.name, epoch, record, options.settings, options.provenance
            )
            io.save_torch(self.checkpoint(phase.name, epoch), content)
        self.processes.barrier()
        if self.processes.first:
            latest = {"phase": phase.name, "epoch": epoch, "world": self.processes.world, "history": self.history}
            io.write_json(self.state_folder / "latest.json", latest)
            self._write_best()
            self._prune(phase, epoch)
        self.processes.barrier()

    def checkpoint(self, phase: str, epoch: int) -> Path:
        """Where an epoch's weights lie."""
        return self.folder / f"{phase}_epoch{epoch}.pt"

    def _write_best(self) -> None:
        def entry(record: dict[str, Any]) -> dict[str, Any]:
            name = self.checkpoint(record["phase"], record["epoch"]).name
            return {"file": name, "phase": record["phase"], "epoch": record["epoch"],
                    "metric": self.metric_name(record), "value": record.get("metric")}  # fmt: skip

        phases = list(dict.fromkeys(r["phase"] for r in self.history))
        best = {name: self.best(name) for name in phases}
        per_phase = {name: entry(record) for name, record in best.items() if record is not None}
        io.write_json(self.folder / "best.json", entry(self.best()) | {"per_phase": per_phase}, indent=1)

    def metric_name(self, record: dict[str, Any]) -> str:
        """What the validation metric of this run is."""
        if len(self.val) == 0:
            return UNCOMPARED
        if self.options.metric != "metric":
            return f"-{self.options.metric}" if self.options.metric.endswith("loss") else self.options.metric
        return "val_expected_accuracy" if "val_expected_accuracy" in record else "val_expected_reward"

    def _prune(self, phase: Phase, epoch: int) -> None:
        for path in self.state_folder.glob("*.rank*.pt"):
            if not path.name.startswith(f"{phase.name}_{epoch}."):
                path.unlink()
        keep = self.options.keep_checkpoints
        if keep:
            best = self.best(phase.name)["epoch"]
            for old in range(1, epoch - keep + 1):
                if old != best:
                    self.checkpoint(phase.name, old).unlink(missing_ok=True)

    def _load_latest(self, names: list[str]) -> dict[str, Any] | None:
        path = self.state_folder / "latest.json"
        if not path.is_file():
            return None
        latest = io.read_json(path, "training state")
        if latest["phase"] not in names:
            return None
        self.history = latest["history"]
        rank = self.processes.rank
        # Whole states (ZERO_STAGE=0) are alike on every process: any number of processes can resume from the first's.
        file = self.state_folder / f"{latest['phase']}_{latest['epoch']}.rank{rank if rank < latest['world'] else 0}.pt"
        return {"phase": latest["phase"], "state": io.load_torch(file, "training state")}

    def discard_state(self) -> None:
        """Remove what only a resumed run needs."""
        if self.processes.first:
            shutil.rmtree(self.state_folder, ignore_errors=True)
