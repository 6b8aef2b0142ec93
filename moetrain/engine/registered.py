"""Optimizers of other packages: made from their options, and what a checkpoint holds of their state."""

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moetrain.common.extensions import OPTIMIZERS, state_names
from moetrain.config import ConfigError, Optim
from moetrain.config.core_options import optimizer_options


class RegisteredStates(NamedTuple):
    """The state of an optimizer of another package, as checkpoints hold it."""

    optimizer: torch.optim.Optimizer
    names: tuple[str, ...]  # of the state tensors of a parameter's shape
    first: dict[str, Any]  # the state that a step leaves of a parameter that was tried out

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The state of a parameter; before its first step zeros."""
        state = self.optimizer.state[parameter]
        for name in self.names:
            if state.get(name) is None:
                dtype = self.first[name].dtype if name in self.first else parameter.dtype
                state[name] = torch.zeros_like(parameter, dtype=dtype)
        if "step" in self.first and "step" not in state:
            step = self.first["step"]
            state["step"] = torch.zeros_like(step) if isinstance(step, Tensor) else 0
        return state

    def restored(self, step: int) -> None:
        """The states hold those of a checkpoint of `step` steps now."""
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(step)
            elif "step" in state:
                state["step"] = step


def make_registered(groups: list[dict[str, Any]], optim: Optim, device: torch.device) -> RegisteredStates:
    """Returns the optimizer `optim.name` for these parameter groups.

    Raises `ConfigError` where its state is not what its options declare: no checkpoint could hold it.
    """
    first = _try_out(optim, device)
    names = state_names(OPTIMIZERS.options(optim.name))
    for name, value in first.items():
        if name != "step" and name not in names:
            rule = f"its state {name} is not among the state_names of its options, so that no checkpoint would hold it"
            raise ConfigError(f"optim.name={optim.name}: {rule}")
        if name != "step" and (not isinstance(value, Tensor) or value.shape != (2, 3)):
            rule = f"its state {name} is no tensor of the parameter's shape, so that no checkpoint can hold it"
            raise ConfigError(f"optim.name={optim.name}: {rule}")
    return RegisteredStates(_make(groups, optim), names, first)


def _make(groups: list[dict[str, Any]], optim: Optim) -> torch.optim.Optimizer:
    kind = OPTIMIZERS[optim.name]
    made: torch.optim.Optimizer = kind([{**g, "lr": optim.lr} for g in groups], **asdict(optimizer_options(optim)))
    return made


def _try_out(optim: Optim, device: torch.device) -> dict[str, Any]:
    """The state of one parameter [2, 3] after a step."""
    parameter = nn.Parameter(torch.ones(2, 3, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = _make([{"params": [parameter], "kind": "dense", "weight_decay": 0.0}], optim)
    optimizer.step()
    return {name: value for name, value in optimizer.state[parameter].items() if value is not None}
