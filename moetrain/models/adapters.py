"""Low-rank adapters of a whole model (LoRA, Hu et al. 2021): which weights have them, and forwards without them.

Names are those of transformers, also for our presets, and match by their end as in peft: `q_proj`,
`experts.gate_up_proj`. A linear layer has lora_A [r, I] and lora_B [O, r] beside its weight; `moe.adapters` has those
of experts. Everything else is frozen. B is zero at first, so that the model begins as what it adapts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.common.errors import ConfigError
from moetrain.config import Lora
from moetrain.models.base import AdaptedModel, LanguageModel
from moetrain.moe.adapters import AdapterSwitch, ExpertAdapters, SharedAdapters

NAMED = 12  # names that an error lists
SHARED = "lora"  # what follows the name of a module of experts in that of the pairs that they share


class LinearAdapter:
    """A forward hook that adds s (x Aᵀ) Bᵀ to what a linear layer returns."""

    def __init__(self, scaling: float, switch: AdapterSwitch) -> None:
        self._scaling, self._switch = scaling, switch

    def __call__(self, module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not self._switch.is_on:
            return output
        x = inputs[0]
        low = F.linear(x, module.lora_A.to(x.dtype)) * self._scaling
        return output + F.linear(low, module.lora_B.to(x.dtype))


def add_adapters(model: LanguageModel, options: Lora) -> None:
    """Freeze the whole model, on the meta device, and give it adapters.

    Raises `ConfigError` where a target matches nothing or what has no adapters.
    """
    linears, matrices = choose_targets(model, options.targets)
    model.requires_grad_(False)
    switch, scaling = AdapterSwitch(), options.alpha / options.rank
    for linear in linears.values():
        wide_out, wide_in = linear.weight.shape
        linear.lora_A = nn.Parameter(linear.weight.new_empty(options.rank, wide_in))
        linear.lora_B = nn.Parameter(linear.weight.new_empty(wide_out, options.rank))
        linear.register_forward_hook(LinearAdapter(scaling, switch))
    for name, (module, experts) in model.find_experts().items():
        base, transposed = experts.tensor_names, experts.is_transposed
        adapted = [each for each in base[:2] if model.name_in_transformers(f"{name}.{each}") in matrices]
        owner: nn.Module = module
        if options.shared and adapted:
            owner = SharedAdapters()
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent).register_module(f"{last}_{SHARED}", owner)
        experts.adapters = ExpertAdapters.add(owner, base, module, transposed, adapted, options.rank, scaling, switch)
    model.find_embedding().register_forward_hook(_require_grad)
    model.adapted = AdaptedModel(tuple(linears), tuple(matrices), switch)


@contextmanager
def adapters_off(model: LanguageModel) -> Iterator[None]:
    """Leave the adapters of `model` out of all forwards while the context lasts: the model is what it began as.

    All ranks enter and leave it together. A forward inside of it has no backward that is of any use: the adapters'
    gradients are zero. A model without adapters stays as it is.
    """
    if model.adapted is None:
        yield
        return
    switch = model.adapted.switch
    before, switch.is_on = switch.is_on, False
    try:
        yield
    finally:
        switch.is_on = before


def choose_targets(
    model: LanguageModel, targets: Sequence[str] | None
) -> tuple[dict[str, nn.Linear], dict[str, nn.Parameter]]:
    """Return the linear layers and the matrices of experts that `targets` match, by their names in transformers.

    None: all linear layers but routers and the output head, and all matrices of experts. Raises `ConfigError`.
    """
    spared = model.find_unadapted()
    linears = {
        model.name_in_transformers(name): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in spared
    }
    matrices = {
        model.name_in_transformers(f"{name}.{each}"): module.get_parameter(each)
        for name, (module, experts) in model.find_experts().items()
        for each in experts.tensor_names[:2]
    }
    if targets is None:
        return linears, matrices
    kept = {model.name_in_transformers(name): module for name, module in model.named_modules() if module in spared}
    for target in targets:
        if not any(_matches(name, target) for name in (*linears, *matrices)):
            if any(_matches(name, target) for name in kept):
                raise ConfigError(f"lora.targets={target}: is a router or the output head, which have no adapters")
            there = list(dict.fromkeys(name.split(".")[-1] for name in linears))
            there += list(dict.fromkeys(".".join(name.split(".")[-2:]) for name in matrices))
            listed = ", ".join(there[:NAMED]) + (", ..." if len(there) > NAMED else "")
            raise ConfigError(
                f"lora.targets={target}: matches no linear layer or matrix of experts; there are {listed}"
            )
    chosen = lambda name: any(_matches(name, target) for target in targets)  # noqa: E731
    return (
        {name: module for name, module in linears.items() if chosen(name)},
        {name: matrix for name, matrix in matrices.items() if chosen(name)},
    )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Have every layer's input require a gradient: the exchange of rows runs backward on all ranks or on none."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()
    return output
