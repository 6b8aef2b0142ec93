"""What a plan costs: predicted seconds of one MoE layer, forward and backward. Pure, no torch.

The model, with everything measured by `moetrain profile`:

- compute: the slowest rank's rows times the seconds of a row, plus a fixed time for every expert it computes;
- dispatch and combine: rows that cross a link, forward (x out, y back) and backward (dy out, dx back). A rank's time
  is that of its fuller direction; links inside a node and between nodes work at the same time;
- lend: expert weights to their guests and fp32 gradients home, minus what the guests' own rows hide. An expert with
  many guests is relayed: its owner sends every guest another slice, and the guests exchange slices.

R ranks, E experts.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from moetrain.moe.compiled import njit
from moetrain.moe.planning.plan import Floats, Ints, Plan

RELAY_FROM = 3  # guests of one expert; for two, the second phase takes half of what the owner's link gains


@njit()
def count(copies, owner, guests, node):  # type: ignore[no-untyped-def]
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
def cross(flow, node, source, rank, rows):  # type: ignore[no-untyped-def]
    """Add rows from `source` to `rank` to flow [4, R]: out and in, inside a node and between."""
    if source != rank:
        far = 0 if node[source] == node[rank] else 2
        flow[far, source] += rows
        flow[far + 1, rank] += rows


@njit()
def travel(counts_ER, node, chunks_C3, local_first, flow):  # type: ignore[no-untyped-def]
    """Add the rows of these chunks to flow [4, R], as `seconds` takes it.

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
                    cross(flow, node, source, q, part)
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
def seconds(loads, at_home, segments, flow, copies, costs):  # type: ignore[no-untyped-def]
    """(dispatch, lend, compute, combine).

    loads, at_home, segments [R]: rows, rows of own experts, experts with rows. flow [4, R]: rows out and in, inside
    the node and between nodes. copies [2, 4, R] as `count` makes them. A phase takes as long as the fullest direction
    of the slowest rank; the second starts after the first. Gradients come home the same ways, backwards.
    """
    row, row_back, segment, segment_back, row_bytes, weight, gradient = costs[:7]
    near_wait, near_rate, far_wait, far_rate, overlap, lends, handling = costs[7:]
    compute, idle = 0.0, np.inf  # idle: the least own work that a borrower can do while it waits
    for r in range(len(loads)):
        compute = max(compute, loads[r] * (row + row_back) + segments[r] * (segment + segment_back))
        if copies[0, 1, r] or copies[0, 3, r]:
            idle = min(idle, at_home[r] * (row + row_back))
    wait, travel = _slowest(flow, near_wait, near_rate, far_wait, far_rate)
    way = 2 * (wait + row_bytes * travel)  # there and back cost the same: out and in change places
    exposed = 0.0
    for phase in range(2):
        wait, travel = _slowest(copies[phase], near_wait, near_rate, far_wait, far_rate)
        exposed += (lends + 1) * wait + (lends * weight + gradient) * travel
    if exposed > 0:
        exposed -= min(overlap * exposed, idle)
        most = 0.0
        for r in range(len(loads)):
            handled = 0.0
            for side in range(4):  # .sum(0) would take seconds to compile
                handled += copies[0, side, r] + copies[1, side, r]
            most = max(most, handled)
        exposed += handling * most
    return np.array([way, exposed, compute, way])


@njit()
def _slowest(amounts, near_wait, near_rate, far_wait, far_rate):  # type: ignore[no-untyped-def]
    """(latency, seconds for one byte of each unit) where amounts [4, R] go out and in, inside nodes and between."""
    wait = travel = 0.0
    for r in range(amounts.shape[1]):
        inside, outside = max(amounts[0, r], amounts[1, r]), max(amounts[2, r], amounts[3, r])
        if inside > 0:
            wait = max(wait, near_wait)
        if outside > 0:
            wait = max(wait, far_wait)
        travel = max(travel, inside / near_rate, outside / far_rate)
    return wait, travel


@dataclass(frozen=True)
class Link:
    """One message of b bytes takes `latency + b / bandwidth` seconds."""

    latency: float  # seconds
    bandwidth: float  # bytes a second, each direction


class Measured(NamedTuple):
    """Seconds of a part of the layer (`kernels.PARTS`) with our kernels and with torch's."""

    part: str
    own: float
    torch: float

    @property
    def torch_is_faster(self) -> bool:
        """Clearly: near a tie every run is to decide alike."""
        return 1.15 * self.torch < self.own


