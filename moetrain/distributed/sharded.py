"""Tensors that lie on many ranks: those that FSDP2 has sharded, and the norm of gradients, each counted once."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

FP32_SQUARES = (1e-30, 1e36)  # sums of squares that fp32 has room for
EXACT_ELEMENTS = 1 << 18  # squared in fp64 at a time


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


def global_norm(grads: Sequence[tuple[Tensor, int]], device: torch.device, reduce: Callable[[Tensor], Tensor]) -> float:
    """Returns the norm over (gradient, on how many ranks it is). All ranks call it.

    `reduce` sums a tensor on `device` over the ranks in place.
    """
    total = reduce(sum_of_squares(grads, device)).item()
    if not FP32_SQUARES[0] < total < FP32_SQUARES[1]:  # the same on every rank
        total = reduce(sum_of_squares(grads, device, exact=True)).item()
    return math.sqrt(total)


def sum_of_squares(grads: Iterable[tuple[Tensor, int]], device: torch.device, exact: bool = False) -> Tensor:
    """fp64 scalar on `device`: Σ ‖gradient‖² / copies over (gradient, copies).

    A GPU squares in fp32 (`fp32_squares`). A CPU would add up a whole gradient in fp32: there, and where `exact` asks
    for it, squares are fp64, `EXACT_ELEMENTS` of them at a time, so that no gradient is copied as a whole.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    together: dict[tuple[torch.device, torch.dtype, int], list[Tensor]] = {}
    for grad, copies in grads:
        if exact or grad.device.type == "cpu":
            parts = (part.double() for part in grad.detach().reshape(-1).split(EXACT_ELEMENTS))
            squares = [part.dot(part) for part in parts]
            total += torch.stack(squares).sum().to(device) / copies
        elif grad.numel():
            together.setdefault((grad.device, grad.dtype, copies), []).append(grad.detach())
    for (*_, copies), group in together.items():
        total += fp32_squares(group).to(device) / copies
    return total


def fp32_squares(tensors: list[Tensor]) -> Tensor:
    """fp64 scalar: Σ ‖tensor‖², block by block in fp32, then in fp64; right to 1e-6 within `FP32_SQUARES` on a GPU,
    in one pass over all of them without a copy."""
    return torch.stack(torch._foreach_norm(tensors, 2.0, dtype=torch.float32)).double().square().sum()
