"""Initial weights that depend on the seed and the parameter's name alone: equal at every layout.

Experts are drawn one by one, by their global number, so that a rank draws only its own.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.models.base import LanguageModel, ReadRows
from moetrain.moe.adapters import SUFFIXES, is_adapter
from moetrain.moe.slices import cut_matrices, join_matrices


@torch.no_grad()
def initialise(model: LanguageModel, seed: int) -> None:
    """Fill all buffers, and all parameters with the rows of `model.initial_values(seed)` that are here.

    Parameters are left as they are where a checkpoint is to fill them.
    """
    model.initialise_buffers()
    if model.awaits_checkpoint:
        return
    for parameter, read in chain(model.initial_values(seed), draw_adapters(model, seed)):
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
        if is_adapter(name):
            continue
        if parameter.ndim == 1:
            yield parameter, partial(_read_ones, parameter.shape)
        elif owner in experts:
            spread = experts[owner][1]
            own, shape, read = spread.own_experts(), parameter.shape[1:], read_experts
            if spread.slices > 1:
                read = partial(read_slices, spread.slices, spread.num_experts)
            yield parameter, partial(read, shape, std_of(name), seed, name, own)
        else:
            yield parameter, partial(read_drawn, parameter.shape, std_of(name), seed, name)


def read_drawn(shape: torch.Size, std: float, seed: int, name: str, rows: slice) -> Tensor:
    """Return some rows of a tensor that is drawn as a whole, by its name."""
    return _draw(shape, std, seed, name)[rows]


def read_experts(shape: torch.Size, std: float, seed: int, name: str, own: list[int], rows: slice) -> Tensor:
    """Return some slots of a tensor that has an entry of `shape` for each of the experts `own`, drawn by its number."""
    drawn = [_draw(shape, std, seed, f"{name}.{expert}") for expert in own[rows]]
    return torch.stack(drawn) if drawn else torch.empty(0, *shape)


def read_slices(
    slices: int, num_experts: int, shape: torch.Size, std: float, seed: int, name: str, own: list[int], rows: slice
) -> Tensor:
    """Return some slots of a tensor that has an entry of `shape` for each of the slices `own` of experts, each of which
    is drawn whole, by its number."""
    matrix, found = name.rpartition(".")[2], []
    whole = join_matrices(matrix, torch.empty(slices, *shape, device="meta"), slices).shape[1:]
    for place, expert in (divmod(number, num_experts) for number in own[rows]):
        drawn = _draw(whole, std, seed, f"{name}.{expert}")
        found.append(cut_matrices(matrix, drawn[None], slices)[place])
    return torch.stack(found) if found else torch.empty(0, *shape)


def _read_ones(shape: torch.Size, rows: slice) -> Tensor:
    return torch.ones(shape)[rows]


def draw_adapters(model: LanguageModel, seed: int) -> Iterator[tuple[nn.Parameter, ReadRows]]:
    """Yield the parameters of all adapters with their first values, as peft has them: B zero, A [..., r, I] uniform
    within ± 1 / sqrt(I)."""
    experts = model.find_experts()
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if name.endswith(SUFFIXES[1]):
            yield parameter, partial(_read_zeros, parameter.shape)
        elif is_adapter(name):
            own = experts[owner][1].own_experts() if owner in experts else None
            yield parameter, partial(_read_uniform, parameter.shape, seed, name, own)


def _read_zeros(shape: torch.Size, rows: slice) -> Tensor:
    return torch.zeros(shape)[rows]


def _read_uniform(shape: torch.Size, seed: int, name: str, own: list[int] | None, rows: slice) -> Tensor:
    """Return some rows; of the experts `own` some slots, each drawn by its number."""
    bound = 1 / math.sqrt(shape[-1])
    names = [name] if own is None else [f"{name}.{expert}" for expert in own[rows]]
    each = shape if own is None else shape[1:]
    drawn = [torch.rand(each, generator=make_generator(seed, one)).mul_(2 * bound).sub_(bound) for one in names]
    if own is None:
        return drawn[0][rows]
    return torch.stack(drawn) if drawn else torch.empty(0, *each)


def make_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator that the seed and a parameter's name decide."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def _draw(shape: torch.Size, std: float, seed: int, name: str) -> Tensor:
    return torch.randn(shape, generator=make_generator(seed, name)) * std
