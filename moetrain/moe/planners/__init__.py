"""Planners: pure functions from counted rows to a `Plan`, the same on every rank. No torch.

`PLANNERS[name](counts, home, costs, limits=None, state=None, **options) -> Plan`; `options` are the planner's own,
as keyword-only arguments; `checks.PLANNER_OPTIONS` names them.
"""

from collections.abc import Callable

import numpy as np

from moetrain.moe.plan import Ints, Plan
from moetrain.moe.planners.eplb import eplb
from moetrain.moe.planners.home import home
from moetrain.moe.planners.llep import llep
from moetrain.moe.planners.makespan import makespan

PLANNERS: dict[str, Callable[..., Plan]] = {"home": home, "llep": llep, "makespan": makespan, "eplb": eplb}


def default_home(num_experts: int, num_ranks: int) -> Ints:
    """[E] the rank that owns each expert: consecutive blocks, `e // ceil(E / R)`."""
    return np.arange(num_experts) // -(-num_experts // num_ranks)
