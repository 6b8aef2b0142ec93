"""First values of a transformers model whose parameters have memory but no values yet: drawn, or read from a folder.

A rank makes the rows that it holds: those of its experts, and of its shards of everything else.
"""

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.common.errors import ConfigError
from moetrain.hf.build import WithHead, build_transformer, unwrap
from moetrain.hf.conversion import Mapped, TensorSource
from moetrain.hf.folder import open_folder
from moetrain.hf.matching import map_tensors
from moetrain.hf.quantized import dequantise
from moetrain.hf.spread import SpreadExperts
from moetrain.models.base import ReadRows
from moetrain.models.initialise import make_generator, read_drawn, read_experts
from moetrain.moe.adapters import is_adapter


def draw_weights(
    model: Any, experts: Mapping[str, SpreadExperts], seed: int
) -> Iterator[tuple[nn.Parameter, ReadRows]]:
    """Yield each parameter with values that its name and `seed` decide: matrices normal with the standard deviation of
    the model's configuration, biases zero, and what else has one dimension as the family's code initialises it.

    `model`: the `PreTrainedModel`; `experts`: by the name of their module.
    """
    text = model.config.get_text_config()
    std = getattr(text, "initializer_range", None) or 0.02
    for name, parameter in _list_base(model):
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if last.endswith("bias"):
            yield parameter, partial(_read_zeros, parameter.shape)
        elif owner in experts:
            own = experts[owner].own_experts()
            yield parameter, partial(read_experts, parameter.shape[1:], std, seed, name, own)
        elif parameter.ndim > 1:
            yield parameter, partial(read_drawn, parameter.shape, std, seed, name)
        else:
            yield parameter, partial(_read_of_family, model, module, last, seed, name)


def map_folder(folder: str | Path, trust_remote_code: bool) -> Mapped:
    """Match the weights in a folder with the model that is built of it; headers alone are read.

    Raises `ConfigError` for whatever cannot be right, such as a key that is missing, unused or of another shape, and
    for a model that sees or hears whose text model transformers does not load alone.
    """
    opened = open_folder(folder)
    tensors, model = dequantise(opened), build_transformer(folder, trust_remote_code, device="meta")
    try:
        return map_tensors(tensors, unwrap(model), folder)
    except ConfigError as error:
        whole = opened.config.get("model_type")
        if not isinstance(model, WithHead) or whole == unwrap(model).config.model_type:
            raise
        reason = str(error).removeprefix(f"model.path={folder}: ")
        rule = f"{whole} sees or hears, and its text model cannot be loaded without the rest: {reason}"
        raise ConfigError(f"model.path={folder}: {rule}") from error


def read_weights(
    model: Any, experts: Mapping[str, SpreadExperts], folder: Path, trust_remote_code: bool
) -> Iterator[tuple[nn.Parameter, ReadRows]]:
    """Yield each parameter with what reads its rows from the safetensors of `folder`; fill the buffers that are there.

    `model`, `experts`: as for `draw_weights`. Raises `ConfigError` for a key that is missing, unused or of another
    shape.
    """
    sources = map_folder(folder, trust_remote_code).sources
    for name, buffer in model.named_buffers():
        if name in sources:
            buffer.copy_(sources[name].read())
    for name, parameter in _list_base(model):
        owner = name.rpartition(".")[0]
        own = experts[owner].own_experts() if owner in experts else None
        yield parameter, partial(_read_source, sources[name], own)


def _list_base(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all parameters but those of adapters."""
    return ((name, parameter) for name, parameter in model.named_parameters() if not is_adapter(name))


def _read_source(source: TensorSource, own: list[int] | None, rows: slice) -> Tensor:
    return source.read(rows if own is None else own[rows])


@torch.no_grad()
def initialise_buffers(model: Any) -> None:
    """Fill the buffers of a `PreTrainedModel` in place, as its own code does it; parameters stay as they are."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = not any(True for _ in module.buffers(recurse=False))
    for buffer in model.buffers():
        buffer.zero_()
    model.initialize_weights()


def _read_zeros(shape: torch.Size, rows: slice) -> Tensor:
    return torch.zeros(shape)[rows]


def _read_of_family(model: Any, module: nn.Module, last: str, seed: int, name: str, rows: slice) -> Tensor:
    """Rows of the parameter `last` of `module`, as `_init_weights` fills it in a copy on the CPU."""
    clone: Any = copy.copy(module)
    clone._parameters = {
        key: None if p is None else nn.Parameter(torch.zeros(p.shape)) for key, p in module._parameters.items()
    }
    clone._buffers = {key: None if b is None else torch.zeros(b.shape) for key, b in module._buffers.items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(make_generator(seed, name).initial_seed())
        model._init_weights(clone)
    value: Tensor = clone._parameters[last].detach()
    return value[rows]
