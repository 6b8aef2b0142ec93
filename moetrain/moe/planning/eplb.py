"""EPLB: copies of experts placed from past loads, as DeepSeek's load balancer does for inference.

For comparison, and for traffic that repeats itself. Experts keep their homes; copies go to guest slots. After
`replicate_experts` and `balanced_packing` of github.com/deepseek-ai/EPLB, without its groups of experts.
"""

import numpy as np

from moetrain.moe.planning.cost import Costs, Limits, State, default_costs
from moetrain.moe.planning.plan import Floats, Ints, Plan, stay_home

MEMORY = 0.8  # weight of what was before in the past that is planned from


def remember(past: Floats | None, counts: Ints) -> Floats:
    """Return the past [E] after the rows `counts` [R, E] as well."""
    load: Floats = counts.sum(0).astype(np.float64)
    if past is not None:
        load = MEMORY * past + (1 - MEMORY) * load
    return load


def place(past: Floats, home: Ints, num_ranks: int, replicas: int) -> list[list[int]]:
    """Return [E] the ranks that hold each expert, home first. past [E] loads; `replicas` guest slots per rank."""
    copies = np.ones(len(home), np.int64)
    for _ in range(num_ranks * replicas):  # one more of what is the largest load per copy
        load = np.where(copies < num_ranks, past / copies, 0)
        if not load.any():
            break
        copies[load.argmax()] += 1
    each = past / copies
    holders = [[int(q)] for q in home]
    loads, free = np.bincount(home, each, num_ranks), np.full(num_ranks, replicas)
    for e in np.repeat(np.arange(len(home)), copies - 1)[np.argsort(-np.repeat(each, copies - 1), kind="stable")]:
        ranks = [q for q in range(num_ranks) if free[q] and q not in holders[e]]
        if ranks:
            q = min(ranks, key=loads.__getitem__)
            holders[e].append(q)
            loads[q] += each[e]
            free[q] -= 1
    return holders


def eplb(
    counts: Ints,
    home: Ints,
    costs: Costs | None = None,
    limits: Limits | None = None,
    state: State | None = None,
    *,
    replicas: int = 1,
) -> Plan:
    """Split the rows of each expert evenly over its copies, local rows first; without past loads, plan as `home` does.

    counts [R, E] rows, home [E]; `replicas` guest slots per rank, fewer where `limits` has fewer. Copies know the past
    only, so that no limit on rows can be kept.
    """
    if state is None or state.past is None:
        return stay_home(counts, home)
    num_ranks = counts.shape[0]
    if limits is not None and limits.guests is not None:
        replicas = min(replicas, limits.guests)
    chunks = []
    for e, ranks in enumerate(place(np.asarray(state.past, np.float64), home, num_ranks, replicas)):
        rows, more = divmod(int(counts[:, e].sum()), len(ranks))
        chunks += [(e, q, rows + (at < more)) for at, q in enumerate(ranks)]
    return Plan.from_chunks(counts, home, chunks, (np.arange(num_ranks), (costs or default_costs()).node(num_ranks)))
