"""What every engine offers, and what engines share: guests, the finite norm, three kinds of parameters."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.config import Config, RunSpec
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.distributed.sharded import global_norm
from moetrain.engine import precision
from moetrain.engine.entries import MOMENTS, Entries
from moetrain.models.base import LanguageModel
from moetrain.moe.kernels.api import KernelChoice
from moetrain.moe.layer import LayerStats
from moetrain.moe.planning.cost import Costs

GUEST_PART = 8  # of a GPU's memory, one is for guests, where `engine.guest_memory_mib` does not say
CPU_GUEST_BYTES = 1 << 30


class Engine(ABC):
    """Owns the model on this rank and its optimizer.

    Three kinds of parameters: dense; experts, whole ones on their home rank of `ep`; routers and what else is
    `model.replicated()`: whole on every rank, kept and computed in fp32. Gradients are summed over ranks: the loss is
    divided by the global batch before its backward.
    """

    model: LanguageModel
    optimizer: Any  # of torch: `param_groups` and `state`
    dtype: torch.dtype  # of computation

    def __init__(self, model: LanguageModel, mesh: Mesh, config: RunSpec) -> None:
        self.model, self.mesh, self.clip = model, mesh, config.optim.clip
        self.dtype = precision.get_dtype(config)
        self._recompute = config.train.recompute == "full"
        self._is_fp8 = precision.check_experts_dtype(config, mesh.device) == "fp8"
        if self._is_fp8:
            model.use_kernels(KernelChoice(is_fp8=True))
        self._chunks = config.parallel.chunks

    def forward(self, *args: Any) -> tuple[Tensor, list[LayerStats]]:
        """The model's forward, with a backward to come."""
        return self.model(*args)

    def plan_with(self, costs: Costs) -> None:
        """What the planner decides with from now on, in how many chunks rows travel, and which kernels compute."""
        self.model.use_kernels(KernelChoice(left_to_torch=frozenset(costs.by_torch), is_fp8=self._is_fp8))
        again = 3 if self._recompute else 2  # forward, recompute, backward
        for layer in self.model.layers_of_experts:
            layer.experts.chunks = self._chunks
            layer.use_costs(replace(costs, lends=1 if layer.experts.residents.slots else again))

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last`: of this optimizer step's micro-steps, reduce them over the ranks."""
        for layer in self.model.layers_of_experts:
            layer.step.begin_backward(is_last_micro_batch=last)
        self._backward(loss, last)
        learning = [p for p in self.model.replicated() if p.requires_grad]
        if last and learning:
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
            flat = all_reduce_sum(torch.cat([grad.flatten() for grad in grads]))
            for parameter, part in zip(learning, flat.split([p.numel() for p in learning]), strict=True):
                parameter.grad = part.view_as(parameter)

    def step(self, lr: float) -> float:
        """Clip by the global norm, update, forget the gradients. Returns the norm before clipping.

        Where it is not finite nothing is updated; raises `FloatingPointError` then, if the engine cannot go on.
        """
        norm = self.grad_norm()
        if math.isfinite(norm):
            self._update(lr, self.clip / (norm + 1e-6) if self.clip and norm > self.clip else 1.0)
        else:
            self._forget()
        for layer in self.model.layers_of_experts:
            layer.experts.residents.reset()  # weights have changed
        return norm

    @abstractmethod
    def _backward(self, loss: Tensor, last: bool) -> None:
        """`backward`, but for what is replicated."""

    def grad_norm(self) -> float:
        """The norm over all parameters of the model, each counted once, however many ranks hold it."""
        return global_norm(list(self._grads()), self.mesh.device, all_reduce_sum)

    @abstractmethod
    def _grads(self) -> Iterator[tuple[Tensor, int]]:
        """(gradient, on how many ranks it is) of all that this rank updates; after the last backward of a step."""

    @abstractmethod
    def entries(self, optimizer: bool = True) -> Entries:
        """This rank's part of what a checkpoint holds (`engine.entries.Checkpointable`)."""

    @abstractmethod
    def restored(self, entries: Entries, step: int) -> None:
        """`entries` hold a checkpoint of `step` steps now."""

    @abstractmethod
    def _update(self, lr: float, scale: float) -> None:
        """One step of the optimizer with the gradients times `scale`; then forget them."""

    @abstractmethod
    def _forget(self) -> None:
        """Forget the gradients: the step is left out."""


def guest_bytes(config: Config, device_bytes: int) -> int:
    """What guests that stay may take on each rank. `device_bytes`: of the smallest GPU of all ranks; 0: CPUs."""
    if config.engine.guest_memory_mib is not None:
        return config.engine.guest_memory_mib << 20
    return device_bytes // GUEST_PART or CPU_GUEST_BYTES


def guest_slots(config: RunSpec, mesh: Mesh) -> int:
    """Guests of a layer that may stay on a rank between forward and backward: weights, and gradients adding up."""
    width = 2 if config.train.dtype == "bf16" else 4
    gradient = width if config.micro_steps == 1 else 4
    guest = 3 * config.model.dim * config.model.expert_hidden // config.r * (width + gradient)
    return guest_bytes(config, mesh.device_bytes) // (guest * config.model.num_moe_layers)


def groups(model: LanguageModel, weight_decay: float) -> list[dict]:
    """Parameter groups of an optimizer, one per `kind`, since kinds live on different ranks: dense, expert, replicated.

    Matrices decay; norms, biases and embeddings do not. Frozen parameters are in none.
    """
    whole, experts, spared = set(model.replicated()), model.expert_parameters(), model.undecayed()
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        kind = "replicated" if parameter in whole else "expert" if parameter in experts else "dense"
        found.setdefault((kind, parameter not in spared), []).append(parameter)
    decay = {True: weight_decay, False: 0.0}
    return [{"params": p, "kind": k, "weight_decay": decay[d]} for (k, d), p in sorted(found.items())]


def adam_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter; before the first step as AdamW would make it then."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
    return state
