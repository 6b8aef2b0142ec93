"""Initial weights that depend on the seed and the parameter's name alone: equal at every layout.

Experts are drawn one by one, by their global number, so that a rank draws only its own.
"""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moetrain.models.transformer import Transformer
from moetrain.moe.experts import Experts
from moetrain.moe.routing.base import Replicated


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Fill all parameters in place with what `drawn` gives. Buffers become zero."""
    for parameter, value in drawn(model, seed):
        _copy(parameter, value)
    for buffer in model.buffers():
        buffer.zero_()


def drawn(model: Transformer, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, its initial fp32 value) of all: normal(0, init_std), / sqrt(2 · layers) where they write to the
    residual stream; routers may have a standard deviation of their own. The value is whole; of experts, those whose
    home is this rank."""
    std = model.options.init_std
    small = std / math.sqrt(2 * model.options.num_layers)
    own_std = {
        f"{owner}.{name}": module.init_std
        for owner, module in model.named_modules()
        if isinstance(module, Replicated) and module.init_std is not None
        for name, _ in module.named_parameters()
    }
    experts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        scale = own_std.get(name, small if last == "down" or owner.endswith((".o", ".down")) else std)
        if parameter.ndim == 1:
            value = torch.ones(parameter.shape)
        elif owner in experts:
            own = experts[owner].own_experts()
            shape = parameter.shape[1:]
            value = torch.empty(parameter.shape)
            for slot, expert in enumerate(own):
                value[slot] = _draw(shape, scale, seed, f"{name}.{expert}")
        else:
            value = _draw(parameter.shape, scale, seed, name)
        yield parameter, value


def _draw(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator) * std


def _copy(parameter: nn.Parameter, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        whole = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(whole.to_local())
    else:
        parameter.copy_(value)
