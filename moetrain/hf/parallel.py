"""`moetrain.hf.expert_parallel`: every experts module of a transformers model under dispatch, planning and lending."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import ExpertGroup
from moetrain.hf.layout import is_experts
from moetrain.hf.replay import replay_in_recompute
from moetrain.hf.spread import NAME, SpreadExperts, register
from moetrain.moe.options import PLANNERS
from moetrain.moe.planning.cost import Costs
from moetrain.moe.planning.plan import Plan

SOMETIMES = "vision_moe.experts"  # of ERNIE 4.5 VL: entered where there are images, so perhaps not on all ranks


def spread_experts(
    model: nn.Module,
    group: ExpertGroup,
    planner: str | Callable[..., Plan] = "makespan",
    planner_options: Mapping[str, Any] | None = None,
    costs: Costs | None = None,
    grouped: bool = False,
) -> list[SpreadExperts]:
    """Spread every experts module of `model` over the group, in place, and make their forward ours."""
    found = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    whole = [module for name, module in found if name.endswith(SOMETIMES)]
    found = [(name, module) for name, module in found if module not in whole]
    kind = type(model).__name__
    if not found:
        raise ConfigError(f"model: {kind} is not covered: none of its modules carries @use_experts_implementation")
    if any(hasattr(module, "_moetrain") for _, module in found):
        raise ConfigError(f"model: {kind} is spread over ranks already")
    for name, module in found:
        if module.num_experts % group.size:
            raise ConfigError(f"group: {group.size} ranks do not divide the {module.num_experts} experts of {name}")
    if isinstance(planner, str):
        options = PLANNERS.make_options(planner, planner_options or {})
        planner = partial(PLANNERS[planner], **asdict(options))
    register()
    for module in whole:
        module._moetrain_whole = True
    spread = []
    for name, module in found:
        regions = [model.get_submodule(".".join(name.split(".")[:end])) for end in range(name.count(".") + 1)]
        one = SpreadExperts(name, module, group, planner, costs, regions, grouped)
        module._moetrain = one
        module.config._experts_implementation = NAME
        spread.append(one)
    for module in model.modules():
        if hasattr(module, "_set_gradient_checkpointing"):
            replay_in_recompute(module)
    return spread


def join_without_tokens(spread: Sequence[SpreadExperts]) -> Tensor:
    """Enter what the other ranks enter, on a rank that has no tokens for this forward; returns a loss of zero.

    transformers' own code refuses an empty batch, so such a rank calls this in place of the model, and `backward()` on
    what it returns.
    """
    carry = torch.zeros((), device=spread[0].gate_up.device, requires_grad=True)
    for one in spread:
        carry = one.run_empty(carry)
    return carry
