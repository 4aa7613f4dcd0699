"""Products with 16-bit weights on CPUs.

Where the CPU has no 16-bit instructions torch multiplies 16-bit matrices an element at a time, five to eight times
slower than in fp32. Where it has them, oneDNN puts a weight into an order of its own before each product, a tenth of a
short product's time.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

_HELD_BYTES = 2 << 30  # of fp32 copies of a module's weights
_ROWS = 256  # of a product, for which oneDNN's order is chosen


def widens(weight: torch.Tensor) -> bool:
    """Whether products with this weight are better computed in fp32 and rounded once."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    kind = "bf16" if weight.dtype == torch.bfloat16 else "fp16"
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()


def packs(weight: torch.Tensor) -> bool:
    """Whether oneDNN multiplies with this weight in an order of its own, which can be kept."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not widens(weight) and there


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
        self.weight, self.bias, self.widens = weight, bias, widens(weight)
        self._wide = weight.float() if hold and self.widens else None
        self._packed = _packed(weight) if hold and packs(weight) else None

    def rows(self, start: int, stop: int | None) -> "Matrix":
        """Part of the outputs; nothing is copied but what is packed, which has no parts."""
        part = Matrix(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])
        part._wide = None if self._wide is None else self._wide[start:stop]
        part._packed = None if self._packed is None else _packed(part.weight)
        return part

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, k) -> (…, n)."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(hidden, self._packed, self.bias, "none", [], "")
        if not self.widens:
            return functional.linear(hidden, self.weight, self.bias)
        wide = self.weight.float() if self._wide is None else self._wide
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(hidden.float(), wide, bias).to(hidden.dtype)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    """A weight (n, k) in oneDNN's order, by inductor's own way; no public one leaves the other tensors as they are."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


class WideLinear(nn.Module):
    """An ``nn.Linear`` computed as :class:`Matrix`; reads the layer's own weights."""

    def __init__(self, linear: Any, hold: bool):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._matrix = Matrix(linear.weight.data, None if linear.bias is None else linear.bias.data, hold)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, k) -> (…, n)."""
        return self._matrix(hidden)


def widen(module: nn.Module) -> None:
    """Replace a module's linear layers where :func:`widens` says that fp32 is faster."""
    hold = held(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and widens(child.weight):
                setattr(parent, name, WideLinear(child, hold))
