"""The native engine: FSDP2 for dense parameters and across the data ranks of an expert shard; AdamW.

Three kinds of parameters:
- dense: sharded over dp_shard (replicated over dp_replicate), gathered when used;
- experts: whole experts on their home rank of `ep`, sharded over the ranks that hold the same ones;
- routers and what else is small (`Replicated`): whole on every rank, kept and computed in fp32.

Gradients are summed over ranks: the loss is divided by the global batch before its backward, nothing is averaged.
Master weights and optimizer states are fp32; under bf16, FSDP2 casts what it gathers and reduces in fp32.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from moetrain.checkpoint.entries import MODEL, MOMENTS, Entries, Held, held, of_model
from moetrain.comm import all_reduce_sum
from moetrain.config import Config
from moetrain.mesh import Mesh
from moetrain.model.initialise import initialise
from moetrain.model.transformer import Block, Transformer
from moetrain.moe.cost import Costs
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoE
from moetrain.moe.routers.base import Replicated


class NativeEngine:
    """Owns the sharded model and its optimizer. `model` comes in on the meta device."""

    def __init__(self, model: Transformer, mesh: Mesh, config: Config) -> None:
        self.mesh, self.clip = mesh, config.optim.clip
        self._recompute = config.train.recompute != "none"
        self.dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32  # of computation
        self.model = model
        self._shard(config)
        model.to_empty(device=mesh.device)
        # only now: moving from the meta device makes new parameters
        self._replicated = [p for p in _replicated(model) if p.requires_grad]
        initialise(model, config.train.seed)
        self.optimizer = torch.optim.AdamW(
            _groups(model, set(self._replicated), config.optim.weight_decay),
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,
        )

    def _shard(self, config: Config) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype if self.dtype != torch.float32 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        reshard = config.engine.reshard_after_forward
        dense = {"mesh": self.mesh.dense, "mp_policy": policy, "ignored_params": set(_replicated(self.model))}
        for block in self.model.layers:
            if (moe := cast(Block, block).moe) is not None:
                moe.experts.shard(self.mesh.ep, guest_slots(config, self.mesh.world), config.engine.max_rows)
                _sharded(moe.experts, mesh=self.mesh.expert_data, mp_policy=policy, reshard_after_forward=reshard)
            _sharded(block, reshard_after_forward=reshard, **dense)
        _sharded(self.model, reshard_after_forward=False, **dense)
        register_fsdp_forward_method(self.model, "count")

    def plan_with(self, costs: Costs) -> None:
        """What the planner decides with from now on."""
        again = 3 if self._recompute else 2  # forward, recompute, backward
        for moe in _moes(self.model):
            lends = 1 if moe.experts.store.slots else again
            moe.costs = replace(costs, lends=lends)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate gradients; `last`: of this optimizer step's micro-steps, reduce them over the ranks."""
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        for moe in _moes(self.model):
            moe.experts.store.last, moe.experts.store.later = last, len(moe.routers) - 1
        loss.backward()
        if last and self._replicated:
            for parameter in self._replicated:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            flat = all_reduce_sum(torch.cat([cast(Tensor, p.grad).flatten() for p in self._replicated]))
            sizes = [p.numel() for p in self._replicated]
            for parameter, part in zip(self._replicated, flat.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)

    def step(self, lr: float) -> float:
        """Clip by the global norm, update, forget the gradients. Returns the norm before clipping.

        Raises `FloatingPointError` on every rank, before anything is updated, where the norm is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self.grad_norm()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}, nothing was updated; a lower optim.lr may help")
        if self.clip and norm > self.clip:
            torch._foreach_mul_([_local(g) for g in self._grads()], self.clip / (norm + 1e-6))
        self.optimizer.step()
        self.optimizer.zero_grad()
        for moe in _moes(self.model):
            moe.experts.store.reset()  # weights have changed
        return norm

    def grad_norm(self) -> float:
        """The norm over all parameters of the model, each counted once, however many ranks hold it."""
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                copies = self.mesh.dp_replicate if isinstance(parameter, DTensor) else self.mesh.world
                total += _local(parameter.grad).double().square().sum() / copies
        return math.sqrt(all_reduce_sum(total).item())

    def entries(self, optimizer: bool = True) -> Entries:
        """This rank's part of what a checkpoint holds; it shares memory with the model and the optimizer."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without gradient may have left parameters gathered
        return of_model(self.model, partial(self._kinds, optimizer))

    def _kinds(self, optimizer: bool, parameter: nn.Parameter) -> dict[str, Held]:
        kinds = {MODEL: held(parameter)}
        if optimizer:
            state = self.optimizer.state[parameter]
            if not state:  # as AdamW would make it at its first step
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
            kinds |= {moment: held(state[moment]) for moment in MOMENTS}
        return kinds

    def restored(self, entries: Entries, step: int) -> None:
        """`entries` hold a checkpoint of `step` steps now."""
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def _grads(self) -> Iterator[Tensor]:
        return (p.grad for p in self.model.parameters() if p.grad is not None)


def guest_slots(config: Config, world: int) -> int:
    """Guests of a layer that may stay on a rank between forward and backward: weights, and gradients adding up."""
    width = 2 if config.train.dtype == "bf16" else 4
    gradient = width if config.micro_steps(world) == 1 else 4
    guest = 3 * config.model.dim * config.model.expert_hidden * (width + gradient)
    return (config.engine.guest_memory_mib << 20) // (guest * config.model.num_moe_layers)


def _moes(model: Transformer) -> list[MoE]:
    return [m for m in model.modules() if isinstance(m, MoE)]


def _replicated(model: Transformer) -> list[nn.Parameter]:
    return list(dict.fromkeys(p for m in model.modules() if isinstance(m, Replicated) for p in m.parameters()))


def _sharded(module: nn.Module, **options: object) -> None:
    fully_shard(module, **options)  # type: ignore[call-overload]
    fsdp = cast(FSDPModule, module)
    fsdp.set_gradient_divide_factor(1.0)
    fsdp.set_force_sum_reduction_for_comms(True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _groups(model: nn.Module, replicated: set[nn.Parameter], weight_decay: float) -> list[dict]:
    """Matrices decay; norms and embeddings do not. One group per kind, since kinds live on different meshes. Frozen
    parameters are in none."""
    experts = {p for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        kind = "replicated" if parameter in replicated else "expert" if parameter in experts else "dense"
        decays = parameter.ndim > 1 and parameter not in embeddings
        groups.setdefault((kind, decays), []).append(parameter)
    return [{"params": p, "weight_decay": weight_decay if d else 0.0} for (_, d), p in sorted(groups.items())]
