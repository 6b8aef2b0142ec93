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
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from moetrain.checkpoint.entries import MODEL, MOMENTS, Entries, Held, held, of_model
from moetrain.comm import all_reduce_sum
from moetrain.config import Config, Native
from moetrain.engine.base import Engine, adam_state, groups, guest_slots, replicated
from moetrain.mesh import Mesh
from moetrain.model.initialise import initialise
from moetrain.model.transformer import Block, Transformer


class NativeEngine(Engine):
    """Owns the sharded model and its optimizer. `model` comes in on the meta device."""

    def __init__(self, model: Transformer, mesh: Mesh, config: Config) -> None:
        super().__init__(model, mesh, config)
        assert isinstance(config.engine, Native)
        self._shard(config, config.engine)
        model.to_empty(device=mesh.device)
        initialise(model, config.train.seed)
        self.optimizer = torch.optim.AdamW(
            groups(model, config.optim.weight_decay),
            lr=config.optim.lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            fused=True,
        )

    def _shard(self, config: Config, options: Native) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype if self.dtype != torch.float32 else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )
        reshard = options.reshard_after_forward
        dense = {"mesh": self.mesh.dense, "mp_policy": policy, "ignored_params": set(replicated(self.model))}
        for block in self.model.layers:
            if (moe := cast(Block, block).moe) is not None:
                moe.experts.shard(self.mesh.ep, guest_slots(config, self.mesh.world), options.max_rows)
                _sharded(moe.experts, mesh=self.mesh.expert_data, mp_policy=policy, reshard_after_forward=reshard)
            _sharded(block, reshard_after_forward=reshard, **dense)
        _sharded(self.model, reshard_after_forward=False, **dense)
        register_fsdp_forward_method(self.model, "count")

    def _backward(self, loss: Tensor, last: bool) -> None:
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        loss.backward()

    def _update(self, lr: float, scale: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if scale != 1.0:
            torch._foreach_mul_([_local(g) for g in self._grads()], scale)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def grad_norm(self) -> float:
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
            state = adam_state(self.optimizer, parameter)
            kinds |= {moment: held(state[moment]) for moment in MOMENTS}
        return kinds

    def restored(self, entries: Entries, step: int) -> None:
        """`entries` hold a checkpoint of `step` steps now."""
        for state in self.optimizer.state.values():
            state["step"].fill_(step)

    def _grads(self) -> Iterator[Tensor]:
        return (p.grad for p in self.model.parameters() if p.grad is not None)


def _sharded(module: nn.Module, **options: object) -> None:
    fully_shard(module, **options)  # type: ignore[call-overload]
    fsdp = cast(FSDPModule, module)
    fsdp.set_gradient_divide_factor(1.0)
    fsdp.set_force_sum_reduction_for_comms(True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
