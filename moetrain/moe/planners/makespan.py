"""makespan: the plan with the least predicted layer time under measured costs (`moe/cost.py`). Nothing to set.

A ceiling on the rows of a rank is tried from the mean load upwards. Under each, ranks above it give rows to ranks
below it, largest surplus to largest room, so that every step settles a rank or an expert: few guests. Sources are
local first: a rank that hosts a guest takes its own rows of it before any that have to travel. Variants lend where
many local rows lie, or inside a node. The predicted time decides between all of them, the plan of `home`, and that
of `llep` with the paper's settings; so no limit, factor or threshold is set by hand.

R ranks, E experts, M moves, G guests resident.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit

from moetrain.moe.cost import Costs, Limits, State, count, default_costs, seconds
from moetrain.moe.plan import ANYWHERE, Floats, Ints, Plan, pair, stages
from moetrain.moe.planners.llep import spread

CEILINGS = np.array([1.0, 1.005, 1.01, 1.02, 1.035, 1.06, 1.1, 1.16, 1.25, 1.4, 1.6, 2.0, 2.5, 3.2, 4.5])  # × mean
FEWEST, LOCAL, SAME_NODE = 0, 1, 2  # rules of `_place`
PAPER_THRESHOLD, PAPER_MIN_ROWS = 1.3, 1024  # llep's λ and m; α = 1
NO_LIMIT = 1 << 60


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
    flow: Ints  # [4, R] as in `cost.seconds`
    costs: Floats
    max_rows: int
    max_guests: int
    worth: int  # rows whose travel takes as long as lending an expert


class Work(NamedTuple):
    """How far `_place` has come."""

    load: Ints  # [R]
    left: Ints  # [E] rows still at home
    slots: Ints  # [R] guests
    given_ER: Ints
    chunks_C3: Ints


@njit(cache=True)
def _give(of, work, used, expert, rank, rows):  # type: ignore[no-untyped-def]
    """Rows of an expert from its home to `rank`. Returns the number of chunks so far."""
    if work.given_ER[expert, rank] == 0:
        work.slots[rank] += of.resident_RE[rank, expert] == 0
        work.chunks_C3[used, 0], work.chunks_C3[used, 1] = expert, rank
        used += 1
    work.given_ER[expert, rank] += rows
    work.left[expert] -= rows
    work.load[of.home[expert]] -= rows
    work.load[rank] += rows
    return used


@njit(cache=True)
def _place(of, ceiling, rule, given_ER, chunks_C3):  # type: ignore[no-untyped-def]
    """Move rows until no rank is above `ceiling` or nothing can move. Returns the number of chunks written.

    Chunks of the experts that gave any: (expert, rank, rows), experts ascending, every pair once. given_ER [E, R]:
    workspace, zero before and after.
    """
    num_ranks = len(of.loads)
    work = Work(of.loads.copy(), of.totals.copy(), np.zeros(num_ranks, np.int64), given_ER, chunks_C3)
    load, left, slots = work.load, work.left, work.slots
    full = np.zeros(num_ranks, np.bool_)  # no free slot
    used = 0
    for e, q in of.guests_G2:  # they cost nothing
        slots[q] += 1
        part = min(load[of.home[e]] - ceiling, ceiling - load[q], left[e])
        if part > 0:
            used = _give(of, work, used, e, q, part)

    for p in range(num_ranks if rule == LOCAL else 0):
        if load[p] - ceiling < of.worth:
            continue
        own = of.order[of.begin[p] : of.begin[p + 1]]
        pairs = np.empty(len(own) * num_ranks, np.int64)
        found = 0
        for at in range(len(own)):
            for q in range(num_ranks):
                if q != p and load[q] < ceiling and of.counts_ER[own[at], q] - given_ER[own[at], q] >= of.worth:
                    pairs[found] = at * num_ranks + q
                    found += 1
        local = np.array([-of.counts_ER[own[at // num_ranks], at % num_ranks] for at in pairs[:found]])
        for at in pairs[:found][np.argsort(local, kind="mergesort")]:
            e, q = own[at // num_ranks], at % num_ranks
            rest = of.counts_ER[e, q] - given_ER[e, q]
            part = min(load[p] - ceiling, ceiling - load[q], left[e], rest)
            if part >= of.worth and (given_ER[e, q] or of.resident_RE[q, e] or slots[q] < of.max_guests):
                used = _give(of, work, used, e, q, part)
    while True:
        p, q, e = np.argmax(load), -1, -1
        if load[p] <= ceiling:
            break
        for r in range(num_ranks):
            if load[r] >= ceiling or full[r]:
                continue
            if q >= 0 and rule == SAME_NODE and (of.node[r] == of.node[p]) != (of.node[q] == of.node[p]):
                q = r if of.node[r] == of.node[p] else q
            elif q < 0 or load[r] < load[q]:
                q = r
        if q < 0:
            break
        amount = min(load[p] - ceiling, ceiling - load[q])
        best_fit = best_local = -1
        for each in of.order[of.begin[p] : of.begin[p + 1]]:  # one that has so many, and most of them at q already
            fit = min(left[each], amount)
            local = min(of.counts_ER[each, q], fit)
            if fit > best_fit or (fit == best_fit and local > best_local):
                e, best_fit, best_local = each, fit, local
        part = best_fit
        if given_ER[e, q] == 0 and of.resident_RE[q, e] == 0 and slots[q] >= of.max_guests:
            full[q] = True
            continue
        used = _give(of, work, used, e, q, part)

    chunks_C3[:used] = chunks_C3[:used][np.argsort(chunks_C3[:used, 0] * num_ranks + chunks_C3[:used, 1])]
    pairs = chunks_C3[:used, :2].copy()
    used = 0
    for at in range(len(pairs)):
        e, q = pairs[at]
        chunks_C3[used, 0], chunks_C3[used, 1], chunks_C3[used, 2] = e, q, given_ER[e, q]
        given_ER[e, q] = 0
        used += 1
        if left[e] > 0 and (at + 1 == len(pairs) or pairs[at + 1, 0] != e):
            chunks_C3[used, 0], chunks_C3[used, 1], chunks_C3[used, 2] = e, of.home[e], left[e]
            used += 1
    return used


@njit(cache=True)
def _judge(of, chunks_C3, near):  # type: ignore[no-untyped-def]
    """(predicted seconds, rows above the limit) of the home plan with these experts' chunks instead; infinite where
    a rank has more guests than slots."""
    num_ranks = len(of.loads)
    loads, segments, flow = of.loads.copy(), of.segments.copy(), of.flow.copy()
    at_home = loads.copy()
    copies = np.zeros((6, num_ranks), np.int64)
    order, begin = stages(near)
    taken = np.empty((0, 3), np.int64)
    at = 0
    while at < len(chunks_C3):
        e = chunks_C3[at, 0]
        end = at
        while end < len(chunks_C3) and chunks_C3[end, 0] == e:
            end += 1
        owner, supply, total = of.home[e], of.counts_ER[e].copy(), of.counts_ER[e].sum()
        loads[owner] -= total
        at_home[owner] -= total
        segments[owner] -= 1
        for s in range(num_ranks):
            if s != owner:
                far = 0 if of.node[s] == of.node[owner] else 2
                flow[far, s] -= supply[s]
                flow[far + 1, owner] -= supply[s]
        for c in range(at, end):
            q, rows = chunks_C3[c, 1], chunks_C3[c, 2]
            loads[q] += rows
            again = False
            for other in range(at, c):
                again |= chunks_C3[other, 1] == q
            if not again:
                segments[q] += 1
                if q != owner:
                    count(copies, owner, q, of.node[q] == of.node[owner], of.resident_RE[q, e] != 0)
            if q == owner:
                at_home[q] += rows
        if len(taken) < len(near) * (num_ranks + end - at):
            taken = np.empty((len(near) * (num_ranks + end - at), 3), np.int64)
        ranks, demand = chunks_C3[at:end, 1].copy(), chunks_C3[at:end, 2].copy()
        used = pair(supply, ranks, demand, order, begin, near, taken)
        for s, c, rows in taken[:used]:
            q = ranks[c]
            if s != q:
                far = 0 if of.node[s] == of.node[q] else 2
                flow[far, s] += rows
                flow[far + 1, q] += rows
        at = end
    over = max(loads.max() - of.max_rows, 0)
    if copies[5].max() > of.max_guests:
        return np.inf, over
    return seconds(loads, at_home, segments, flow, copies, of.costs).sum(), over


@njit(cache=True)
def _whole(totals, home, chunks_C3):  # type: ignore[no-untyped-def]
    """(expert, rank, rows) of all chunks: these, and all rows of the other experts at home."""
    size = len(totals) + len(chunks_C3)
    expert, rank, rows = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
    used = c = 0
    for e in range(len(totals)):
        if (c == len(chunks_C3) or chunks_C3[c, 0] != e) and totals[e]:
            expert[used], rank[used], rows[used] = e, home[e], totals[e]
            used += 1
        while c < len(chunks_C3) and chunks_C3[c, 0] == e:
            expert[used], rank[used], rows[used] = chunks_C3[c, 0], chunks_C3[c, 1], chunks_C3[c, 2]
            used, c = used + 1, c + 1
    return expert[:used], rank[:used], rows[:used]


@njit(cache=True)
def _search(  # type: ignore[no-untyped-def]
    counts, home, node, resident_RE, costs, max_rows, max_guests, counts_ER, given_ER, chunks_C3
):
    """The chunks of the best plan found, and whether its sources are local first. The last three: workspaces."""
    num_ranks, num_experts = counts.shape
    traffic, totals = np.zeros((num_ranks, num_ranks), np.int64), np.zeros(num_experts, np.int64)
    for s in range(num_ranks):
        for e in range(num_experts):
            traffic[s, home[e]] += counts[s, e]
            totals[e] += counts[s, e]
    loads, segments = traffic.sum(0), np.zeros(num_ranks, np.int64)
    total = loads.sum()
    mean = -(-total // num_ranks)
    if loads.max() <= mean:
        return _whole(totals, home, chunks_C3[:0]), True
    flow = np.zeros((4, num_ranks), np.int64)
    for s in range(num_ranks):
        for q in range(num_ranks):
            if s != q:
                far = 0 if node[s] == node[q] else 2
                flow[far, s] += traffic[s, q]
                flow[far + 1, q] += traffic[s, q]
    begin = np.zeros(num_ranks + 1, np.int64)
    for e in range(num_experts):
        segments[home[e]] += totals[e] > 0
        begin[home[e] + 1] += 1
    begin = np.cumsum(begin)
    order = np.argsort(home, kind="mergesort")
    counts_ER[:] = counts.T
    guests_G2 = np.empty((resident_RE.sum(), 2), np.int64)
    found = 0
    for e in range(num_experts if len(guests_G2) else 0):
        for q in range(num_ranks):
            if resident_RE[q, e]:
                guests_G2[found, 0], guests_G2[found, 1] = e, q
                found += 1
    worth = max(int((costs[12] * costs[5] + costs[6]) / (4 * costs[4])), 1)
    of = Problem(
        counts_ER, totals, home, node, resident_RE, guests_G2, order, begin, loads, segments, flow, costs, max_rows,
        max_guests, worth,
    )  # fmt: skip

    near = np.zeros((3, num_ranks), np.int64)
    near[0], near[1] = np.arange(num_ranks), node

    best_chunks, local_first = chunks_C3[:0].copy(), True
    best, best_over = _judge(of, best_chunks, near)
    good = 0  # the best ceiling so far
    for rule in range(3 if node.max() > 0 else 2):
        for trial in range(9):
            if rule != FEWEST and trial > 1:
                break
            if rule != FEWEST:
                at = (0, good)[trial]
            elif trial < 4:
                at = 4 * trial  # wide steps up the ladder first,
            else:
                at = good + (-2, -1, 1, 2, 0)[trial - 4]  # then around the best
                if at % 4 == 0 or at < 0 or at >= len(CEILINGS):
                    continue
            ceiling = np.int64(mean * CEILINGS[at])
            over = max(ceiling - max_rows, 0)
            beaten = over > best_over or (over == best_over and ceiling * (costs[0] + costs[1]) >= best)
            if beaten or ceiling >= loads.max():
                continue
            used = _place(of, ceiling, rule, given_ER, chunks_C3)
            time, over = _judge(of, chunks_C3[:used], near)
            if over < best_over or (over == best_over and time < best):
                best, best_over, best_chunks, good = time, over, chunks_C3[:used].copy(), at
    if total and loads.max() * num_ranks >= PAPER_THRESHOLD * total:
        expert, rank, rows = spread(totals, home, num_ranks, 1.0, PAPER_MIN_ROWS)
        away = np.zeros(num_experts, np.bool_)
        for c in range(len(expert)):
            away[expert[c]] |= rank[c] != home[expert[c]]
        paper = np.stack((expert, rank, rows), 1)[away[expert]]
        for local in range(1, -1 if node.max() > 0 else 0, -1):  # in one node, local first is never worse
            time, over = _judge(of, paper, near if local else near[2:])
            if over < best_over or (over == best_over and time < best):
                best, best_over, best_chunks, local_first = time, over, paper.copy(), local == 1

    return _whole(totals, home, best_chunks), local_first


@lru_cache(maxsize=4)
def _workspace(num_ranks: int, num_experts: int) -> tuple[Ints, ...]:
    """Memory that every call uses again: on some machines new pages cost more than planning."""
    shapes = (num_ranks, num_experts), (num_experts, num_ranks), (num_experts, num_ranks)
    return *(np.zeros(s, np.int64) for s in shapes), np.empty((num_experts * (num_ranks + 1), 3), np.int64)


def makespan(
    counts: Ints,
    home: Ints,
    costs: Costs | None = None,
    limits: Limits | None = None,
    state: State | None = None,
) -> Plan:
    """counts [R, E] rows, home [E]; without `costs`, those of the reference machine (`cost.default_costs`).

    Within `limits` if there is a plan that is; else the plan with the fewest rows above them.
    """
    costs, limits = costs or default_costs(), limits or Limits()
    num_ranks = counts.shape[0]
    node = costs.node(num_ranks)
    resident = state.resident if state is not None else None
    nobody, *workspace = _workspace(*counts.shape)
    chunks, local_first = _search(
        np.ascontiguousarray(counts, np.int64),
        np.ascontiguousarray(home, np.int64),
        node,
        nobody if resident is None else resident,
        costs.vector(),
        NO_LIMIT if limits.rows is None else limits.rows,
        NO_LIMIT if limits.guests is None else limits.guests,
        *workspace,
    )
    near = (np.arange(num_ranks), node) if local_first else ANYWHERE
    return Plan(counts, home, *chunks, near)


makespan(np.eye(2, dtype=np.int64), np.arange(2))  # compiles it now, or loads what an earlier process compiled
