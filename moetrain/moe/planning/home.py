"""Standard expert parallelism: every row is computed at the home of its expert."""

from typing import Any

import numpy as np

from moetrain.moe.planning.plan import Ints, Plan


def home(counts: Ints, home: Ints, costs: Any = None, limits: Any = None, state: Any = None) -> Plan:
    """Return the plan that moves nothing: standard expert parallelism. counts [R, E] rows, home [E]."""
    totals = counts.sum(0)
    expert = np.flatnonzero(totals)
    return Plan(counts, home, expert, home[expert], totals[expert])
