"""The native engine: FSDP2 for dense parameters and across the data ranks of an expert shard; AdamW or a
registered optimizer.

Three kinds of parameters:
- dense: sharded over dp_shard (replicated over dp_replicate), gathered when used;
- experts: whole experts on their home rank of `ep`, sharded over the ranks that hold the same ones;
- routers and what else is small (`model.replicated()`): whole on every rank, kept and computed in fp32.

Gradients are summed over ranks: the loss is divided by the global batch before its backward, nothing is averaged.
Master weights are fp32; under bf16, FSDP2 casts what it gathers and reduces in fp32. With `engine.offload` they,
gradients and AdamW's moments lie in the host's memory and are updated there; the moments in files, if it is `disk`.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from moetrain.config import Native, RunSpec
from moetrain.distributed.mesh import Mesh
from moetrain.engine import precision
from moetrain.engine.base import Engine, groups, guest_slots
from moetrain.engine.entries import MODEL, Entries, Held, held, of_model
from moetrain.engine.optim import AdamW, local
from moetrain.engine.registered import RegisteredStates, make_registered
from moetrain.models.base import LanguageModel
from moetrain.models.initialise import initialise


class NativeEngine(Engine):
    """Owns the sharded model and its optimizer. `model` comes in on the meta device."""

    def __init__(self, model: LanguageModel, mesh: Mesh, config: RunSpec) -> None:
        super().__init__(model, mesh, config)
        options = _options(config)
        shard(model, mesh, config)
        if _on_host(mesh, options):
            model.to_empty(device="cpu")
            for parameter in model.replicated():
                parameter.data = parameter.data.to(mesh.device)  # FSDP moves all others to where they are used
        else:
            model.to_empty(device=mesh.device)
        initialise(model, config.train.seed)
        nothing = [{"params": [], "kind": "dense", "weight_decay": 0.0}]  # where no adapter is on this rank
        parameters = groups(model, config.optim.weight_decay) or nothing
        self._states: AdamW | RegisteredStates
        if config.optim.name == "adamw":
            self.optimizer = self._states = AdamW(parameters, config.optim, _scratch(config))
        else:
            device = torch.device("cpu") if _on_host(mesh, options) else mesh.device
            self._states = make_registered(parameters, config.optim, device)
            self.optimizer = self._states.optimizer

    def _backward(self, loss: Tensor, last: bool) -> None:
        cast(FSDPModule, self.model).set_requires_gradient_sync(last)
        loss.backward()

    def _update(self, lr: float, scale: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if scale != 1.0:
            torch._foreach_mul_([grad for grad, _ in self._grads()], scale)
        self.optimizer.step()
        self._forget()

    def _forget(self) -> None:
        self.optimizer.zero_grad()

    def entries(self, optimizer: bool = True) -> Entries:
        """This rank's part of what a checkpoint holds; it shares memory with the model and the optimizer."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without gradient may have left parameters gathered
        return of_model(self.model, partial(self._kinds, optimizer))

    def _kinds(self, optimizer: bool, parameter: nn.Parameter) -> dict[str, Held]:
        kinds = {MODEL: held(parameter)}
        if optimizer:
            state = self._states.state_of(parameter)
            kinds |= {name: held(state[name]) for name in self._states.names}
        return kinds

    def restored(self, entries: Entries, step: int) -> None:
        """`entries` hold a checkpoint of `step` steps now."""
        self._states.restored(step)

    def _grads(self) -> Iterator[tuple[Tensor, int]]:
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                copies = self.mesh.dp_replicate if isinstance(parameter, DTensor) else self.mesh.world
                yield local(parameter.grad), copies


def shard(model: LanguageModel, mesh: Mesh, config: RunSpec) -> None:
    """Spread `model`, on whatever device it is, over the ranks; without values yet where that is the meta device."""
    options = _options(config)
    policy = MixedPrecisionPolicy(
        param_dtype=precision.get_dtype(config),
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    offload = CPUOffloadPolicy() if _on_host(mesh, options) else OffloadPolicy()
    reshard = options.reshard_after_forward
    common = {"mp_policy": policy, "offload_policy": offload}
    dense = {"mesh": mesh.dense, "ignored_params": set(model.replicated()), **common}
    keep_hidden = config.train.recompute != "selective"
    model.cut_experts(config.r)
    model.shard_experts(mesh.ep, guest_slots(config, mesh), options.max_rows, keep_hidden)
    for parameter in model.expert_parameters():
        parameter.requires_grad_(parameter.requires_grad and len(parameter) > 0)  # FSDP cannot reduce an empty gradient
    for module, _ in model.find_experts().values():
        _sharded(module, mesh=mesh.expert_data, reshard_after_forward=reshard, **common)
    for block in model.blocks:
        _sharded(block, reshard_after_forward=reshard, **dense)
    _sharded(model, reshard_after_forward=False, **dense)
    register_fsdp_forward_method(model, "count")


def _options(config: RunSpec) -> Native:
    assert isinstance(config.engine, Native)
    return config.engine


def _on_host(mesh: Mesh, options: Native) -> bool:
    """Whether masters, gradients and moments lie in host memory, apart from the device."""
    return options.offload != "none" and mesh.device.type == "cuda"


def _scratch(config: RunSpec) -> Path | None:
    """The folder of memory-mapped optimizer states, if they are to be that."""
    options = _options(config)
    if options.offload != "disk":
        return None
    return Path(options.offload_dir or Path(config.run.dir, config.run.name or ""))


def _sharded(module: nn.Module, **options: object) -> None:
    fully_shard(module, **options)  # type: ignore[call-overload]
    fsdp = cast(FSDPModule, module)
    fsdp.set_gradient_divide_factor(1.0)
    fsdp.set_force_sum_reduction_for_comms(True)
