"""Products with 16-bit weights on CPUs that have no 16-bit instructions.

There torch multiplies 16-bit matrices an element at a time, five to eight times slower than in fp32.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

_HELD_BYTES = 2 << 30  # of fp32 copies of a module's weights


def widens(weight: torch.Tensor) -> bool:
    """Whether products with this weight are better computed in fp32 and rounded once."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    kind = "bf16" if weight.dtype == torch.bfloat16 else "fp16"
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()


def held(module: nn.Module) -> bool:
    """Whether fp32 copies of a module's weights are kept: not of a large model's."""
    return 4 * sum(weight.numel() for weight in module.parameters()) <= _HELD_BYTES


class Matrix:
    """A linear layer's weight (n, k) and bias (n,) or None.

    Where :func:`widens`, its fp32 copy multiplies and the product is rounded once, which is what an accumulator of 32
    bits gives. The copy is kept (``hold``) or made for each product, a few percent of a long product's time.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, hold: bool = False):
        self.weight, self.bias, self.widens = weight, bias, widens(weight)
        self._wide = weight.float() if hold and self.widens else None

    def rows(self, start: int, stop: int | None) -> "Matrix":
        """Part of the outputs; nothing is copied."""
        part = object.__new__(Matrix)
        for name, value in vars(self).items():
            setattr(part, name, value[start:stop] if isinstance(value, torch.Tensor) else value)
        return part

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(…, k) -> (…, n)."""
        if not self.widens:
            return functional.linear(hidden, self.weight, self.bias)
        wide = self.weight.float() if self._wide is None else self._wide
        bias = None if self.bias is None else self.bias.float()
        return functional.linear(hidden.float(), wide, bias).to(hidden.dtype)


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
