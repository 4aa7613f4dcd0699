"""Training through DeepSpeed: process group, ZeRO engine, optimiser step, resumable state.

What was measured about DeepSpeed on the CPU (no shared-memory op, no accelerate, plain AdamW) is in
docs/training.md. Only this module knows DeepSpeed.
"""

import atexit
import contextlib
import json
import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lever_plus import config, meeting, ranks
from lever_plus.selectors.pointer import PointerSelector
from open_mmicl.errors import NumericError, UsageError
from open_mmicl.lazy import lazy
from open_mmicl.memory import keep_freed

all_ops = lazy("deepspeed.ops.op_builder.all_ops")
deepspeed = lazy("deepspeed")
utils = lazy("deepspeed.utils")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every process, in order of rank, on every process."""
        if self.world == 1:
            return [value]
        return meeting.gathered(value, self.world)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            meeting.barrier()


def start_processes(device: str) -> Processes:
    """Join the process group: torchrun's where there is one, else a group of one that opens no port."""
    rank, world = ranks.rank(), ranks.world_size()
    # DeepSpeed looks for mpi4py when these are missing, and its launcher variables pick the local device.
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        if world == 1:
            ranks.stay_on_this_machine()
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        else:
            meeting.join(backend)
        # Not sooner: DeepSpeed keeps the group of its first engine for later ones in the same process.
        atexit.register(_leave)
    if device == "cpu":
        keep_freed()
    return Processes(rank, world, torch.device(device))


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _import_deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed.ops

    utils.logger.setLevel("ERROR")
    if device.type == "cpu":
        # The first look at this table tries every op with the compiler, and the first initialise would build the
        # shared-memory op (80 s, and only with a compiler). None is needed here; results are the same.
        deepspeed.ops.__compatible_ops__ = dict.fromkeys(all_ops.ALL_OPS, False)
    return deepspeed


