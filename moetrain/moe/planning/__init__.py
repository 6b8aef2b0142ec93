"""Planners: pure functions from counted rows to a `Plan`, the same on every rank. Loads no torch.

`PLANNERS[name](counts, home, costs, limits=None, state=None, **options) -> Plan`: counts [R, E] are the rows that each
source rank holds for each expert, home [E] the rank that owns each expert; `options` are the planner's own,
as keyword-only arguments. `layer_time(plan, counts, home, costs)` predicts what a plan takes.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from moetrain.common.errors import ConfigError
from moetrain.moe.options import CHUNKS, PLANNERS, Chunks
from moetrain.moe.planning.cost import Costs, Limits, Link, State, choose_chunks, default_costs, layer_time
from moetrain.moe.planning.plan import Ints, Plan

__all__ = [
    "PLANNERS",
    "Costs",
    "Limits",
    "Link",
    "Plan",
    "State",
    "check_chunks",
    "choose_chunks",
    "count_chunks",
    "count_slices",
    "default_costs",
    "default_home",
    "find_slices",
    "layer_time",
]

Number = TypeVar("Number", bound=np.generic)


def default_home(num_experts: int, num_ranks: int) -> Ints:
    """Returns [E] the rank that owns each expert: consecutive blocks, `e // ceil(E / R)`."""
    return np.arange(num_experts) // -(-num_experts // num_ranks)


def count_slices(counts: NDArray[Number], slices: int) -> NDArray[Number]:
    """Return the rows [..., r · E] of each slice for the rows [..., E] of each expert."""
    return counts if slices == 1 else np.concatenate([counts] * slices, -1)


def find_slices(num_experts: int, hidden: int, num_ranks: int) -> int | None:
    """Return the fewest slices of an expert for which `num_ranks` ranks own one each; None where there is no number.

    Slices have equal widths that are multiples of 8: rows of grouped GEMMs are multiples of 16 bytes.
    """
    fewest = -(-num_ranks // num_experts)
    return next((r for r in range(fewest, hidden // 8 + 1) if hidden % (8 * r) == 0), None)


def check_chunks(chunks: object) -> Chunks:
    """Return `chunks`. Raises `ConfigError` where it is none of 1, 2, 4, 8 and auto."""
    for known in CHUNKS:
        if chunks == known and not isinstance(chunks, bool):
            return known
    raise ConfigError(f"chunks={chunks}: must be one of {', '.join(map(str, CHUNKS))}")


def count_chunks(chunks: Chunks, plan: Plan, costs: Costs | None) -> int:
    """Return in how many chunks the rows of `plan` travel, as `parallel.chunks` has it, the same on every rank.

    `costs` None: those of the reference machine.
    """
    if chunks != "auto":
        return chunks
    return choose_chunks(plan, costs or default_costs()) if plan.num_ranks > 1 else 1
