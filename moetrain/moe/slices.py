"""Experts cut into slices of their hidden width: adaptive parallelism (Tutel and Flex, MLSys 2023, section 4).

SwiGLU experts are sums over their hidden columns, y = Σ_h down[:, h] · swiglu(gate_up x)_h, so an expert of hidden
width H is r experts of width H / r whose outputs add up: a selection of it is r selections of its slices, with equal
weights. Slice i of expert e has the number i · E + e, so that the slices of an expert have different home ranks. Each
is placed, planned and lent as an expert of its own. Routers, statistics and losses count whole experts.

N selections, E experts, D width, H expert hidden width, r slices of an expert.
"""

from typing import Any

import torch
from torch import Tensor

from moetrain.common.errors import ConfigError
from moetrain.moe.planning import find_slices
from moetrain.moe.routing.base import Routing

GATE_UP = "gate_up"  # [2H, D], gate above up; any other matrix of an expert is `down` [D, H]


def cut_matrices(name: str, whole: Tensor, slices: int) -> Tensor:
    """Return the slices [r · E, ...] of the matrices `whole` [E, 2H, D] or [E, D, H] called `name`."""
    if slices == 1:
        return whole
    num, rows, columns = whole.shape
    if name == GATE_UP:
        parts = whole.reshape(num, 2, slices, rows // 2 // slices, columns).permute(2, 0, 1, 3, 4)
        return parts.reshape(slices * num, rows // slices, columns)
    parts = whole.reshape(num, rows, slices, columns // slices).permute(2, 0, 1, 3)
    return parts.reshape(slices * num, rows, columns // slices)


def join_matrices(name: str, parts: Tensor, slices: int) -> Tensor:
    """Return the matrices [E, 2H, D] or [E, D, H] whose slices are `parts` [r · E, ...]: `cut_matrices` undone."""
    if slices == 1:
        return parts
    num, rows, columns = parts.shape[0] // slices, *parts.shape[1:]
    if name == GATE_UP:
        whole = parts.reshape(slices, num, 2, rows // 2, columns).permute(1, 2, 0, 3, 4)
        return whole.reshape(num, rows * slices, columns)
    whole = parts.reshape(slices, num, rows, columns).permute(1, 2, 0, 3)
    return whole.reshape(num, rows, columns * slices)


def select_slices(routing: Routing, slices: int, num_experts: int) -> Routing:
    """Return the selections [N · r] of slices that the selections [N] of experts are."""
    if slices == 1:
        return routing
    first = num_experts * torch.arange(slices, device=routing.expert_N.device)
    return routing._replace(
        token_N=routing.token_N.repeat_interleave(slices),
        expert_N=(routing.expert_N[:, None] + first).flatten(),
        weight_N=routing.weight_N[:, None].expand(-1, slices).flatten(),
    )


def choose_slices(name: str, experts: Any, num_ranks: int, asked: int | None = None) -> int:
    """Return how many slices the experts of the layer `name` are cut into on so many ranks: `asked`, or as few as give
    every rank one. Raises `ConfigError` where a rank would have none."""
    num, hidden = experts.num_experts, experts.down.shape[2]
    slices = find_slices(num, hidden, num_ranks) if asked is None else asked
    if slices is None or num * slices < num_ranks:
        cut = f" in {slices} slices" if slices else f", whose hidden width {hidden} has no such slices"
        rule = f"more than the {num} experts of the layer {name or 'itself'}{cut}"
        raise ConfigError(f"group: has {num_ranks} ranks, {rule}")
    return slices
