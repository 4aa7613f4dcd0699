"""What a policy's own picks are worth on held-out queries, by the LVLM's answers: CHECKPOINT_METRIC=answers."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from lever_plus.rl.deepspeed_engine import Processes
from lever_plus.rl.groups import Groups
from lever_plus.rl.online import Responder, answer_together
from lever_plus.selectors.policy import picks

ACCURACY, PROMPTS = "val_answer_accuracy", "val_answer_prompts"


class OwnPicks:
    """Has the greedy pointers of the held-out queries answered; the answer cache keeps what epochs have in common."""

    def __init__(self, groups: Groups, responder: Responder, processes: Processes, stop: bool) -> None:
        """``groups``: the held-out ones; ``stop``: the policy decides how many it picks, so only that many count."""
        self.responder, self.processes, self.stop = responder, processes, stop
        rows = groups.query_idx.tolist()
        first: dict[int, int] = {}
        for i, row in enumerate(rows):  # without STOP a query has a group for each length
            first.setdefault(row, i)
        self._first = list(first.values())
        self._rows = [rows[i] for i in self._first]
        pools = ((groups.pool_rows[i], groups.pool_mask[i]) for i in self._first)
        self._pools = [groups.items[there[mask]].cpu().numpy() for there, mask in pools]

    def __call__(self, greedy: Tensor) -> dict[str, float]:
        """Mean official accuracy (0..1) over queries and numbers of demonstrations, and the prompts it took.

        ``greedy`` (Q, S): pool positions in pick order, -1 after a pointer's end. A policy without STOP is asked for
        1 to S demonstrations, as an evaluation asks it.
        """
        chosen = [tuple(p) for p in picks(greedy[self._first])]
        lists = [_lengths(pointer, self.stop) for pointer in chosen]
        answered = answer_together(self.responder, self.processes, self._rows, self._pools, lists, "held-out picks")
        values = [np.mean([table[p]["vqa_acc_score"] for p in own]) for table, own in zip(answered, lists, strict=True)]
        return {ACCURACY: float(np.mean(values)), PROMPTS: float(sum(map(len, lists)))}


def _lengths(pointer: Sequence[int], stop: bool) -> list[tuple[int, ...]]:
    return [tuple(pointer)] if stop else [tuple(pointer[:k]) for k in range(1, len(pointer) + 1)]
