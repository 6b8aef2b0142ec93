"""Planners: pure functions from counted rows to a `Plan`, the same on every rank. Loads no torch.

`PLANNERS[name](counts, home, costs, limits=None, state=None, **options) -> Plan`: counts [R, E] are the rows that each
source rank holds for each expert, home [E] the rank that owns each expert; `options` are the planner's own,
as keyword-only arguments. `layer_time(plan, counts, home, costs)` predicts what a plan takes.
"""

import numpy as np

from moetrain.moe.options import PLANNERS
from moetrain.moe.planning.cost import Costs, Limits, Link, State, default_costs, layer_time
from moetrain.moe.planning.plan import Ints, Plan

__all__ = [
    "PLANNERS",
    "Costs",
    "Limits",
    "Link",
    "Plan",
    "State",
    "default_costs",
    "default_home",
    "layer_time",
]


def default_home(num_experts: int, num_ranks: int) -> Ints:
    """Returns [E] the rank that owns each expert: consecutive blocks, `e // ceil(E / R)`."""
    return np.arange(num_experts) // -(-num_experts // num_ranks)
