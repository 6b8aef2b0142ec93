"""From the sections of a configuration to the options of the core, which knows no configuration.

The sections are those of `config.schema`, whose rules import this module.
"""

from typing import Any

from moetrain.common.registry import Options
from moetrain.moe.options import PLANNERS, ROUTERS, BalanceOptions, RouterOptions, ZeroComputeOptions


def router_options(router: Any) -> RouterOptions:
    """Returns the options of the router's kind. Raises `ConfigError` for a kind or a value that there is not."""
    names = ROUTERS.options(router.name).names()
    return ROUTERS.make_options(router.name, {name: value for name, value in router if name in names})


def planner_options(planner: Any) -> Options:
    """Returns the options of the planner's kind. Raises `ConfigError` for a kind or a value that there is not."""
    return PLANNERS.make_options(planner.name, planner.options)


def zero_compute_options(model: Any, router: Any) -> ZeroComputeOptions:
    """Returns how many experts compute next to nothing, and their share of the load."""
    counts = {"zero": model.zero_experts, "copy": model.copy_experts, "constant": model.constant_experts}
    return ZeroComputeOptions(**counts, tau=router.zero_compute_tau)


def balance_options(balance: Any) -> BalanceOptions:
    """Returns the options of the router losses."""
    return BalanceOptions(**balance.model_dump())
