"""makespan: the plan with the least predicted layer time under measured costs (`moe/cost.py`). Nothing to set.

A ceiling on the rows of a rank is tried from the mean load upwards. Under each, ranks above it give rows to ranks
below it, largest surplus to largest room, so that every step settles a rank or an expert: few guests. Sources are
local first: a rank that hosts a guest takes its own rows of it before any that have to travel. Variants lend where
many local rows lie, leave every rank its own rows, or lend inside a node. The predicted time decides between all of
them, the plan of `home`, and that of `llep` with the paper's settings; so no limit, factor or threshold is set by hand.

R ranks, E experts, G guests resident, C chunks: rows of (expert, rank, rows), experts ascending.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from moetrain.moe.compiled import njit
from moetrain.moe.planning.cost import Costs, Limits, State, count, cross, default_costs, seconds, travel
from moetrain.moe.planning.llep import spread
from moetrain.moe.planning.plan import ANYWHERE, Floats, Ints, Plan

CEILINGS = np.array([1.0, 1.005, 1.01, 1.02, 1.035, 1.06, 1.1, 1.16, 1.25, 1.4, 1.6, 2.0, 2.5, 3.2, 4.5])  # × mean
FEWEST, LOCAL, STAY, SAME_NODE = 0, 1, 2, 3  # rules of `_place`
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
    last: Ints  # [E] the latest chunk of each expert, or -1
    links_C2: Ints  # (the one before it, its rank)


@njit()
def _give(of, work, used, expert, rank, rows):  # type: ignore[no-untyped-def]
    """Rows of an expert from its home to `rank`. Returns the number of chunks so far."""
    if work.given_ER[expert, rank] == 0:
        work.slots[rank] += 1
        work.links_C2[used, 0], work.links_C2[used, 1], work.last[expert] = work.last[expert], rank, used
        used += 1
    work.given_ER[expert, rank] += rows
    work.left[expert] -= rows
    work.load[of.home[expert]] -= rows
    work.load[rank] += rows
    return used


@njit()
def _give_local(of, work, used, ceiling):  # type: ignore[no-untyped-def]
    """To where the most rows of an expert lie already, as long as that saves more travel than lending costs."""
    num_ranks = len(of.loads)
    for p in range(num_ranks):
        first, end = of.begin[p], of.begin[p + 1]
        if work.load[p] - ceiling < of.worth:
            continue
        keys = np.empty((end - first) * num_ranks, np.int64)  # most rows first, then by expert, then by rank
        found = 0
        for at in range(first, end):
            e = of.order[at]
            for q in range(num_ranks):
                if q != p and work.load[q] < ceiling and of.counts_ER[e, q] - work.given_ER[e, q] >= of.worth:
                    keys[found] = (at - first) * num_ranks + q - of.counts_ER[e, q] * len(keys)
                    found += 1
        keys[:found].sort()
        for key in keys[:found]:
            e, q = of.order[first + key % len(keys) // num_ranks], key % num_ranks
            rest = of.counts_ER[e, q] - work.given_ER[e, q]
            part = min(work.load[p] - ceiling, ceiling - work.load[q], work.left[e], rest)
            if part >= of.worth and (work.given_ER[e, q] or work.slots[q] < of.max_guests):
                used = _give(of, work, used, e, q, part)
    return used


@njit()
def _give_own(of, work, used):  # type: ignore[no-untyped-def]
    """To every rank its own rows of every expert, full or not, as long as that saves more travel than lending costs."""
    for e in range(len(of.home)):
        for q in range(len(of.loads)):
            rest = of.counts_ER[e, q] - work.given_ER[e, q]
            if rest >= of.worth and q != of.home[e] and (work.given_ER[e, q] or work.slots[q] < of.max_guests):
                used = _give(of, work, used, e, q, min(rest, work.left[e]))
    return used


@njit()
def _give_most(of, work, used, ceiling, same_node):  # type: ignore[no-untyped-def]
    """From the fullest rank to the emptiest, of its own node first if so wanted, until none is above `ceiling`."""
    load, node = work.load, of.node
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
        for each in of.order[of.begin[p] : of.begin[p + 1]]:  # one that has so many, and most of them at q already
            if work.given_ER[each, q] == 0 and work.slots[q] >= of.max_guests:
                continue
            fit = min(work.left[each], amount)
            local = min(of.counts_ER[each, q], fit)
            if fit > best_fit or (fit == best_fit and local > best_local):
                e, best_fit, best_local = each, fit, local
        if best_fit > 0:
            used = _give(of, work, used, e, q, best_fit)
        else:
            full[q] = True


@njit()
def _place(of, ceiling, rule, given_ER, links_C2, chunks_C3):  # type: ignore[no-untyped-def]
    """Move rows until no rank is above `ceiling` or nothing can move. Returns the number of chunks written, those of
    the experts that gave any; none where `rule` has no effect. given_ER [E, R], links_C2: workspaces, the first zero
    before and after.
    """
    load, left, slots = of.loads.copy(), of.totals.copy(), np.zeros(len(of.loads), np.int64)
    last = np.full(len(left), -1)
    work = Work(load, left, slots, given_ER, last, links_C2)
    used: Any = np.int64(0)
    for e, q in of.guests_G2:  # they cost nothing
        part = min(load[of.home[e]] - ceiling, ceiling - load[q], left[e])
        if part > 0 and slots[q] < of.max_guests:
            used = _give(of, work, used, e, q, part)
    free = used
    if rule == LOCAL:
        used = _give_local(of, work, used, ceiling)
    elif rule == STAY:
        used = _give_own(of, work, used)
    no_effect = rule in (LOCAL, STAY) and used == free
    if not no_effect:
        used = _give_most(of, work, used, ceiling, rule == SAME_NODE)

    used = 0
    for e in range(len(left)):
        at = last[e]
        if at >= 0 and left[e] > 0:
            chunks_C3[used, 0], chunks_C3[used, 1], chunks_C3[used, 2] = e, of.home[e], left[e]
            used += 1
        while at >= 0:
            q = links_C2[at, 1]
            chunks_C3[used, 0], chunks_C3[used, 1], chunks_C3[used, 2] = e, q, given_ER[e, q]
            given_ER[e, q] = 0
            used, at = used + 1, links_C2[at, 0]
    return 0 if no_effect else used


@njit()
def _judge(of, chunks_C3, local_first, best, best_over):  # type: ignore[no-untyped-def]
    """(predicted seconds, rows above the limit) of the home plan with these experts' chunks instead; infinite as
    soon as it cannot be better than the best. A guest too many on a rank counts like rows without end."""
    num_ranks = len(of.loads)
    loads, at_home, segments, flow = of.loads.copy(), of.loads.copy(), of.segments.copy(), of.flow.copy()
    copies, slots = np.zeros((2, 4, num_ranks)), np.zeros(num_ranks, np.int64)
    placed, new = np.full(num_ranks, -1), np.empty(num_ranks, np.int64)
    at = 0
    while at < len(chunks_C3):
        e = chunks_C3[at, 0]
        owner, num_new = of.home[e], 0
        loads[owner] -= of.totals[e]
        at_home[owner] -= of.totals[e]
        segments[owner] -= 1
        for s in range(num_ranks):
            cross(flow, of.node, s, owner, -of.counts_ER[e, s])
        while at < len(chunks_C3) and chunks_C3[at, 0] == e:
            q, rows = chunks_C3[at, 1], chunks_C3[at, 2]
            loads[q] += rows
            if q == owner:
                at_home[q] += rows
            if placed[q] != e:
                placed[q] = e
                segments[q] += 1
                slots[q] += q != owner
                if q != owner and of.resident_RE[q, e] == 0:
                    new[num_new] = q
                    num_new += 1
            at += 1
        count(copies, owner, new[:num_new], of.node)
    over = max(loads.max() - of.max_rows, 0) if slots.max() <= of.max_guests else NO_LIMIT
    if over > best_over:
        return np.inf, over
    if over == best_over and seconds(loads, at_home, segments, flow, copies, of.costs).sum() >= best:
        return np.inf, over  # without the rows of these experts on any link
    travel(of.counts_ER, of.node, chunks_C3, local_first, flow)
    return seconds(loads, at_home, segments, flow, copies, of.costs).sum(), over


@njit()
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


@njit()
def _problem(counts, home, node, resident_RE, guests_G2, costs, max_rows, max_guests, counts_ER):  # type: ignore[no-untyped-def]
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
            cross(flow, node, s, q, traffic[s, q])
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
    worth = max(int((costs[12] * costs[5] + costs[6]) / (4 * costs[4])), 1)
    return Problem(
        counts_ER, totals, home, node, resident_RE, guests_G2, order, begin, loads, segments, flow, costs, max_rows,
        max_guests, worth,
    )  # fmt: skip


@njit()
def _search(of, given_ER, links_C2, chunks_C3):  # type: ignore[no-untyped-def]
    """The chunks of the best plan found, and whether its sources are local first. The last three: workspaces."""
    totals, home, loads = of.totals, of.home, of.loads
    num_ranks, num_experts = len(loads), len(home)
    mean = -(-loads.sum() // num_ranks)
    lopsided = loads.max() * num_ranks / max(loads.sum(), 1) >= PAPER_THRESHOLD  # enough for llep
    if loads.max() <= mean and not lopsided:
        return _whole(totals, home, chunks_C3[:0]), np.int64(1)
    one_node = 1 if of.node.max() == 0 else 0
    near: Any = np.int64(1)  # no literals in the calls: numba compiles a function once for each
    local_first = near
    best_chunks = chunks_C3[:0].copy()
    best, best_over = _judge(of, best_chunks, near, np.inf, np.int64(NO_LIMIT))
    good = centre = 0  # the best ceiling so far, and when the rule or the step changed
    for rule in range(4 if one_node == 0 else 3):
        for trial in range(8 if rule == FEWEST else 2):
            if trial == 0 or (rule == FEWEST and trial % 2 == 0):
                centre = good
            if rule != FEWEST:
                at = 0 if trial == 0 else centre
            elif trial < 4:
                at = 4 * trial  # wide steps up the ladder first, then two and one around the best
            else:
                at = centre + (-2, 2, -1, 1)[trial - 4]
            if at < 0 or at >= len(CEILINGS) or (rule != FEWEST and trial == 1 and at == 0):
                continue
            ceiling = max(min(np.int64(mean * CEILINGS[at]), of.max_rows), mean)
            if ceiling >= loads.max() or (best_over == 0 and ceiling * (of.costs[0] + of.costs[1]) >= best):
                continue
            used = _place(of, ceiling, rule, given_ER, links_C2, chunks_C3)
            time, over = _judge(of, chunks_C3[:used], near, best, best_over)
            if over < best_over or (over == best_over and time < best):
                best, best_over, best_chunks, good = time, over, chunks_C3[:used].copy(), at
    if lopsided:
        expert, rank, rows = spread(totals, home, num_ranks, 1.0, PAPER_MIN_ROWS)
        away = np.zeros(num_experts, np.bool_)
        for c in range(len(expert)):
            away[expert[c]] |= rank[c] != home[expert[c]]
        used = 0
        for c in range(len(expert)):
            if away[expert[c]]:
                chunks_C3[used, 0], chunks_C3[used, 1], chunks_C3[used, 2] = expert[c], rank[c], rows[c]
                used += 1
        for local in range(1, one_node - 1, -1):  # in one node, local first is never worse
            time, over = _judge(of, chunks_C3[:used], local, best, best_over)
            if over < best_over or (over == best_over and time < best):
                best, best_over, best_chunks, local_first = time, over, chunks_C3[:used].copy(), local

    return _whole(totals, home, best_chunks), local_first


@lru_cache(maxsize=4)
def _workspace(num_ranks: int, num_experts: int) -> tuple[Ints, ...]:
    """Memory that every call uses again: on some machines new pages cost more than planning."""
    most = num_experts * (num_ranks + 1)  # chunks
    shapes = (num_experts, num_ranks), (num_experts, num_ranks), (most, 2), (most, 3)
    return tuple(np.zeros(shape, np.int64) for shape in shapes)


@lru_cache(maxsize=4)
def _nobody(num_ranks: int, num_experts: int) -> tuple[Ints, Ints]:
    return np.zeros((num_ranks, num_experts), np.int64), np.zeros((0, 2), np.int64)


def makespan(
    counts: Ints,
    home: Ints,
    costs: Costs | None = None,
    limits: Limits | None = None,
    state: State | None = None,
) -> Plan:
    """counts [R, E] rows, home [E]; without `costs`, those of the reference machine (`cost.default_costs`).

    Within `limits` if a plan that is was found; else the one whose fullest rank is the least above them.
    """
    costs, limits = costs or default_costs(), limits or Limits()
    num_ranks, num_experts = counts.shape
    node = costs.node(num_ranks)
    resident, guests = _nobody(num_ranks, num_experts)
    if state is not None and state.resident is not None:
        resident = np.ascontiguousarray(state.resident, np.int64)
        guests = np.argwhere(resident.T & (home[:, None] != np.arange(num_ranks)))
    counts_ER, *workspace = _workspace(num_ranks, num_experts)
    of = _problem(
        np.ascontiguousarray(counts, np.int64),
        np.ascontiguousarray(home, np.int64),
        node,
        resident,
        guests,
        costs.vector(),
        NO_LIMIT if limits.rows is None else limits.rows,
        NO_LIMIT if limits.guests is None else limits.guests,
        counts_ER,
    )
    (expert, rank, num_rows), local_first = _search(of, *workspace)
    near = (np.arange(num_ranks), node) if local_first else ANYWHERE
    return Plan(counts, home, expert, rank, num_rows, near)


makespan(np.eye(2, dtype=np.int64), np.arange(2))  # compiles it now, or loads what an earlier process compiled
