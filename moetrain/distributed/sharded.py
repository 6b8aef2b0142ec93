"""Parameters that FSDP2 has sharded, beside those that are whole on every rank."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor


def is_fsdp(module: nn.Module) -> bool:
    """Whether FSDP2 has been applied to any part of the module."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Returns what this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def count_shards(tensor: Tensor) -> int:
    """Returns how many parts it is cut into; 1: whole."""
    if not isinstance(tensor, DTensor):
        return 1
    shards = 1
    for axis, placement in enumerate(tensor.placements):
        shards *= tensor.device_mesh.size(axis) if placement.is_shard() else 1
    return shards


def gather_whole(tensor: Tensor) -> Tensor:
    """Returns all of it; all ranks that hold a part call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return this rank's part of the whole `value` that goes with a parameter, sharded if that is and has its shape."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def fill(target: Tensor, value: Tensor) -> None:
    """Copy the whole `value` into `target`, which may be sharded; every rank has the value."""
    if isinstance(target, DTensor):
        value = value.to(target.device)
        whole = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(whole.to_local())
    else:
        target.copy_(value)
