"""What a plan costs: predicted seconds of one MoE layer, forward and backward. Pure, no torch.

The model, with everything measured by `moetrain profile`:

- compute: the slowest rank's rows times the seconds of a row, plus a fixed time for every expert it computes;
- dispatch and combine: rows that cross a link, forward (x out, y back) and backward (dy out, dx back). A rank's time
  is that of its fuller direction; links inside a node and between nodes work at the same time;
- lend: expert weights to their guests and fp32 gradients home, minus what the guests' own rows hide.

R ranks, E experts.
"""

from dataclasses import dataclass

import numpy as np
from numba import njit

from moetrain.moe.plan import Floats, Ints, Plan


@njit(cache=True)
def count(copies, owner, guest, near, free):  # type: ignore[no-untyped-def]
    """Add one guest to copies [6, R]: lent out and in, inside a node and between; and guests, new or not."""
    if not free:
        copies[0 if near else 2, owner] += 1
        copies[1 if near else 3, guest] += 1
        copies[4, guest] += 1
    copies[5, guest] += 1


@njit(cache=True)
def seconds(loads, at_home, segments, flow, copies, costs):  # type: ignore[no-untyped-def]
    """(dispatch, lend, compute, combine).

    loads, at_home, segments [R]: rows, rows of own experts, experts with rows. flow [4, R]: rows out and in, inside
    the node and between nodes. copies [6, R] as `count` makes them.
    """
    row, row_back, segment, segment_back, row_bytes, weight, gradient = costs[:7]
    near_wait, near_rate, far_wait, far_rate, overlap, lends = costs[7:]
    compute = travel = lend = 0.0
    wait = lend_wait = 0.0
    idle = np.inf  # the least own work that a borrower can do while it waits
    for r in range(len(loads)):
        compute = max(compute, loads[r] * (row + row_back) + segments[r] * (segment + segment_back))
        inside, outside = max(flow[0, r], flow[1, r]), max(flow[2, r], flow[3, r])
        if inside:
            wait = max(wait, near_wait)
        if outside:
            wait = max(wait, far_wait)
        travel = max(travel, inside * row_bytes / near_rate, outside * row_bytes / far_rate)
        inside, outside = max(copies[0, r], copies[1, r]), max(copies[2, r], copies[3, r])
        if inside:
            lend_wait = max(lend_wait, near_wait)
        if outside:
            lend_wait = max(lend_wait, far_wait)
        lend = max(lend, inside / near_rate, outside / far_rate)
        if copies[4, r]:
            idle = min(idle, at_home[r] * (row + row_back))
    exposed = lend * (lends * weight + gradient) + (lends + 1) * lend_wait
    if lend > 0:
        exposed -= min(overlap * exposed, idle)
    way = 2 * (wait + travel)  # there and back cost the same: out and in change places
    return np.array([way, exposed, compute, way])


@dataclass(frozen=True)
class Link:
    """One message of b bytes takes `latency + b / bandwidth` seconds."""

    latency: float  # seconds
    bandwidth: float  # bytes a second, each direction


@dataclass(frozen=True)
class Costs:
    """What the planner knows about the machine and the layer. Seconds and bytes."""

    row_forward: float  # seconds for one row of one expert
    row_backward: float
    segment_forward: float  # seconds that an expert with rows costs on top of them
    segment_backward: float
    row_bytes: int  # what a row weighs on a link
    weight_bytes: int  # an expert, lent
    gradient_bytes: int  # its gradient, coming home
    inside: Link  # links inside a node
    between: Link  # links between nodes
    overlap: float  # share of lending that can pass while rows are computed, 0 to 1
    lends: int = 1  # times that a guest's weights travel per forward and backward: 2 where backward lends again
    nodes: tuple[int, ...] = ()  # the node of each rank, consecutive numbers from 0; empty: 8 ranks a node

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
    copies = np.zeros((6, num_ranks), np.int64)
    for expert, owner, guest in plan.guests():
        free = resident is not None and bool(resident[guest, expert])
        count(copies, owner, guest, bool(near[owner, guest]), free)
    return LayerTime(*seconds(plan.loads(), at_home, segments, flow, copies, costs.vector()).tolist())
