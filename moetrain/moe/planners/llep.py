"""LLEP: least-loaded expert parallelism, as its paper prints it (Alg. 2 LLA, Alg. 3 LLAS, Alg. 4's guard).

Kept faithful so that it can be compared. Where the printed listing and its text or code disagree, this follows
the listing and the figures: λ guards *device* loads, an excess below m is spilled, helpers are sorted again after
every chunk. A capacity m_α that is no whole number leaves rows over; the least loaded helper is made to take them.
"""

from typing import Any

from moetrain.moe.plan import Ints, Plan, imbalance
from moetrain.moe.planners.home import home as stay_home


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
    """Experts by falling load; each fills its home up to m_α = α · mean load and spills the rest.

    counts [R, E] rows; `alpha` capacity of a device in mean loads (≥ 1), `min_rows` the paper's m in rows,
    `threshold` its λ: below this max/mean device load, the plan of `home`.
    """
    plan = stay_home(counts, home)
    if imbalance(plan.loads()) < threshold or counts.shape[0] == 1:
        return plan
    num_ranks = counts.shape[0]
    load = counts.sum(0).tolist()
    owner = home.tolist()
    capacity = alpha * sum(load) / num_ranks
    pending = plan.loads().tolist()  # g_p: rows of experts not placed yet, at their homes
    assigned = [0] * num_ranks  # g_a
    chunks: list[tuple[int, int, int]] = []

    def place(expert: int, rank: int, rows: int) -> None:
        chunks.append((expert, rank, rows))
        assigned[rank] += rows

    for expert in sorted(range(len(load)), key=lambda e: (-load[e], e)):
        rest, native = load[expert], owner[expert]
        pending[native] -= rest
        room = int(capacity - assigned[native] - pending[native])
        if room > 0:
            place(expert, native, min(room, rest))
            rest -= min(room, rest)
        while rest > 0:  # LLAS
            helpers = sorted((r for r in range(num_ranks) if r != native), key=lambda r: (assigned[r] + pending[r], r))
            for rank in helpers:
                part = min(rest, int(capacity - assigned[rank] - pending[rank]))
                if part <= 0 or (part < min_rows and rest > part):
                    continue
                place(expert, rank, part)
                rest -= part
                break
            else:
                place(expert, helpers[0], rest)
                rest = 0
    return Plan.of(counts, home, chunks)
