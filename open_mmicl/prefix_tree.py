"""Which prompts of a batch begin alike, and in which groups they are computed. Pure planning, no tensors.

The plan depends only on the prompts it is given and on the budgets, never on what a cache holds: the same call is
always cut into the same forward passes, so a resumed run computes bit by bit what an uninterrupted one would have.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from open_mmicl.interface.qwen_vl import Piece

PASS_TOKENS = 250  # what a forward pass costs besides its tokens, in tokens
MIN_SAVED_TOKENS = 32  # a shared prefix that saves fewer costs more in bookkeeping than it gains


@dataclass(eq=False, slots=True)
class Node:
    """A prefix that several prompts share: ``pieces`` behind ``parent``'s. ``length``/``end_position`` count from the
    prompt's start; ``group`` is the forward pass that computes it. ``name``: nodes of one name have the same keys and
    values to the last bit, so those that are still held from an earlier plan can be used again.
    """

    parent: "Node | None"
    pieces: tuple[Piece, ...]
    level: int
    start_position: int
    n_before: int
    n_own: int
    group: int = -1
    name: bytes = b""

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
    prompts: Sequence[tuple[int, list[Piece], int]], token_budget: int, prefix_budget: int, grows: bool = False
) -> Plan:
    """Plan the forward passes of (index, pieces, extra tokens) triples.

    ``token_budget`` bounds rows × longest row of a pass; ``prefix_budget`` the tokens of all shared prefixes.
    ``grows``: later prompts will begin as these do, so all that stands before a query is a prefix, shared or not.
    """
    rows = sorted(prompts, key=lambda row: [piece.key for piece in row[1]])
    nodes: list[Node] = []
    leaves: list[Leaf] = []
    _Trie(nodes, leaves, prefix_budget, grows).grow(rows, 0, 0, None)
    plan = Plan()
    for level in sorted({node.level for node in nodes}):
        same = sorted((n for n in nodes if n.level == level), key=lambda n: (n.n_own, n.n_before))
        for members in fill(same, [n.n_own for n in same], token_budget):
            # The rounding of a row depends on the pass that it is part of, so a node is known by the whole pass.
            group = _digest(*(_digest(node.parent.name if node.parent else b"", _words(node)) for node in members))
            for i, node in enumerate(members):
                node.group, node.name = len(plan.groups), _digest(group, b"%d" % i)
            plan.groups.append(members)
    leaves.sort(key=lambda leaf: (leaf.n_own + leaf.extra, leaf.start[0]))
    plan.chunks = fill(leaves, [leaf.n_own + leaf.extra for leaf in leaves], token_budget)
    return plan


def plan_chains(prompts: Sequence[tuple[int, list[Piece], int]], token_budget: int) -> Plan:
    """Plan (index, pieces, extra tokens) triples piece by piece: each piece but the last is a node behind the last one.

    How a prompt is cut depends on nothing but the prompt. ``chunks`` hold about ``token_budget`` new tokens each,
    prompts that begin alike beside one another; there are no ``groups``, whoever runs the plan forms its passes.
    """
    rows = sorted(prompts, key=lambda row: [piece.key for piece in row[1]])
    plan, nodes, current, filled = Plan(), {}, [], 0
    for index, pieces, extra in rows:
        parent, new = None, pieces[-1].length + extra
        for piece in pieces[:-1]:
            name = _digest(parent.name if parent else b"", repr(piece.key).encode())
            node = nodes.get(name)
            if node is None:
                node = nodes[name] = chained(parent, piece, name)
                new += piece.length
            parent = node
        if current and filled + new > token_budget:
            plan.chunks.append(current)
            current, filled = [], 0
        current.append(Leaf(index, parent, (pieces[-1],), extra, pieces[-1].length))
        filled += new
    if current:
        plan.chunks.append(current)
    return plan


def chained(parent: Node | None, piece: Piece, name: bytes) -> Node:
    """A node of one piece."""
    before, position, level = (parent.length, parent.end_position, parent.level + 1) if parent else (0, 0, 0)
    return Node(parent, (piece,), level, position, before, piece.length, name=name)


def _words(node: Node) -> bytes:
    return repr([piece.key for piece in node.pieces]).encode()


def _digest(*parts: bytes) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(b"%d:" % len(part))
        found.update(part)
    return found.digest()


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


@dataclass(slots=True)
class _Trie:
    """Grows ``nodes`` and ``leaves``; ``left``: tokens that further nodes may hold."""

    nodes: list[Node]
    leaves: list[Leaf]
    left: int
    grows: bool

    def grow(self, rows: list, base: int, depth: int, parent: Node | None) -> None:
        """Split sorted rows, equal in their first ``depth`` pieces, by the next one; ``parent`` covers ``base``."""
        start = 0
        while start < len(rows):
            key, stop = _key(rows[start], depth), start + 1
            while stop < len(rows) and key is not None and _key(rows[stop], depth) == key:
                stop += 1
            self._branch(rows[start:stop], base, depth, parent)
            start = stop

    def _branch(self, group: list, base: int, depth: int, parent: Node | None) -> None:
        """One prompt, or several that are equal beyond ``depth``."""
        pieces = group[0][1]
        if len(group) == 1 and not (self.grows and len(pieces) - 1 > base):
            self._end(group[0], base, parent)
            return
        end = depth
        while (shared := _key(group[0], end)) is not None and all(_key(row, end) == shared for row in group):
            end += 1
        own = sum(piece.length for piece in pieces[base:end])
        pays = own * (len(group) - 1) >= MIN_SAVED_TOKENS or (self.grows and own > 0)
        if not pays or own > self.left:
            if len(group) == 1:
                self._end(group[0], base, parent)
            else:
                self.grow(group, base, end, parent)
            return
        self.left -= own
        before, position = (parent.length, parent.end_position) if parent else (0, 0)
        node = Node(parent, tuple(pieces[base:end]), parent.level + 1 if parent else 0, position, before, own)
        self.nodes.append(node)
        self.grow(group, end, end, node)

    def _end(self, row: tuple, base: int, parent: Node | None) -> None:
        index, pieces, extra = row
        rest = tuple(pieces[base:])
        self.leaves.append(Leaf(index, parent, rest, extra, sum(piece.length for piece in rest)))


def _key(row: tuple, depth: int) -> tuple | None:
    """Key of a row's piece at ``depth``; None for its last piece, which is never shared (its end is read)."""
    pieces = row[1]
    return pieces[depth].key if depth < len(pieces) - 1 else None


def fill(items: list, lengths: Sequence[int], token_budget: int) -> list[list]:
    """Cut a list sorted by length into the passes that cost least, each len(pass) × longest <= ``token_budget``.

    Rows are padded to the longest of their pass, so a pass costs its rows times that length, and ``PASS_TOKENS`` more
    for being one. The cheapest cut is found exactly: of all passes that may end with row i, the one with which rows
    0 … i cost least (a row that is longer than the budget has a pass of its own).
    """
    cost, begin = np.zeros(len(items) + 1), np.zeros(len(items), dtype=np.int64)
    for i, length in enumerate(lengths):
        low = min(i, max(0, i + 1 - token_budget // max(1, length)))
        starts = np.arange(low, i + 1)
        totals = cost[starts] + (i + 1 - starts) * length + PASS_TOKENS
        best = int(totals.argmin())
        cost[i + 1], begin[i] = totals[best], starts[best]
    found: list[list] = []
    stop = len(items)
    while stop:
        start = int(begin[stop - 1])
        found.append(items[start:stop])
        stop = start
    return found[::-1]
