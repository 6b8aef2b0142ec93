"""How `makespan` moves rows: the facts of one micro-step, and the rules by which full ranks give to empty ones.

R ranks, E experts, G guests resident, C chunks: rows of (expert, rank, rows), experts ascending.
"""

from typing import Any, NamedTuple

import numpy as np

from moetrain.moe.compiled import njit
from moetrain.moe.planning.cost_model import CostFigures, add_crossing, name_figures
from moetrain.moe.planning.plan import Ints

FEWEST, LOCAL, STAY, SAME_NODE = 0, 1, 2, 3  # rules of `place_rows`


class Problem(NamedTuple):
    """What is given, and what the home plan amounts to."""

    counts_ER: Ints
    totals: Ints  # [E]
    home: Ints  # [E]
    node: Ints  # [R]
    resident_RE: Ints
    guests_G2: Ints  # (expert, rank) of the residents
    order: Ints  # [E] experts by home
    begin: Ints  # [R + 1] where a home's experts begin
    loads: Ints  # [R]
    segments: Ints  # [R]
    flow: Ints  # [4, R] as in `cost_model.predict_seconds`
    costs: CostFigures
    max_rows: int
    max_guests: int
    worth: int  # rows whose travel takes as long as lending an expert


@njit()
def make_problem(counts, home, node, resident_RE, guests_G2, vector, max_rows, max_guests, counts_ER):  # type: ignore[no-untyped-def]
    """Return the `Problem`; `vector` [14] as `Costs.vector` makes it, counts_ER [E, R] is written to."""
    num_ranks, num_experts = counts.shape
    traffic, totals = np.zeros((num_ranks, num_ranks), np.int64), np.zeros(num_experts, np.int64)
    for s in range(num_ranks):
        for e in range(num_experts):
            traffic[s, home[e]] += counts[s, e]
            totals[e] += counts[s, e]
    loads, segments = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    begin = np.zeros(num_ranks + 1, np.int64)
    flow = np.zeros((4, num_ranks), np.int64)
    for s in range(num_ranks):
        for q in range(num_ranks):
            loads[q] += traffic[s, q]
            add_crossing(flow, node, s, q, traffic[s, q])
    for e in range(num_experts):
        segments[home[e]] += totals[e] > 0
        begin[home[e] + 1] += 1
    for r in range(num_ranks):
        begin[r + 1] += begin[r]
    order, place = np.empty(num_experts, np.int64), begin.copy()
    for e in range(num_experts):
        order[place[home[e]]] = e
        place[home[e]] += 1
    for block in range(0, num_experts, 8):  # a cache line at a time
        for s in range(num_ranks):
            for e in range(block, min(block + 8, num_experts)):
                counts_ER[e, s] = counts[s, e]
    costs = name_figures(vector)
    lent_bytes = costs.lends * costs.weight_bytes + costs.gradient_bytes
    worth = max(int(lent_bytes / (4 * costs.row_bytes)), 1)
    return Problem(
        counts_ER, totals, home, node, resident_RE, guests_G2, order, begin, loads, segments, flow, costs, max_rows,
        max_guests, worth,
    )  # fmt: skip


class PlacementState(NamedTuple):
    """How far `place_rows` has come."""

    load: Ints  # [R]
    left: Ints  # [E] rows still at home
    slots: Ints  # [R] guests
    given_ER: Ints
    last: Ints  # [E] the latest chunk of each expert, or -1
    links_C2: Ints  # (the one before it, its rank)


@njit()
def _give(problem, work, used, expert, rank, rows):  # type: ignore[no-untyped-def]
    """Move rows of an expert from its home to `rank`. Returns the number of chunks so far."""
    if work.given_ER[expert, rank] == 0:
        work.slots[rank] += 1
        work.links_C2[used, 0], work.links_C2[used, 1], work.last[expert] = work.last[expert], rank, used
        used += 1
    work.given_ER[expert, rank] += rows
    work.left[expert] -= rows
    work.load[problem.home[expert]] -= rows
    work.load[rank] += rows
    return used


