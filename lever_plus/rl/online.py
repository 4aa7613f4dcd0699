"""On-policy rounds: fresh pointers from the current policy, answered by the LVLM, as new training groups."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from lever_plus import io
from lever_plus.cli import log
from lever_plus.data.rl_data import RlCandidate
from lever_plus.rl.deepspeed_engine import Processes
from lever_plus.rl.groups import Groups
from lever_plus.rl.trainer import EVALUATION_BATCH, epoch_generator
from lever_plus.selectors import PointerSelector
from lever_plus.selectors.policy import picks
from open_mmicl.errors import DamagedInputError


class Responder(Protocol):
    """Whatever answers pointers; the LVLM behind its answer cache in earnest."""

    @property
    def computed(self) -> int:
        """Answers that were not at hand and had to be computed, so far."""

    def answer(
        self, rows: Sequence[int], pools: Sequence[np.ndarray], pointers: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[dict[str, Any]]]:
        """Train rows [Q], pools [Q][K] of train rows, pointers [Q][M] of pool positions in pick order.

        Returns: [Q][M] dicts with ``vqa_correct``, ``vqa_acc_score``, ``vqa_gt_prob``, ``beam_score``, ….
        """


def answer_together(
    responder: Responder,
    processes: Processes,
    rows: Sequence[int],
    pools: Sequence[np.ndarray],
    lists: Sequence[Sequence[tuple[int, ...]]],
    what: str,
) -> list[dict[tuple[int, ...], dict[str, Any]]]:
    """{pointer: fields} of every query, by all processes together; each distinct pointer of a query is answered once.

    Arguments as of :meth:`Responder.answer`, alike on every process; ``what`` begins the line of the log.
    """
    distinct = [list(dict.fromkeys(group)) for group in lists]
    rank, world, before = processes.rank, processes.world, responder.computed
    mine = slice(rank, None, world)
    own = responder.answer(rows[mine], pools[mine], distinct[mine]) if rows[mine] else []
    parts = processes.gather((own, responder.computed - before))
    answered = [parts[i % world][0][i // world] for i in range(len(rows))]
    log.info(
        f"{what}: {sum(map(len, distinct))} distinct pointers of {len(rows)} queries, "
        f"{sum(new for _, new in parts)} new answers by the LVLM (the rest were in the answer cache)"
    )
    return [dict(zip(group, got, strict=True)) for group, got in zip(distinct, answered, strict=True)]


class OnlineRounds:
    """A phase's ``refresh``: every ``epochs_per_round`` epochs the training groups are sampled afresh.

    A round's groups are kept in a file until the next, so that an interrupted run resumes with the same
    ones. Each process has its share of the queries answered.
    """

    def __init__(
        self,
        groups: Groups,
        responder: Responder,
        reward_of: Callable[[RlCandidate, str], float],
        folder: Path,
        processes: Processes,
        *,
        samples: int,
        temperature: float,
        epochs_per_round: int,
        seed: int,
    ) -> None:
        """``groups``: the training groups, whose queries and pools are sampled from."""
        self.groups, self.responder, self.reward_of = groups, responder, reward_of
        self.folder, self.processes = Path(folder), processes
        self.samples, self.temperature, self.epochs_per_round, self.seed = samples, temperature, epochs_per_round, seed
        self._current = 0

    def __call__(self, epoch: int, policy: PointerSelector) -> Groups | None:
        """The groups of ``epoch``, where they are not those of the epoch before in this process."""
        number = 1 + (epoch - 1) // self.epochs_per_round
        if number == self._current:
            return None
        self._current = number
        path = self.folder / f"online_round{number}.pt"
        # A round that begins here is sampled again even where a file is left from a run cut off in this epoch.
        begins = (epoch - 1) % self.epochs_per_round == 0
        if begins:
            fresh = self._sample(policy, number)
            if self.processes.first:
                io.save_torch(path, fresh)
                for old in self.folder.glob("online_round*.pt"):
                    if old != path:
                        old.unlink()
        elif not path.is_file():
            raise DamagedInputError(f"{path} is gone: the round it belongs to cannot be resumed; remove {self.folder}")
        self.processes.barrier()
        return self._with(io.load_torch(path, "pointers of an online round"))

    def prompts(self) -> int:
        """Prompts of all rounds so far: what the LVLM was asked, each distinct pointer of a round once."""
        rounds = [io.load_torch(path, "an online round") for path in self.folder.glob("online_round*.pt")]
        return max((r["prompts"] for r in rounds), default=0)

    def _prompts_before(self, number: int) -> int:
        own = self.folder / f"online_round{number}.pt"
        return io.load_torch(own, "an online round")["prompts_before"] if own.is_file() else self.prompts()

    def _sample(self, policy: PointerSelector, number: int) -> dict[str, Any]:
        before = self._prompts_before(number)
        groups, shots = self.groups, self.groups.pointers.shape[2]
        generator = epoch_generator(self.seed, "online", number)
        device = groups.table.device
        parts = []
        for start in range(0, len(groups), EVALUATION_BATCH):
            part = groups.take(slice(start, start + EVALUATION_BATCH))
            query, pool = part.queries, part.table[part.pool_rows]  # (B, d), (B, K, d)
            mask = None if part.full_pools else part.pool_mask
            # Drawn on the CPU, so that a generator gives the same pointers on every device.
            sampler = policy.to("cpu")
            mask = None if mask is None else mask.cpu()
            drawn, _ = sampler.sample(query.cpu(), pool.cpu(), shots, self.samples, self.temperature, generator, mask)
            parts.append(drawn)
        policy.to(device)
        # The first process's draw holds for all: another machine's rounding might draw another pointer.
        pointers = self.processes.gather(torch.cat(parts))[0]  # (Q, n, S)
        lists = [[tuple(p) for p in picks(group)] for group in pointers]
        rows = groups.query_idx.tolist()
        pools = [groups.items[r[m]].cpu().numpy() for r, m in zip(groups.pool_rows, groups.pool_mask, strict=True)]
        found = answer_together(self.responder, self.processes, rows, pools, lists, f"online round {number}")
        answers = [[table[pointer] for pointer in group] for table, group in zip(found, lists, strict=True)]
        rewards = torch.zeros(pointers.shape[:2])
        accuracy = torch.zeros(pointers.shape[:2])
        for i, (row, group, got) in enumerate(zip(rows, lists, answers, strict=True)):
            for j, (pointer, fields) in enumerate(zip(group, got, strict=True)):
                candidate = RlCandidate(pointer, "online", **fields)
                rewards[i, j] = self.reward_of(candidate, f"online round {number}, query {row}")
                accuracy[i, j] = candidate.vqa_acc_score
        log.info(
            f"online round {number}: mean reward {rewards.mean():.4f}, mean accuracy {accuracy.mean():.4f} "
            f"over {rewards.numel()} fresh pointers"
        )
        asked = sum(len(set(group)) for group in lists)
        counts = {"prompts_before": before, "prompts": before + asked}
        return {"pointers": pointers, "rewards": rewards, "accuracy": accuracy, **counts}

    def _with(self, fresh: dict[str, Any]) -> Groups:
        everything = self.groups.take(slice(None))
        everything.pointers, everything.rewards = fresh["pointers"], fresh["rewards"]
        everything.accuracy = fresh["accuracy"]
        everything.mask = torch.ones(fresh["rewards"].shape, dtype=torch.bool)
        return everything.to(everything.table.device)
