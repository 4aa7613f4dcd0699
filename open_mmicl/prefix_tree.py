"""Which prompts of a batch begin alike, and in which groups they are computed. Pure planning, no tensors.

The plan depends only on the prompts it is given and on the budgets, never on what a cache holds: the same call is
always cut into the same forward passes, so a resumed run computes bit by bit what an uninterrupted one would have.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from open_mmicl.interface.qwen_vl import Piece

MIN_SAVED_TOKENS = 32  # a shared prefix that saves fewer costs more in bookkeeping than it gains


@dataclass(eq=False, slots=True)
class Node:
    """A prefix that several prompts share: ``pieces`` behind ``parent``'s. ``length``/``end_position`` count from the
    prompt's start; ``group`` is the forward pass that computes it.
    """

    parent: "Node | None"
    pieces: tuple[Piece, ...]
    level: int
    start_position: int
    n_before: int
    n_own: int
    group: int = -1

    @property
    def length(self) -> int:
        """Tokens from the prompt's start to the node's end."""
        return self.n_before + self.n_own

    @property
    def end_position(self) -> int:
        """Position counter behind the node."""
        return self.start_position + sum(piece.advance for piece in self.pieces)


@dataclass(eq=False, slots=True)
class Leaf:
    """What is left of prompt ``index`` behind its shared prefix; ``extra`` tokens (answers) follow it."""

    index: int
    node: Node | None
    pieces: tuple[Piece, ...]
    extra: int
    n_own: int

    @property
    def start(self) -> tuple[int, int]:
        """(tokens, position counter) before the leaf."""
        return (self.node.length, self.node.end_position) if self.node else (0, 0)


@dataclass(slots=True)
class Plan:
    """Forward passes of one window: ``groups`` of nodes (parents in earlier groups), then ``chunks`` of leaves."""

    groups: list[list[Node]] = field(default_factory=list)
    chunks: list[list[Leaf]] = field(default_factory=list)


def plan_window(
    prompts: Sequence[tuple[int, list[Piece], int]], token_budget: int, prefix_budget: int, share: bool = True
) -> Plan:
    """Plan the forward passes of (index, pieces, extra tokens) triples.

    ``token_budget`` bounds rows × longest row of a pass; ``prefix_budget`` the tokens of all shared prefixes.
    """
    # Sorted by their pieces, prompts that begin alike are neighbours: every shared prefix is a run of rows.
    rows = sorted(prompts, key=lambda row: [piece.key for piece in row[1]])
    nodes: list[Node] = []
    leaves: list[Leaf] = []
    left = [prefix_budget if share else 0]  # tokens; a list, so that all branches of the recursion draw on one budget
    _grow(rows, 0, 0, None, nodes, leaves, left)
    plan = Plan()
    # Level by level, so that a node's parent is always in an earlier group; within one, rows of like length pad least.
    for level in sorted({node.level for node in nodes}):
        same = sorted((n for n in nodes if n.level == level), key=lambda n: (n.n_own, n.n_before))
        for members in fill(same, [n.n_own for n in same], token_budget):
            for node in members:
                node.group = len(plan.groups)
            plan.groups.append(members)
    leaves.sort(key=lambda leaf: (leaf.n_own + leaf.extra, leaf.start[0]))
    plan.chunks = fill(leaves, [leaf.n_own + leaf.extra for leaf in leaves], token_budget)
    return plan


def windows(costs: Sequence[int], limit: int) -> list[range]:
    """Consecutive runs whose costs sum to at most ``limit`` (a single larger one stands alone)."""
    found, start, total = [], 0, 0
    for i, cost in enumerate(costs):
        if i > start and total + cost > limit:
            found.append(range(start, i))
            start, total = i, 0
        total += cost
    if costs:
        found.append(range(start, len(costs)))
    return found


def _grow(
    rows: list, base: int, depth: int, parent: Node | None, nodes: list[Node], leaves: list[Leaf], left: list[int]
) -> None:
    """Split sorted rows, equal in their first ``depth`` pieces, by the next one; ``parent`` covers ``base`` of them."""
    start = 0
    while start < len(rows):
        key, stop = _key(rows[start], depth), start + 1
        # Without a key (only the last piece is left) a row is a group of its own, even beside an equal one.
        while stop < len(rows) and key is not None and _key(rows[stop], depth) == key:
            stop += 1
        group = rows[start:stop]
        start = stop
        if len(group) == 1:
            index, pieces, extra = group[0]
            rest = tuple(pieces[base:])
            leaves.append(Leaf(index, parent, rest, extra, sum(piece.length for piece in rest)))
            continue
        # One node for all that the group shares, however many pieces: a chain of nodes would cost a pass for each.
        end = depth
        while (shared := _key(group[0], end)) is not None and all(_key(row, end) == shared for row in group):
            end += 1
        pieces = tuple(group[0][1][base:end])
        own = sum(piece.length for piece in pieces)
        # Not worth a node, or no room: the split continues behind it with ``base`` unmoved, so that a deeper node, or
        # each leaf, computes these pieces as part of its own.
        if own * (len(group) - 1) < MIN_SAVED_TOKENS or own > left[0]:
            _grow(group, base, end, parent, nodes, leaves, left)
            continue
        left[0] -= own
        before, position = (parent.length, parent.end_position) if parent else (0, 0)
        node = Node(parent, pieces, parent.level + 1 if parent else 0, position, before, own)
        nodes.append(node)
        _grow(group, end, end, node, nodes, leaves, left)


def _key(row: tuple, depth: int) -> tuple | None:
    """Key of a row's piece at ``depth``; None for its last piece, which is never shared (its end is read)."""
    pieces = row[1]
    return pieces[depth].key if depth < len(pieces) - 1 else None


def fill(items: list, lengths: list[int], token_budget: int) -> list[list]:
    """Cut a list sorted by length into runs with len(run) × longest <= ``token_budget`` (at least one each)."""
    found: list[list] = []
    current: list = []
    for item, length in zip(items, lengths, strict=True):
        if current and (len(current) + 1) * length > token_budget:
            found.append(current)
            current = []
        current.append(item)
    return [*found, current] if current else found