@njit()
def _give_local(problem, work, used, ceiling):  # type: ignore[no-untyped-def]
    """Move rows to where most of an expert's lie already, as long as that saves more travel than lending costs."""
    num_ranks = len(problem.loads)
    for p in range(num_ranks):
        first, end = problem.begin[p], problem.begin[p + 1]
        if work.load[p] - ceiling < problem.worth:
            continue
        keys = np.empty((end - first) * num_ranks, np.int64)  # most rows first, then by expert, then by rank
        found = 0
        for at in range(first, end):
            e = problem.order[at]
            for q in range(num_ranks):
                if q != p and work.load[q] < ceiling and problem.counts_ER[e, q] - work.given_ER[e, q] >= problem.worth:
                    keys[found] = (at - first) * num_ranks + q - problem.counts_ER[e, q] * len(keys)
                    found += 1
        keys[:found].sort()
        for key in keys[:found]:
            e, q = problem.order[first + key % len(keys) // num_ranks], key % num_ranks
            rest = problem.counts_ER[e, q] - work.given_ER[e, q]
            part = min(work.load[p] - ceiling, ceiling - work.load[q], work.left[e], rest)
            if part >= problem.worth and (work.given_ER[e, q] or work.slots[q] < problem.max_guests):
                used = _give(problem, work, used, e, q, part)
    return used


@njit()
def _give_own(problem, work, used):  # type: ignore[no-untyped-def]
    """Give every rank its own rows, full or not, as long as that saves more travel than lending costs."""
    for e in range(len(problem.home)):
        for q in range(len(problem.loads)):
            rest = problem.counts_ER[e, q] - work.given_ER[e, q]
            if (
                rest >= problem.worth
                and q != problem.home[e]
                and (work.given_ER[e, q] or work.slots[q] < problem.max_guests)
            ):
                used = _give(problem, work, used, e, q, min(rest, work.left[e]))
    return used


@njit()
def _give_most(problem, work, used, ceiling, same_node):  # type: ignore[no-untyped-def]
    """Move rows from the fullest rank to the emptiest, or of its own node first, until none is above `ceiling`."""
    load, node = work.load, problem.node
    full = np.zeros(len(load), np.bool_)  # no free slot
    while True:
        p: Any = np.int64(0)
        q: Any = np.int64(-1)
        for r in range(len(load)):
            p = r if load[r] > load[p] else p
        if load[p] <= ceiling:
            return used
        for r in range(len(load)):
            if load[r] >= ceiling or full[r]:
                continue
            if q >= 0 and same_node and (node[r] == node[p]) != (node[q] == node[p]):
                q = r if node[r] == node[p] else q
            elif q < 0 or load[r] < load[q]:
                q = r
        if q < 0:
            return used
        amount = min(load[p] - ceiling, ceiling - load[q])
        e: Any = np.int64(-1)
        best_fit = best_local = e
        own = problem.order[problem.begin[p] : problem.begin[p + 1]]
        for each in own:  # one that has so many rows, and most of them at q already
            if work.given_ER[each, q] == 0 and work.slots[q] >= problem.max_guests:
                continue
            fit = min(work.left[each], amount)
            local = min(problem.counts_ER[each, q], fit)
            if fit > best_fit or (fit == best_fit and local > best_local):
                e, best_fit, best_local = each, fit, local
        if best_fit > 0:
            used = _give(problem, work, used, e, q, best_fit)
        else:
            full[q] = True


@njit()
def place_rows(problem, ceiling, rule, given_ER, links_C2, chunks_C3):  # type: ignore[no-untyped-def]
    """Move rows until no rank is above `ceiling` or nothing can move. Returns the number of chunks written, those of
    the experts that gave any; none where `rule` has no effect. given_ER [E, R], links_C2: workspaces, the first zero
    before and after.
    """
    load, left, slots = problem.loads.copy(), problem.totals.copy(), np.zeros(len(problem.loads), np.int64)
    last = np.full(len(left), -1)
    work = PlacementState(load, left, slots, given_ER, last, links_C2)
    used: Any = np.int64(0)
    for e, q in problem.guests_G2:  # they cost nothing
        part = min(load[problem.home[e]] - ceiling, ceiling - load[q], left[e])
        if part > 0 and slots[q] < problem.max_guests:
            used = _give(problem, work, used, e, q, part)
    free = used
    if rule == LOCAL:
        used = _give_local(problem, work, used, ceiling)
    elif rule == STAY:
        used = _give_own(problem, work, used)
    no_effect = rule in (LOCAL, STAY) and used == free
    if not no_effect:
        used = _give_most(problem, work, used, ceiling, rule == SAME_NODE)

    used = 0
    for e in range(len(left)):
        at = last[e]
        if at >= 0 and left[e] > 0:
            chunks_C3[used, 0], chunks_C3[used, 1], chunks_C3[used, 2] = e, problem.home[e], left[e]
            used += 1
        while at >= 0:
            q = links_C2[at, 1]
            chunks_C3[used, 0], chunks_C3[used, 1], chunks_C3[used, 2] = e, q, given_ER[e, q]
            given_ER[e, q] = 0
            used, at = used + 1, links_C2[at, 0]
    return 0 if no_effect else used
