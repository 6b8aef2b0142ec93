"""makespan: the plan with the least predicted layer time under measured costs (`moe/cost.py`). Nothing to set.

A ceiling on the rows of a rank is tried from the mean load upwards. Under each, ranks above it give rows to ranks
below it, largest surplus to largest room, so that every step settles a rank or an expert: few guests. Sources are
local first: a rank that hosts a guest takes its own rows of it before any that have to travel. Variants lend where
many local rows lie, leave every rank its own rows, or lend inside a node. The predicted time decides between all of
them, the plan of `home`, and that of `llep` with the paper's settings; so no limit, factor or threshold is set by hand.

R ranks, E experts, G guests resident, C chunks: rows of (expert, rank, rows), experts ascending.
"""

from functools import lru_cache
from typing import Any

import numpy as np

from moetrain.moe.compiled import njit
from moetrain.moe.planning.cost import Costs, Limits, State, default_costs
from moetrain.moe.planning.cost_model import add_crossing, add_loan, add_travel, predict_seconds
from moetrain.moe.planning.llep import spread
from moetrain.moe.planning.place_rows import FEWEST, make_problem, place_rows
from moetrain.moe.planning.plan import ANYWHERE, Ints, Plan

CEILINGS = np.array([1.0, 1.005, 1.01, 1.02, 1.035, 1.06, 1.1, 1.16, 1.25, 1.4, 1.6, 2.0, 2.5, 3.2, 4.5])  # × mean
PAPER_THRESHOLD, PAPER_MIN_ROWS = 1.3, 1024  # llep's λ and m; α = 1
NO_LIMIT = 1 << 60


@njit()
def judge_chunks(problem, chunks_C3, local_first, best, best_over):  # type: ignore[no-untyped-def]
    """Return (predicted seconds, rows above the limit) of the home plan with these experts' chunks instead; infinite as
    soon as it cannot be better than the best. A guest too many on a rank counts like rows without end."""
    num_ranks = len(problem.loads)
    loads, at_home, segments, flow = (
        problem.loads.copy(),
        problem.loads.copy(),
        problem.segments.copy(),
        problem.flow.copy(),
    )
    copies, slots = np.zeros((2, 4, num_ranks)), np.zeros(num_ranks, np.int64)
    placed, new = np.full(num_ranks, -1), np.empty(num_ranks, np.int64)
    at = 0
    while at < len(chunks_C3):
        e = chunks_C3[at, 0]
        owner, num_new = problem.home[e], 0
        loads[owner] -= problem.totals[e]
        at_home[owner] -= problem.totals[e]
        segments[owner] -= 1
        for s in range(num_ranks):
            add_crossing(flow, problem.node, s, owner, -problem.counts_ER[e, s])
        while at < len(chunks_C3) and chunks_C3[at, 0] == e:
            q, rows = chunks_C3[at, 1], chunks_C3[at, 2]
            loads[q] += rows
            if q == owner:
                at_home[q] += rows
            if placed[q] != e:
                placed[q] = e
                segments[q] += 1
                slots[q] += q != owner
                if q != owner and problem.resident_RE[q, e] == 0:
                    new[num_new] = q
                    num_new += 1
            at += 1
        add_loan(copies, owner, new[:num_new], problem.node)
    over = max(loads.max() - problem.max_rows, 0) if slots.max() <= problem.max_guests else NO_LIMIT
    if over > best_over:
        return np.inf, over
    if over == best_over and predict_seconds(loads, at_home, segments, flow, copies, problem.costs).sum() >= best:
        return np.inf, over  # without the rows of these experts on any link
    add_travel(problem.counts_ER, problem.node, chunks_C3, local_first, flow)
    return predict_seconds(loads, at_home, segments, flow, copies, problem.costs).sum(), over


@njit()
def complete_chunks(totals, home, chunks_C3):  # type: ignore[no-untyped-def]
    """Return (expert, rank, rows) of all chunks: these, and all rows of the other experts at home."""
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
def search_chunks(problem, given_ER, links_C2, chunks_C3):  # type: ignore[no-untyped-def]
    """Return the chunks of the best plan found, and whether its sources are local first.

    `problem` as `make_problem` makes it; the others are workspaces.
    """
    totals, home, loads = problem.totals, problem.home, problem.loads
    num_ranks, num_experts = len(loads), len(home)
    mean = -(-loads.sum() // num_ranks)
    lopsided = loads.max() * num_ranks / max(loads.sum(), 1) >= PAPER_THRESHOLD  # enough for llep
    if loads.max() <= mean and not lopsided:
        return complete_chunks(totals, home, chunks_C3[:0]), np.int64(1)
    one_node = 1 if problem.node.max() == 0 else 0
    near: Any = np.int64(1)  # no literals in the calls: numba compiles a function once for each
    local_first = near
    best_chunks = chunks_C3[:0].copy()
    best, best_over = judge_chunks(problem, best_chunks, near, np.inf, np.int64(NO_LIMIT))
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
            ceiling = max(min(np.int64(mean * CEILINGS[at]), problem.max_rows), mean)
            if ceiling >= loads.max() or (
                best_over == 0 and ceiling * (problem.costs.row_forward + problem.costs.row_backward) >= best
            ):
                continue
            used = place_rows(problem, ceiling, rule, given_ER, links_C2, chunks_C3)
            time, over = judge_chunks(problem, chunks_C3[:used], near, best, best_over)
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
            time, over = judge_chunks(problem, chunks_C3[:used], local, best, best_over)
            if over < best_over or (over == best_over and time < best):
                best, best_over, best_chunks, local_first = time, over, chunks_C3[:used].copy(), local

    return complete_chunks(totals, home, best_chunks), local_first


@lru_cache(maxsize=4)
def _workspace(num_ranks: int, num_experts: int) -> tuple[Ints, ...]:
    """Return memory that every call uses again: on some machines new pages cost more than planning."""
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
    """Return the plan with the least predicted layer time. counts [R, E] rows, home [E].

    Without `costs`, those of the reference machine (`cost.default_costs`).

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
    problem = make_problem(
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
    (expert, rank, num_rows), local_first = search_chunks(problem, *workspace)
    near = (np.arange(num_ranks), node) if local_first else ANYWHERE
    return Plan(counts, home, expert, rank, num_rows, near)


makespan(np.eye(2, dtype=np.int64), np.arange(2))  # compiles it now, or loads what an earlier process compiled
