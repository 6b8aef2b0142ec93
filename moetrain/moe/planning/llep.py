"""LLEP: least-loaded expert parallelism, as its paper prints it (Alg. 2 LLA, Alg. 3 LLAS, Alg. 4's guard).

Kept faithful so that it can be compared. Where the printed listing and its text or code disagree, this follows
the listing and the figures: λ guards *device* loads, an excess below m is spilled, helpers are sorted again after
every chunk. A capacity m_α that is no whole number leaves rows over; the least loaded helper is made to take them.
"""

from typing import Any

import numpy as np

from moetrain.moe.compiled import njit
from moetrain.moe.planning.plan import Ints, Plan, imbalance, stay_home


@njit()
def _helper(rest, native, capacity, load, min_rows):  # type: ignore[no-untyped-def]
    """(rank, rows): the least loaded other rank, which has the most room: for all of `rest` or for `min_rows` of it,
    or else it is made to take them."""
    rank = -1
    for r in range(len(load)):
        if r != native and (rank < 0 or load[r] < load[rank]):
            rank = r
    part = min(rest, int(capacity - load[rank]))
    return rank, part if part > 0 and (part >= min_rows or rest <= part) else rest


@njit()
def spread(load, home, num_ranks, alpha, min_rows):  # type: ignore[no-untyped-def]
    """Return (expert, rank, rows) of the chunks, experts ascending: Alg. 2, LLA. load [E], home [E]."""
    num_experts = len(load)
    capacity = alpha * load.sum() / num_ranks
    pending = np.zeros(num_ranks, np.int64)  # g_p: rows of experts not placed yet, at their homes
    assigned = np.zeros(num_ranks, np.int64)  # g_a
    for e in range(num_experts):
        pending[home[e]] += load[e]
    size = num_experts + 2 * num_ranks
    table = np.empty((size, 3), np.int64)
    used = 0
    for e in np.argsort(-load, kind="mergesort"):
        rest, native = load[e], home[e]
        pending[native] -= rest
        rank, part = native, min(rest, int(capacity - assigned[native] - pending[native]))
        while True:
            if part > 0:
                if used == len(table):
                    table = np.concatenate((table, np.empty_like(table)))
                table[used, 0], table[used, 1], table[used, 2] = e, rank, part
                used += 1
                assigned[rank] += part
                rest -= part
            if rest <= 0:
                break
            rank, part = _helper(rest, native, capacity, assigned + pending, min_rows)  # LLAS
    table = table[:used]
    by_expert = np.argsort(table[:, 0], kind="mergesort")
    return table[by_expert, 0], table[by_expert, 1], table[by_expert, 2]


def llep(
    counts: Ints,
    home: Ints,
    costs: Any = None,
    limits: Any = None,
    state: Any = None,
    *,
    alpha: float = 1.0,
    min_rows: int = 1024,
    threshold: float = 1.3,
) -> Plan:
    """Take experts by falling load; each fills its home up to m_α = α · mean load and spills the rest.

    counts [R, E] rows; `alpha` capacity of a device in mean loads (≥ 1), `min_rows` the paper's m in rows,
    `threshold` its λ: below this max/mean device load, the plan of `home`.
    """
    plan = stay_home(counts, home)
    if imbalance(plan.home_loads()) < threshold or counts.shape[0] == 1:
        return plan
    load = counts.sum(0)
    return Plan(counts, home, *spread(load, home, counts.shape[0], alpha, min_rows))
