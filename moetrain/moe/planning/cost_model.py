"""The compiled half of the cost model (`cost`): what crosses which link, and the seconds that all of it takes.

Compiled by numba and called from the planners' inner loops, so arguments are arrays and named tuples, never objects.

R ranks, E experts, C chunks, G guests of one expert.
"""

from typing import Any, NamedTuple

import numpy as np
from numba.np.unsafe.ndarray import to_fixed_tuple

from moetrain.moe.compiled import njit

RELAY_FROM = 3  # guests of one expert; for two, the second phase takes half of what the owner's link gains


class CostFigures(NamedTuple):
    """The numbers of `cost.Costs` for compiled code, in seconds, bytes, and bytes a second."""

    row_forward: float
    row_backward: float
    segment_forward: float
    segment_backward: float
    row_bytes: float
    weight_bytes: float
    gradient_bytes: float
    inside_latency: float
    inside_bandwidth: float
    between_latency: float
    between_bandwidth: float
    overlap: float
    lends: float
    handling: float


NUM_FIGURES = len(CostFigures._fields)


@njit()
def name_figures(vector):  # type: ignore[no-untyped-def]
    """Return the `CostFigures` of a vector [14] as `Costs.vector` makes it.

    Compiled functions are handed the vector: numba takes 5 µs to recognize a named tuple that comes from Python.
    """
    return CostFigures(*to_fixed_tuple(vector, NUM_FIGURES))  # type: ignore[call-arg]  # numba adds the first one


@njit()
def add_loan(copies, owner, guests, node):  # type: ignore[no-untyped-def]
    """Add the loan of one expert from `owner` to the ranks `guests` [G] that do not have it yet. node [R].

    copies [2 phases, 4, R], in experts: out and in, inside a node and between. Below `RELAY_FROM` guests, the owner
    sends each of them the whole expert. From there on it sends each a slice of 1/G of its own, and then every guest
    sends its slice to the G - 1 others: one expert out of the owner; 1/G and (G - 1)/G into each guest, (G - 1)/G out.
    """
    num_guests = len(guests)
    in_node = np.zeros(len(node), np.int64)
    for q in guests:
        in_node[node[q]] += 1
    relayed = num_guests >= RELAY_FROM
    part = 1 / num_guests if relayed else 1.0
    copies[0, 0, owner] += in_node[node[owner]] * part
    copies[0, 2, owner] += (num_guests - in_node[node[owner]]) * part
    for q in guests:
        copies[0, 1 if node[q] == node[owner] else 3, q] += part
        if relayed:
            beside = in_node[node[q]] - 1
            for way in range(2):
                copies[1, way, q] += beside * part
                copies[1, 2 + way, q] += (num_guests - 1 - beside) * part


@njit()
def add_crossing(flow, node, source, rank, rows):  # type: ignore[no-untyped-def]
    """Add rows from `source` to `rank` to flow [4, R]: out and in, inside a node and between."""
    if source != rank:
        far = 0 if node[source] == node[rank] else 2
        flow[far, source] += rows
        flow[far + 1, rank] += rows


