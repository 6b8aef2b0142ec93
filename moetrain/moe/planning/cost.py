"""What a plan costs: predicted seconds of one MoE layer, forward and backward. Pure, no torch.

The model, with everything measured by `moetrain profile`:

- compute: the slowest rank's rows times the seconds of a row, plus a fixed time for every expert it computes;
- dispatch and combine: rows that cross a link, forward (x out, y back) and backward (dy out, dx back). A rank's time
  is that of its fuller direction; links inside a node and between nodes work at the same time;
- chunks: where rows travel in d parts, the transfers of one pass while another is computed (`count_hidden_seconds`);
- lend: expert weights to their guests and fp32 gradients home, minus what the guests' own rows hide. An expert with
  many guests is relayed: its owner sends every guest another slice, and the guests exchange slices.

R ranks, E experts.
"""

from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import numpy as np

from moetrain.moe.planning.cost_model import add_loan, predict_from_vector
from moetrain.moe.planning.plan import Floats, Ints, Plan

CHUNKS = (1, 2, 4, 8)  # in which rows may travel
WORTH = 0.99  # of the seconds of fewer chunks, that more have to stay below
GATHERING = 0.05  # of the seconds of the weights' gradients: rows of several chunks are brought in order for them


@dataclass(frozen=True)
class Link:
    """One message of b bytes takes `latency + b / bandwidth` seconds."""

    latency: float  # seconds
    bandwidth: float  # bytes a second, each direction


class Measured(NamedTuple):
    """How many seconds a part of the layer (`kernels.api.PARTS`) takes with our kernels and with torch's."""

    part: str
    own: float
    torch: float

    @property
    def torch_is_faster(self) -> bool:
        """Whether torch is faster by 15 % or more: near a tie every run is to decide alike."""
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
    two_level: Link | None = None  # between nodes, for rows that travel inside their node first; None: not measured
    kernels: tuple[Measured, ...] = ()  # which kernels the other figures are of; no part: ours

    @property
    def by_torch(self) -> list[str]:
        """The parts that torch computes clearly faster here, hence in every run with these costs."""
        return [each.part for each in self.kernels if each.torch_is_faster]

    def node(self, num_ranks: int) -> Ints:
        """Return [R] the node of each rank."""
        if len(self.nodes) == num_ranks:
            return np.array(self.nodes, np.int64)
        return np.arange(num_ranks, dtype=np.int64) // 8

    def vector(self) -> Floats:
        """Return [14] the numbers for compiled code, in the order of `CostFigures`."""
        numbers = (
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
        )
        return np.array(numbers, np.float64)