class AnchoredAdamW(torch.optim.AdamW):
    """AdamW with decoupled decay towards the weights before the first step: p <- p - lr decay (p - p_0), then AdamW.

    Weight by weight, so it works on ZeRO's flat partitions; p_0 is part of the optimiser's state, so a resumed
    run decays towards the same weights. Source: Li et al. 2018 (L2-SP), decoupled as in Loshchilov and Hutter 2019.
    """

    def __init__(self, params: Any, *, start_decay: float, **options: Any) -> None:
        super().__init__(params, **options)
        self.start_decay = start_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of the decay, then one of AdamW."""
        first = []
        for group in self.param_groups:
            pull = min(1.0, group["lr"] * self.start_decay)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "start" in self.state[p]:
                    p.lerp_(self.state[p]["start"], pull)
                else:  # AdamW fills the state of a parameter only while it is empty
                    first.append((p, p.detach().clone()))
        result = super().step(closure)
        for p, start in first:
            self.state[p]["start"] = start
        return result


class Engine:
    """A module under DeepSpeed with AdamW. ``module(...)`` trains; :meth:`policy` gives a selector to evaluate."""

    def __init__(
        self,
        selector: nn.Module,
        processes: Processes,
        *,
        lr: float,
        weight_decay: float,
        grad_clip: float,
        batch: int,
        zero_stage: int = 0,
        precision: str = "fp32",
        start_decay: float = 0.0,
    ) -> None:
        """``batch``: query groups per optimiser step over all processes; ``grad_clip`` 0: no clipping.

        ``start_decay``: of :class:`AnchoredAdamW`; 0 is plain AdamW.
        """
        self.processes, self.stage, self.precision = processes, zero_stage, precision
        library = _import_deepspeed(processes.device)
        settings = json.loads((config.CONFIG_DIR / "deepspeed" / f"zero{zero_stage}.json").read_text())
        settings["train_micro_batch_size_per_gpu"] = -(-batch // processes.world)
        # Gradients of whole fp32 weights are clipped here: DeepSpeed would compute their norm once more.
        self._whole = zero_stage == 0 and precision == "fp32"
        self._grad_clip = grad_clip
        settings["gradient_clipping"] = 0.0 if self._whole else grad_clip
        if precision == "bf16":
            settings["bf16"] = {"enabled": True}
        selector = selector.to(processes.device)
        trained = [p for p in selector.parameters() if p.requires_grad]
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "fused": True}
        kind = torch.optim.AdamW
        if start_decay:
            kind, options["start_decay"] = AnchoredAdamW, start_decay
        optimiser = kind(trained, **options)
        self._engine, *_ = library.initialize(model=selector, optimizer=optimiser, config=settings)
        if processes.world == 1 and self._whole:
            self._engine.enable_backward_allreduce = False  # a sum over one process, of copies: 3 % of a step
        self.module: nn.Module = self._engine

    def step(self, loss: Tensor, lr: float) -> float:
        """Backward and one optimiser step at learning rate ``lr``; the gradient norm before clipping.

        Raises:
            NumericError: loss or gradient is not finite on any process; the weights of the last checkpoint stand.
        """
        if self._any(not bool(torch.isfinite(loss))):
            raise NumericError(f"the loss is {float(loss.detach())}; training stopped, the last checkpoint stands")
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.backward(loss)
        if self._whole:
            norm = self._clip()
            self._engine.step()
        else:
            self._engine.step()
            norm = self._finite(float(self._engine.get_global_grad_norm()))
        return norm

    def _any(self, flag: bool) -> bool:
        if self.processes.world == 1:
            return flag
        return bool(self.processes.sum(torch.tensor(float(flag), device=self.processes.device)) > 0)

    def _clip(self) -> float:
        """Clip the gradients of this process's whole weights; their norm before that."""
        parameters = [p for p in self._engine.module.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        norm = self._finite(float(total))
        if self._grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._grad_clip, total)
        return norm

    @staticmethod
    def _finite(norm: float) -> float:
        if not norm < float("inf"):
            raise NumericError(f"the gradient norm is {norm}; training stopped, the last checkpoint stands")
        return norm

    # ---- weights ----------------------------------------------------------------------------------------------

    def state_dict(self, trained_only: bool = False) -> dict[str, Tensor]:
        """The model's weights (all, or those that train) on the CPU, float32, on every process."""
        module = self._engine.module
        with self.gathered():
            everything = module.state_dict()
            parameters = module.named_parameters(remove_duplicate=False)  # a shared one under each of its names
            names = {n for n, p in parameters if p.requires_grad} if trained_only else everything.keys()
            return {name: everything[name].detach().float().cpu().clone() for name in names}

    def gathered(self) -> contextlib.AbstractContextManager:
        """Within it every process sees whole parameters (under ZeRO-3 they are partitioned)."""
        if self.stage < 3:
            return contextlib.nullcontext()

        return deepspeed.zero.GatheredParameters(list(self._engine.module.parameters()))

    def policy(self) -> PointerSelector:
        """A selector to evaluate, without gradients: the trained module itself, or under ZeRO-3 a plain copy."""
        module = self._engine.module
        if self.stage < 3:
            return module
        copy = PointerSelector(module.config)
        copy.load_state_dict(self.state_dict(), strict=True)
        return copy.to(self.processes.device).eval()

    # ---- resumable state --------------------------------------------------------------------------------------

    def _masters(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """The inner AdamW and the tensors it updates on this process (whole ones, or ZeRO's flat partitions)."""
        outer = self._engine.optimizer
        inner = outer if isinstance(outer, torch.optim.AdamW) else outer.optimizer
        if self.stage == 3:
            return inner, list(outer.fp32_partitioned_groups_flat)
        return inner, [p for group in inner.param_groups for p in group["params"]]

    def optimiser_state(self) -> dict[str, Any]:
        """Master weights and Adam moments of this process, plain tensors."""
        inner, masters = self._masters()
        moments = [{k: v.detach().cpu().clone() for k, v in inner.state[p].items()} for p in masters]
        return {
            "stage": self.stage, "world": self.processes.world, "precision": self.precision,
            "masters": [p.detach().cpu().clone() for p in masters], "moments": moments,
        }  # fmt: skip

    def load_optimiser_state(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`optimiser_state` gave (the module's own weights are loaded before the engine is made).

        Raises:
            UsageError: it was saved under another ZeRO stage, precision, or (stages 1 to 3) number of processes.
        """
        now = {"stage": self.stage, "precision": self.precision, "world": self.processes.world}
        partitioned = self.stage > 0 or self.precision == "bf16"
        for name, variable in (("stage", "ZERO_STAGE"), ("precision", "PRECISION"), ("world", "NPROC")):
            if state[name] != now[name] and (name != "world" or partitioned):
                raise UsageError(
                    f"this run was interrupted with {variable}={state[name]} and cannot resume with "
                    f"{variable}={now[name]}; set {variable}={state[name]}, or start afresh under another EXP_NAME"
                )
        inner, masters = self._masters()
        with torch.no_grad():
            for p, saved, moments in zip(masters, state["masters"], state["moments"], strict=True):
                p.copy_(saved)
                inner.state[p] = {k: v.clone() if k == "step" else v.to(p.device) for k, v in moments.items()}

    def close(self) -> None:
        """Free DeepSpeed's buffers; the engine is unusable afterwards."""
        self._engine.destroy()
