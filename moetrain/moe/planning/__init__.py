"""Planners: pure functions from counted rows to a `Plan`, the same on every rank. No torch.

`PLANNERS[name](counts, home, costs, limits=None, state=None, **options) -> Plan`; `options` are the planner's own,
as keyword-only arguments; `checks.PLANNER_OPTIONS` names them.
"""

from collections.abc import Callable

import numpy as np

from moetrain.moe.planning.eplb import eplb
from moetrain.moe.planning.home import home
from moetrain.moe.planning.llep import llep
from moetrain.moe.planning.makespan import makespan
from moetrain.moe.planning.plan import Ints, Plan

PLANNERS: dict[str, Callable[..., Plan]] = {"home": home, "llep": llep, "makespan": makespan, "eplb": eplb}


def default_home(num_experts: int, num_ranks: int) -> Ints:
    """[E] the rank that owns each expert: consecutive blocks, `e // ceil(E / R)`."""
    return np.arange(num_experts) // -(-num_experts // num_ranks)