@dataclass(frozen=True)
class LayerTime:
    """Predicted seconds of one layer, forward and backward together; each phase is that of the slowest rank."""

    dispatch: float
    lend: float  # the part that nothing hides
    compute: float
    combine: float
    hidden: float = 0.0  # of dispatch and combine, under computation; less what more messages and segments cost

    @property
    def total(self) -> float:
        return self.dispatch + self.lend + self.compute + self.combine - self.hidden


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
    """Return the costs of the reference machine: nodes of 8 H100 with NVLink, and a 400 Gbit/s link each.

    They are of the gpt-oss-120b layer in bf16. D = H = 2880: 50 MFLOP a row forward at 600 TFLOP/s, 50 MB an expert,
    half of whose reading at 3 TB/s a segment pays. Two thirds of the nominal link rates.
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


def layer_time(
    plan: Plan, counts: Ints, home: Ints, costs: Costs, resident: Ints | None = None, chunks: int = 1
) -> LayerTime:
    """Predict the seconds of `plan` for counts [R, E] and home [E]; `resident` [R, E] guests are lent already.

    `chunks`: the parts in which rows travel and are computed (`parallel.chunks`).
    """
    num_ranks = counts.shape[0]
    node = costs.node(num_ranks)
    copies = np.zeros((2, 4, num_ranks))
    for expert, loans in groupby(plan.guests(), lambda guest: guest[0]):
        new = [guest for _, _, guest in loans if resident is None or not resident[guest, expert]]
        add_loan(copies, home[expert], np.array(new, np.int64), node)
    at_home = np.zeros(num_ranks, np.int64)
    local = plan.rank == home[plan.expert]
    np.add.at(at_home, plan.rank[local], plan.num_rows[local])
    loads, segments, flow = plan.loads(), _count_segments(plan), _sum_flow(plan, node)
    phases = predict_from_vector(loads, at_home, segments, flow, copies, costs.vector())
    found = LayerTime(*phases.tolist())
    if chunks == 1:
        return found
    return replace(found, hidden=_make_pipeline(found.dispatch, loads, segments, flow, costs).count_hidden(chunks))


def choose_chunks(plan: Plan, costs: Costs) -> int:
    """Return in how many chunks, of `CHUNKS`, the rows of `plan` should travel: fewer where more save next to nothing.

    The same on every rank, and for the same costs the same in every run.
    """
    node, num_ranks = costs.node(plan.num_ranks), plan.num_ranks
    loads, segments, flow = plan.loads(), _count_segments(plan), _sum_flow(plan, node)
    nothing = np.zeros((2, 4, num_ranks))
    dispatch, _, compute, combine = predict_from_vector(loads, loads, segments, flow, nothing, costs.vector()).tolist()
    pipeline = _make_pipeline(dispatch, loads, segments, flow, costs)
    seconds = [dispatch + compute + combine - pipeline.count_hidden(chunks) for chunks in CHUNKS]
    return next(n for n, each in zip(CHUNKS, seconds, strict=True) if each * WORTH <= min(seconds))


class _Pipeline(NamedTuple):
    """What one layer's rows take on the slowest rank, in seconds: Tutel's adaptive pipelining (MLSys 2023, §3.3)."""

    latency: float  # of one exchange of tokens, of which a forward and backward have four
    travel: float  # of its bytes
    forward: float  # of the rows
    backward: float
    segment_forward: float  # of all segments, once for each chunk
    segment_backward: float
    overlap: float

    def count_hidden(self, chunks: int) -> float:
        """Return the seconds saved against a single chunk; negative where more messages and segments cost more."""
        return self._sum_seconds(1) - self._sum_seconds(chunks)

    def _sum_seconds(self, chunks: int) -> float:
        """Return the seconds of forward and backward, as far as they depend on the number of chunks.

        A forward begins with a chunk on its way here and ends with one on its way home; in between, the longer of
        links and experts counts. A backward ends with the gradients of the weights, over all chunks at once, under
        which the last gradients of tokens travel. Of what could be hidden, `overlap` is.
        """
        way = self.latency + self.travel / chunks
        forward = self.forward + chunks * self.segment_forward
        tokens = self.backward / 2 + chunks * self.segment_backward / 2
        weights = (1 + GATHERING * (chunks > 1)) * self.backward / 2 + self.segment_backward / 2
        apart = 4 * chunks * way + forward + tokens + weights
        together = max(2 * chunks * way, 2 * way + forward) + max(2 * chunks * way, way + tokens + max(way, weights))
        return apart - self.overlap * (apart - together)


def _make_pipeline(dispatch: float, loads: Ints, segments: Ints, flow: Ints, costs: Costs) -> _Pipeline:
    """`dispatch`: seconds of its two exchanges, forward and backward; flow [4, R] as `_sum_flow` has it."""
    slowest = int((loads * (costs.row_forward + costs.row_backward)).argmax())
    latency = costs.between.latency if flow[2:].any() else costs.inside.latency if flow.any() else 0.0
    rows, number = int(loads[slowest]), int(segments[slowest])
    return _Pipeline(
        latency=latency,
        travel=max(dispatch / 2 - latency, 0.0),
        forward=rows * costs.row_forward,
        backward=rows * costs.row_backward,
        segment_forward=number * costs.segment_forward,
        segment_backward=number * costs.segment_backward,
        overlap=costs.overlap,
    )


def _count_segments(plan: Plan) -> Ints:
    """Return [R] experts with rows on each rank."""
    segments = np.zeros(plan.num_ranks, np.int64)
    np.add.at(segments, np.unique(np.stack([plan.expert, plan.rank]), axis=1)[1], 1)
    return segments


def _sum_flow(plan: Plan, node: Ints) -> Ints:
    """Return [4, R] rows that cross links: out and in, inside a node and between nodes."""
    traffic = plan.traffic.copy()
    np.fill_diagonal(traffic, 0)
    near = node[:, None] == node[None, :]
    return np.stack([(traffic * m).sum(axis) for m in (near, ~near) for axis in (1, 0)])


def compute_seconds(rows: Ints, segments: Ints, costs: Costs, forwards: float = 1.0) -> Floats:
    """Return [...] seconds of expert computation on the slowest rank: rows [..., R] of segments [..., R] experts.

    `forwards`: times that the forward is computed: 2 under full recompute, 5/3 with two of its three products again.
    """
    row = forwards * costs.row_forward + costs.row_backward
    segment = forwards * costs.segment_forward + costs.segment_backward
    seconds: Floats = rows * row + segments * segment
    return np.asarray(seconds.max(-1))
