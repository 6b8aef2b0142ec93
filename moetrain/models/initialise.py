"""Initial weights that depend on the seed and the parameter's name alone: equal at every layout.

Experts are drawn one by one, by their global number, so that a rank draws only its own.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.models.base import LanguageModel, ReadRows


@torch.no_grad()
def initialise(model: LanguageModel, seed: int) -> None:
    """Fill all buffers, and all parameters with the rows of `model.initial_values(seed)` that are here.

    Parameters are left as they are where a checkpoint is to fill them.
    """
    model.initialise_buffers()
    if model.awaits_checkpoint:
        return
    for parameter, read in model.initial_values(seed):
        if isinstance(parameter, DTensor):
            local, rows = parameter.to_local(), find_rows(parameter)
            local[: rows.stop - rows.start].copy_(read(rows))
        else:
            parameter.copy_(read(slice(0, math.prod(parameter.shape[:1]))))


def find_rows(parameter: DTensor) -> slice:
    """Return the rows that this rank holds of a parameter that is cut along its first dimension, by the mesh's last
    axis."""
    mesh, total = parameter.device_mesh, parameter.shape[0]
    each = -(-total // mesh.size(-1))
    begin = min(each * mesh.get_local_rank(-1), total)
    return slice(begin, min(begin + each, total))


def draw_values(
    model: LanguageModel, seed: int, std_of: Callable[[str], float]
) -> Iterator[tuple[nn.Parameter, ReadRows]]:
    """Yield each parameter with its fp32 values: normal(0, `std_of(name)`), or ones where it has one dimension."""
    experts = model.find_experts()
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if parameter.ndim == 1:
            yield parameter, partial(_read_ones, parameter.shape)
        elif owner in experts:
            own = experts[owner][1].own_experts()
            yield parameter, partial(read_experts, parameter.shape[1:], std_of(name), seed, name, own)
        else:
            yield parameter, partial(read_drawn, parameter.shape, std_of(name), seed, name)


def read_drawn(shape: torch.Size, std: float, seed: int, name: str, rows: slice) -> Tensor:
    """Return some rows of a tensor that is drawn as a whole, by its name."""
    return _draw(shape, std, seed, name)[rows]


def read_experts(shape: torch.Size, std: float, seed: int, name: str, own: list[int], rows: slice) -> Tensor:
    """Return some slots of a tensor that has an entry of `shape` for each of the experts `own`, drawn by its number."""
    drawn = [_draw(shape, std, seed, f"{name}.{expert}") for expert in own[rows]]
    return torch.stack(drawn) if drawn else torch.empty(0, *shape)


def _read_ones(shape: torch.Size, rows: slice) -> Tensor:
    return torch.ones(shape)[rows]


def make_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator that the seed and a parameter's name decide."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _draw(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed, name)) * std
