"""Blocks of rows in which a product rounds alike: how a pass of any length is cut into them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Work = tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]  # a function of rows, and rows to try it on
_WORTH_FILLING = 0.75  # a block that is fuller than this is no dearer filled up than cut into smaller ones


@dataclass(frozen=True)
class Tiles:
    """Numbers of rows, ascending, that a product may take at a time; each gives a row the bits of ``base`` rows.

    Fewer than the smallest are filled up to it.
    """

    base: int
    sizes: tuple[int, ...]

    def cuts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(first row, last row + 1, rows of the product) of each block of ``start`` to ``stop``."""
        while start < stop:
            left = stop - start
            size = max((size for size in self.sizes if size <= left), default=self.sizes[0])
            larger = min((size for size in self.sizes if size > left), default=0)
            if larger and left >= _WORTH_FILLING * larger:
                size = larger
            yield start, min(start + size, stop), size
            start += size

    def padded(self, rows: int) -> int:
        """Rows of the products for ``rows``."""
        return sum(size for _, _, size in self.cuts(0, rows))


def find_tiles(base: int, others: Sequence[int], works: Sequence[Work]) -> Tiles:
    """The largest power of two up to ``base`` with which a row's place changes nothing, and those of ``others`` whose
    products have the same bits.

    Args:
        works: inputs are (rows, …) of random numbers, at least max(base, ``others``) rows.
    """
    while base > 1 and not all(_place_is_free(work, inputs, base) for work, inputs in works):
        base //= 2
    alike = [size for size in others if all(_alike(work, inputs, base, size) for work, inputs in works)]
    return Tiles(base, tuple(sorted({base, *alike})))


def _place_is_free(work: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], size: int) -> bool:
    """Whether rows that are moved within a block have the same bits as before."""
    block = [part[:size] for part in inputs]
    plain = work(*block)
    return all(
        torch.equal(work(*(part.roll(shift, 0) for part in block)), plain.roll(shift, 0))
        for shift in (1, size // 2 + 1)
    )


def _alike(work: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], base: int, size: int) -> bool:
    """Whether blocks of ``size`` rows have the bits of blocks of ``base``."""
    rows = max(base, size)
    found = [
        torch.cat([work(*block) for block in zip(*(part[:rows].split(n) for part in inputs), strict=True)])
        for n in (base, size)
    ]
    return torch.equal(*found)
