"""The whole weights, and optimizer state, of a module whose experts are spread over ranks: gathered and loaded.

`owners` maps the name of every tensor that has one entry an expert to the layer that it belongs to; S experts are at
home on a rank, E on all ranks of the group.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.common.errors import ConfigError
from moetrain.distributed import sharded
from moetrain.distributed.comm import Group, all_gather, broadcast
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.slices import cut_matrices, join_matrices


def broadcast_weights(module: nn.Module, *groups: Group) -> None:
    """Give all ranks the parameters and buffers of rank 0, group after group, in place.

    Tensors on the meta device, and those that FSDP2 has sharded, stay as they are.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta and not sharded.is_sharded(tensor):
            for group in groups:
                broadcast(tensor.detach(), group)


def gather_whole_experts(name: str, own: Tensor, experts: Any, group: ExpertGroup) -> Tensor:
    """Return [E, ...] of the matrices called `name` of `experts`, of which `own` [S, ...] are here, perhaps slices; all
    ranks of the group call it."""
    return join_matrices(name, gather_experts(own, experts.num_experts * experts.slices, group), experts.slices)


def gather_experts(own: Tensor, num_experts: int, group: ExpertGroup) -> Tensor:
    """Return [E, ...] of the experts at home here, `own` [S, ...]; all ranks of the group call it."""
    most = -(-num_experts // group.size)
    padded = own.new_zeros(most, *own.shape[1:])
    padded[: len(own)] = own
    return all_gather(padded, group.rows).flatten(0, 1)[:num_experts]


@torch.no_grad()
def gather_state_dict(module: nn.Module, owners: Mapping[str, Any], group: ExpertGroup) -> dict[str, Tensor]:
    """Return `module.state_dict()` as it is on one device: all experts, nothing sharded; on every rank, in the CPU's
    memory. All ranks call it."""
    whole = {}
    for name, value in module.state_dict().items():
        if name in owners:
            value = gather_whole_experts(name.rpartition(".")[2], value, owners[name].experts, group)
        whole[name] = sharded.gather_whole(value).detach().to("cpu", copy=True)
    return whole


@torch.no_grad()
def load_state_dict(module: nn.Module, owners: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Fill the module from `state`, the tensors of the module on one device.

    Raises `KeyError` where a name is missing, `ValueError` where a shape differs.
    """
    for name, target in module.state_dict().items():
        value = state[name]
        if name in owners:
            experts = owners[name].experts
            value = cut_matrices(name.rpartition(".")[2], value, experts.slices)[experts.own_experts()]
        if value.shape != target.shape:
            raise ValueError(f"{name}: has the shape {tuple(value.shape)}, must have {tuple(target.shape)}")
        sharded.fill(target, value)


@torch.no_grad()
def gather_optimizer_state(
    optimizer: Optimizer, owners: Mapping[nn.Parameter, Any], group: ExpertGroup
) -> dict[str, Any] | None:
    """Return `optimizer.state_dict()` as it is on one device, in the CPU's memory: on rank 0 of the group, None on the
    others. All ranks call it. `owners`: the layer of each parameter that has one entry an expert.

    Raises `ConfigError` where the optimizer keeps something for experts that is not one row an expert.
    """
    found, whole = optimizer.state_dict(), {}
    for number, parameter in enumerate(_list_parameters(optimizer)):
        state = dict(found["state"].get(number, {}))  # a copy: what stands there is the optimizer's own
        for key, value in state.items():
            if isinstance(value, Tensor):
                if parameter in owners and value.dim():
                    value = _gather_rows(f"{type(optimizer).__name__} keeps {key}", value, parameter, owners, group)
                value = sharded.gather_whole(value)
                state[key] = value.detach().to("cpu", copy=True) if group.rank == 0 else None
        if state:
            whole[number] = state
    return {**found, "state": whole} if group.rank == 0 else None


def _gather_rows(
    about: str, value: Tensor, parameter: nn.Parameter, owners: Mapping[nn.Parameter, Any], group: ExpertGroup
) -> Tensor:
    """[E, ...] of what an optimizer keeps for the experts at home here. Raises `ConfigError` for other rows."""
    experts = owners[parameter].experts
    if len(value) != len(parameter):
        raise ConfigError(f"optimizer: {about} {tuple(value.shape)} for {len(parameter)} experts, not a row each")
    if experts.slices > 1 and value.shape != parameter.shape:
        raise ConfigError(f"optimizer: {about} {tuple(value.shape)}, which cannot be that of whole experts with r > 1")
    return gather_whole_experts(_name_matrix(parameter, experts), value, experts, group)


def _name_matrix(parameter: nn.Parameter, experts: Any) -> str:
    """Return the name of a parameter of `experts`, where they are slices; nothing depends on it otherwise."""
    return next((name for name, p in experts.named_parameters() if p is parameter), "") if experts.slices > 1 else ""


@torch.no_grad()
def load_optimizer_state(optimizer: Optimizer, owners: Mapping[nn.Parameter, Any], whole: Mapping[str, Any]) -> None:
    """Fill the optimizer from what `gather_optimizer_state` returned, on any number of ranks.

    Raises `ConfigError` where it is that of other parameters.
    """
    parameters = _list_parameters(optimizer)
    if sum(len(each["params"]) for each in whole["param_groups"]) != len(parameters):
        raise ConfigError("optimizer: its state is that of another number of parameters")
    own: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(parameters):
        own[number] = dict(whole["state"].get(number, {}))
        for key, value in own[number].items():
            if not isinstance(value, Tensor) or not value.dim():
                continue
            if parameter in owners:
                experts = owners[parameter].experts
                if len(value) != experts.num_experts:
                    raise ConfigError(f"optimizer: {key} has {len(value)} of {experts.num_experts} experts")
                cut = cut_matrices(_name_matrix(parameter, experts), value, experts.slices)
                value = cut[experts.own_experts()]
            own[number][key] = sharded.shard_like(value, parameter)
    optimizer.load_state_dict(
        {"state": {n: each for n, each in own.items() if each}, "param_groups": whole["param_groups"]}
    )


def _list_parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """Return the parameters in the order of the optimizer's state."""
    return [parameter for each in optimizer.param_groups for parameter in each["params"]]