@dataclass(frozen=True)
class Costs:
    """What the planner knows about the machine and the layer. Seconds and bytes."""

    row_forward: float  # seconds for one row of one expert
    row_backward: float
    segment_forward: float  # seconds that an expert with rows costs on top of them
    segment_backward: float
    row_bytes: int  # what a row weighs on a link; less than a token, where tokens have several experts on a rank
    weight_bytes: int  # an expert, lent
    gradient_bytes: int  # its gradient, coming home
    inside: Link  # links inside a node
    between: Link  # links between nodes
    overlap: float  # share of lending that can pass while rows are computed, 0 to 1
    handling: float = 0.0  # seconds that a guest costs its owner and its borrower besides its bytes
    lends: int = 1  # times that a guest's weights travel per forward and backward: 2 where backward lends again
    nodes: tuple[int, ...] = ()  # the node of each rank, consecutive numbers from 0; empty: 8 ranks a node
    kernels: tuple[Measured, ...] = ()  # which kernels the other figures are of; no part: ours

    @property
    def by_torch(self) -> list[str]:
        """The parts that torch computes clearly faster here, hence in every run with these costs."""
        return [each.part for each in self.kernels if each.torch_is_faster]

    def node(self, num_ranks: int) -> Ints:
        """[R] the node of each rank."""
        if len(self.nodes) == num_ranks:
            return np.array(self.nodes, np.int64)
        return np.arange(num_ranks, dtype=np.int64) // 8

    def vector(self) -> Floats:
        """The numbers, in the order in which `seconds` unpacks them."""
        return np.array(
            [
                self.row_forward,
                self.row_backward,
                self.segment_forward,
                self.segment_backward,
                self.row_bytes,
                self.weight_bytes,
                self.gradient_bytes,
                self.inside.latency,
                self.inside.bandwidth,
                self.between.latency,
                self.between.bandwidth,
                self.overlap,
                self.lends,
                self.handling,
            ]
        )


@dataclass(frozen=True)
class LayerTime:
    """Predicted seconds of one layer, forward and backward together; each phase is that of the slowest rank."""

    dispatch: float
    lend: float  # the part that nothing hides
    compute: float
    combine: float

    @property
    def total(self) -> float:
        return self.dispatch + self.lend + self.compute + self.combine


@dataclass(frozen=True)
class Limits:
    """What a rank can hold. None: no limit."""

    rows: int | None = None  # rows per rank
    guests: int | None = None  # guest slots per rank


@dataclass(frozen=True)
class State:
    """What the planner may know from before."""

    resident: Ints | None = None  # [R, E] one where the rank holds that expert as a guest already
    past: Floats | None = None  # [E] average loads of past steps


def default_costs() -> Costs:
    """The reference machine: nodes of 8 H100 with NVLink and a 400 Gbit/s link each; the gpt-oss-120b layer in bf16.

    D = H = 2880: 50 MFLOP a row forward at 600 TFLOP/s, 50 MB an expert, half of whose reading at 3 TB/s a segment
    pays. Two thirds of the nominal link rates.
    """
    width = hidden = 2880
    weights = 3 * width * hidden
    return Costs(
        row_forward=2 * weights / 600e12,
        row_backward=4 * weights / 600e12,
        segment_forward=8e-6,
        segment_backward=20e-6,
        row_bytes=2 * width,
        weight_bytes=2 * weights,
        gradient_bytes=4 * weights,
        inside=Link(20e-6, 300e9),
        between=Link(30e-6, 33e9),
        overlap=0.8,
        handling=50e-6,
    )


def layer_time(plan: Plan, counts: Ints, home: Ints, costs: Costs, resident: Ints | None = None) -> LayerTime:
    """Predicted seconds of `plan` for counts [R, E] and home [E]; `resident` [R, E] guests are lent already."""
    num_ranks = counts.shape[0]
    node = costs.node(num_ranks)
    traffic = plan.traffic.copy()
    np.fill_diagonal(traffic, 0)
    near = node[:, None] == node[None, :]
    flow = np.stack([(traffic * m).sum(axis) for m in (near, ~near) for axis in (1, 0)])
    segments, at_home = np.zeros(num_ranks, np.int64), np.zeros(num_ranks, np.int64)
    placed = np.unique(np.stack([plan.expert, plan.rank]), axis=1)
    np.add.at(segments, placed[1], 1)
    local = plan.rank == home[plan.expert]
    np.add.at(at_home, plan.rank[local], plan.num_rows[local])
    copies = np.zeros((2, 4, num_ranks))
    for expert, loans in groupby(plan.guests(), lambda guest: guest[0]):
        new = [guest for _, _, guest in loans if resident is None or not resident[guest, expert]]
        count(copies, home[expert], np.array(new, np.int64), node)
    return LayerTime(*seconds(plan.loads(), at_home, segments, flow, copies, costs.vector()).tolist())


def compute_seconds(rows: Ints, segments: Ints, costs: Costs, forwards: float = 1.0) -> Floats:
    """[...] seconds of expert computation on the slowest rank: rows [..., R] of so many experts, segments [..., R].

    `forwards`: times that the forward is computed: 2 under full recompute, 5/3 with two of its three products again.
    """
    row = forwards * costs.row_forward + costs.row_backward
    segment = forwards * costs.segment_forward + costs.segment_backward
    return (rows * row + segments * segment).max(-1)
