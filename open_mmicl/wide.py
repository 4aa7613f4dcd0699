"""Products on CPUs, with 16-bit weights and with large fp32 ones.

Where the CPU has no 16-bit instructions torch multiplies 16-bit matrices an element at a time, five to eight times
slower than in fp32. Where it has them, oneDNN puts a weight into an order of its own before each product, a tenth of a
short product's time. In fp32 torch's own library is slow with a large weight and few rows: tiles of 16 and 128 rows
take oneDNN, with the weight in its order, six to eight tenths of a layer's time (benchmarks/products.py).
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

_HELD_BYTES = 2 << 30  # of fp32 copies of a module's weights
_ROWS = 256  # of a product, for which oneDNN's order is chosen
_LARGE = 1 << 19  # elements of a weight from which oneDNN multiplies its fp32 copy faster than torch
_LARGER = 1 << 21  # of an fp32 weight that is not in oneDNN's order
_FEW = 1024  # rows up to which that holds


def widens(weight: torch.Tensor) -> bool:
    """Whether products with this weight are better computed in fp32 and rounded once."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    kind = "bf16" if weight.dtype == torch.bfloat16 else "fp16"
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()


def packs(weight: torch.Tensor) -> bool:
    """Whether products with a 16-bit weight, or its fp32 copy, are oneDNN's, with the weight in an order of its own."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16) or not has_onednn():
        return False
    return weight.numel() >= _LARGE if widens(weight) else weight.dtype == torch.bfloat16


def has_onednn() -> bool:
    """Whether torch was built with oneDNN and has inductor's ways to it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``functional.linear`` without gradients: (…, k), (n, k), (n,) -> (…, n). Few fp32 rows and a large weight are
    oneDNN's on a CPU, up to 1.8 times as fast.
    """
    few = hidden.dtype == torch.float32 and 1 < hidden.shape[:-1].numel() <= _FEW
    if few and weight.numel() >= _LARGER and hidden.device.type == "cpu" and has_onednn():
        return by_onednn(hidden, weight, bias)
    return functional.linear(hidden, weight, bias)


def by_onednn(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(…, k), a weight (n, k) as it is or :func:`reordered`, (n,) or None -> (…, n).

    By inductor's own way; no public one leaves the other tensors as they are.
    """
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")


def reordered(weight: torch.Tensor) -> torch.Tensor:
    """A weight (n, k) in oneDNN's order."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def held(module: nn.Module) -> bool:
    """Whether copies of a module's weights are kept: not of a large model's."""
    return 4 * sum(weight.numel() for weight in module.parameters()) <= _HELD_BYTES


class Matrix:
    """A linear layer's weight (n, k) and bias (n,) or None.

    Where :func:`widens`, its fp32 copy multiplies and the product is rounded once, which is what an accumulator of 32
    bits gives. The copy is kept (``hold``) or made for each product, a few percent of a long product's time. Where it
    :func:`packs`, a copy in oneDNN's order is kept with ``hold``; the products' bits are the same.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, hold: bool = False):
        self.weight, self.bias, self.widens, self.packs = weight, bias, widens(weight), packs(weight)
        self._held: torch.Tensor | None = None
        if hold and (self.widens or self.packs):
            self._held = self._copy()

    def _copy(self) -> torch.Tensor:
        weight = self.weight.float() if self.widens else self.weight
        return reordered(weight) if self.packs else weight

    def rows(self, start: int, stop: int | None) -> "Matrix":
        """Part of the outputs, multiplied as the whole is; nothing is copied but what is packed, which has no parts."""
        part = Matrix(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])
        part.packs = self.packs
        if self._held is not None:
            part._held = part._copy() if self.packs else self._held[start:stop]
        return part

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, k) -> (…, n)."""
        weight, bias, dtype = self._held, self.bias, hidden.dtype
        if weight is None:
            weight = self.weight.float() if self.widens else self.weight
        if self.widens:
            hidden, bias = hidden.float(), None if bias is None else bias.float()
        multiply = by_onednn if self.packs else functional.linear
        return multiply(hidden, weight, bias).to(dtype)


class WideLinear(nn.Module):
    """An ``nn.Linear`` computed as :class:`Matrix`; reads the layer's own weights."""

    def __init__(self, linear: Any, hold: bool):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.matrix = Matrix(linear.weight.data, None if linear.bias is None else linear.bias.data, hold)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, k) -> (…, n)."""
        return self.matrix(hidden)


def widen(module: nn.Module) -> list[Matrix]:
    """Replace a module's linear layers where :func:`widens` says that fp32 is faster; returns what multiplies there."""
    hold, made = held(module), []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and widens(child.weight):
                setattr(parent, name, wider := WideLinear(child, hold))
                made.append(wider.matrix)
    return made