@njit()
def add_travel(counts_ER, node, chunks_C3, local_first, flow):  # type: ignore[no-untyped-def]
    """Add the rows of these chunks to flow [4, R], as `predict_seconds` takes it.

    counts_ER [E, R] rows at each source; chunks_C3 (expert, rank, rows), experts ascending. The same rows as
    `plan.pair` gives, but only how many cross what: those left over inside a node go to other nodes, no matter which.
    """
    num_ranks = len(node)
    supply, demand = np.empty(num_ranks, np.int64), np.empty(len(chunks_C3), np.int64)  # llep may visit a rank twice
    given, wanted = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)  # in each node
    at = 0
    while at < len(chunks_C3):
        e = chunks_C3[at, 0]
        for s in range(num_ranks):
            supply[s] = counts_ER[e, s]
            given[node[s]] = wanted[node[s]] = 0
        if not local_first:  # sources and chunks in their order
            source: Any = np.int64(0)
            while at < len(chunks_C3) and chunks_C3[at, 0] == e:
                q, rest = chunks_C3[at, 1], chunks_C3[at, 2]
                while rest > 0:
                    part = min(supply[source], rest)
                    add_crossing(flow, node, source, q, part)
                    supply[source] -= part
                    rest -= part
                    source += supply[source] == 0
                at += 1
            continue
        first = at
        while at < len(chunks_C3) and chunks_C3[at, 0] == e:
            q = chunks_C3[at, 1]
            own = min(supply[q], chunks_C3[at, 2])
            supply[q] -= own
            demand[at - first] = chunks_C3[at, 2] - own
            wanted[node[q]] += demand[at - first]
            at += 1
        for s in range(num_ranks):
            part = min(supply[s], wanted[node[s]])
            wanted[node[s]] -= part
            given[node[s]] += part
            flow[0, s] += part
            flow[2, s] += supply[s] - part
        for c in range(at - first):
            q = chunks_C3[first + c, 1]
            part = min(demand[c], given[node[q]])
            given[node[q]] -= part
            flow[1, q] += part
            flow[3, q] += demand[c] - part


@njit()
def predict_seconds(loads, at_home, segments, flow, copies, costs):  # type: ignore[no-untyped-def]
    """Returns seconds [4]: dispatch, lend, compute, combine. `costs`: `CostFigures`.

    loads, at_home, segments [R]: rows, rows of own experts, experts with rows. flow [4, R]: rows out and in, inside
    the node and between nodes. copies [2, 4, R] as `add_loan` makes them. A phase takes as long as the fullest
    direction of the slowest rank; the second starts after the first. Gradients come home the same ways, backwards.
    """
    row, segment = costs.row_forward + costs.row_backward, costs.segment_forward + costs.segment_backward
    compute, idle = 0.0, np.inf  # idle: the least own work that a borrower can do while it waits
    for r in range(len(loads)):
        compute = max(compute, loads[r] * row + segments[r] * segment)
        if copies[0, 1, r] or copies[0, 3, r]:
            idle = min(idle, at_home[r] * row)
    wait, per_byte = _slowest(flow, costs)
    way = 2 * (wait + costs.row_bytes * per_byte)  # there and back cost the same: out and in change places
    exposed = 0.0
    for phase in range(2):
        wait, per_byte = _slowest(copies[phase], costs)
        exposed += (costs.lends + 1) * wait + (costs.lends * costs.weight_bytes + costs.gradient_bytes) * per_byte
    if exposed > 0:
        exposed -= min(costs.overlap * exposed, idle)
        most = 0.0
        for r in range(len(loads)):
            handled = 0.0
            for side in range(4):  # .sum(0) would take seconds to compile
                handled += copies[0, side, r] + copies[1, side, r]
            most = max(most, handled)
        exposed += costs.handling * most
    return np.array([way, exposed, compute, way])


@njit()
def _slowest(amounts, costs):  # type: ignore[no-untyped-def]
    """(latency, seconds for one byte of each unit) where amounts [4, R] go out and in, inside nodes and between."""
    wait = per_byte = 0.0
    for r in range(amounts.shape[1]):
        inside, outside = max(amounts[0, r], amounts[1, r]), max(amounts[2, r], amounts[3, r])
        if inside > 0:
            wait = max(wait, costs.inside_latency)
        if outside > 0:
            wait = max(wait, costs.between_latency)
        per_byte = max(per_byte, inside / costs.inside_bandwidth, outside / costs.between_bandwidth)
    return wait, per_byte


@njit()
def predict_from_vector(loads, at_home, segments, flow, copies, vector):  # type: ignore[no-untyped-def]
    """Run `predict_seconds` for a caller outside of compiled code; `vector` [14] as `Costs.vector` makes it."""
    return predict_seconds(loads, at_home, segments, flow, copies, name_figures(vector))
