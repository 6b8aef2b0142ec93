"""What a checkpoint is made of, whatever the engine: entries, each a tensor of its global shape.

`model/NAME` per parameter (the fp32 master where there is one) and persistent buffer, `exp_avg/NAME` and
`exp_avg_sq/NAME` per parameter, or what another optimizer than AdamW has of its shape; experts one by one under their
global number, slices of experts as `NAME[i/r]`, which are read as whole experts or other slices, too. A rank holds a
run of an entry's elements: whole rows under FSDP, a range of a flat buffer under ZeRO, all of them where it is not
sharded.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from moetrain.models.base import LanguageModel
from moetrain.moe.adapters import is_adapter

MODEL = "model"
SLICE = re.compile(r"(.+)\[(\d+)/(\d+)\]")
MOMENTS = ("exp_avg", "exp_avg_sq")
DTYPES = {  # as safetensors names them
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}


class Held(NamedTuple):
    """A rank's part of an entry: its elements `begin : begin + len(values)`, counted row by row."""

    shape: tuple[int, ...]  # of the whole entry
    begin: int
    values: Tensor  # 1-D, any dtype and device; loading writes into it


Entries = dict[str, Held]


class Checkpointable(Protocol):
    """What saving and loading need of an engine."""

    def entries(self, optimizer: bool = True) -> Entries:
        """This rank's part of every entry; without `optimizer`, of the model's alone.

        The same names, shapes and ranges whenever it is asked. `values` share memory with what they are part of, or
        `restored` puts them there. Ranks may hold the same range; all ranges of an entry tile it.
        """

    def restored(self, entries: Entries, step: int) -> None:
        """`entries`, as given out, have been filled: `step` optimizer steps are done."""


def held(tensor: Tensor) -> Held:
    """A plain tensor, which is whole, or a DTensor cut along its first dimension, by its last mesh axis."""
    if not isinstance(tensor, DTensor):
        return Held(tuple(tensor.shape), 0, tensor.detach().view(-1))
    *others, cut = tensor.placements
    if cut != Shard(0) or any(placement != Replicate() for placement in others):
        raise RuntimeError(f"a checkpoint cannot hold a tensor placed as {tensor.placements}")
    mesh = tensor.device_mesh
    rows = -(-tensor.shape[0] // mesh.size(-1)) * mesh.get_local_rank(-1)
    row = math.prod(tensor.shape[1:])
    local = tensor.to_local().detach()
    return Held(tuple(tensor.shape), min(rows, tensor.shape[0]) * row, local.view(-1))


def of_model(
    model: LanguageModel, kinds: Callable[[nn.Parameter], Mapping[str, Held]], is_base: bool = False
) -> Entries:
    """Entries of `model`: `kinds(parameter)` gives what there is of a parameter, as this rank's module has it.

    The first dimension of an expert parameter counts the experts whose home is this rank. Of a model with adapters
    there are the adapters alone, and the buffers; or, where `is_base`, all but the adapters.
    """
    experts = model.find_experts()
    out: Entries = {}
    for name, parameter in model.named_parameters():
        if model.adapted is not None and is_adapter(name) == is_base:
            continue
        owner, _, last = name.rpartition(".")
        for kind, part in kinds(parameter).items():
            if owner in experts:
                spread = experts[owner][1]
                for number, one in _by_expert(spread.own_experts(), part):
                    place, expert = divmod(number, spread.num_experts)
                    out[name_slice(f"{kind}/{owner}.{expert}.{last}", place, spread.slices)] = one
            else:
                out[f"{kind}/{name}"] = part
    kept = model.state_dict().keys()
    return out | {f"{MODEL}/{name}": held(buffer) for name, buffer in model.named_buffers() if name in kept}


def list_base(model: LanguageModel) -> Entries:
    """Entries of what `model` was before it had adapters."""
    return of_model(model, lambda parameter: {MODEL: held(parameter)}, is_base=True)


def name_slice(name: str, place: int, slices: int) -> str:
    """Return the name of a slice of the entry `name`; the entry's own where it is whole."""
    return f"{name}[{place}/{slices}]" if slices > 1 else name


def split_name(name: str) -> tuple[str, int, int]:
    """Return (name of the whole entry, which of its slices, how many there are) of a name that `name_slice` made."""
    found = SLICE.fullmatch(name)
    return (found[1], int(found[2]), int(found[3])) if found else (name, 0, 1)


def expected(model: LanguageModel, states: tuple[str, ...] = MOMENTS) -> dict[str, tuple[int, ...]]:
    """Name and shape of every entry of a whole, unsharded model and the optimizer's `states`."""
    entries = of_model(model, lambda parameter: dict.fromkeys((MODEL, *states), held(parameter)))
    return {name: part.shape for name, part in entries.items()}


def _by_expert(numbers: list[int], part: Held) -> Iterator[tuple[int, Held]]:
    """(global number, its part) of the experts that a range [S, ...] reaches into."""
    size = math.prod(part.shape[1:])
    end = part.begin + len(part.values)
    for slot, number in enumerate(numbers):
        first, last = max(part.begin, slot * size), min(end, (slot + 1) * size)
        if first < last:
            values = part.values[first - part.begin : last - part.begin]
            yield number, Held(tuple(part.shape[1:]), first - slot * size, values)
