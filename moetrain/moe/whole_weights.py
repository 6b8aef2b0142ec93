"""The whole weights of a module whose experts are spread over ranks: broadcast, gathered, loaded.

`owners` maps the name of every tensor that has one entry an expert to the layer that it belongs to; S experts are at
home on a rank, E on all ranks of the group.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.distributed import sharded
from moetrain.distributed.comm import Group, all_gather, broadcast
from moetrain.distributed.mesh import ExpertGroup


def broadcast_weights(module: nn.Module, *groups: Group) -> None:
    """Give all ranks the parameters and buffers of rank 0, group after group, in place.

    Tensors on the meta device, and those that FSDP2 has sharded, stay as they are.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta and not sharded.is_sharded(tensor):
            for group in groups:
                broadcast(tensor.detach(), group)


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
            value = gather_experts(value, owners[name].experts.num_experts, group)
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
            value = value[owners[name].experts.own_experts()]
        if value.shape != target.shape:
            raise ValueError(f"{name}: has the shape {tuple(value.shape)}, must have {tuple(target.shape)}")
        sharded.fill(target, value)
