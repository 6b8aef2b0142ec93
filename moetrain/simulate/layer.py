"""One MoE layer on an expert-parallel group: the real planner on given counts, and what its plan costs.

R expert-parallel ranks, E experts, T tokens of a rank, K experts of a token, D width, H expert hidden width.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from moetrain.common.errors import ConfigError
from moetrain.moe.options import Chunks
from moetrain.moe.planning import (
    PLANNERS,
    Costs,
    Limits,
    Plan,
    State,
    count_chunks,
    count_slices,
    default_home,
    layer_time,
)
from moetrain.moe.planning.eplb import remember
from moetrain.moe.planning.plan import Floats, Ints, imbalance
from moetrain.simulate.cluster import BYTES, Cluster
from moetrain.simulate.links import domain_of, exchange, planner_links
from moetrain.simulate.shape import Shape
from moetrain.simulate.stack import Stack
from moetrain.simulate.traffic import LayerSample, RoutedGroup

OVERLAP = 0.8  # share of lending that can pass while rows are computed, as for the planner's reference machine
HANDLING = 50e-6  # seconds of a guest besides its bytes, as for that machine


@dataclass(frozen=True)
class PlannerChoice:
    """A planner of `moe.planning.PLANNERS` and its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    max_guests: int | None = None

    def __post_init__(self) -> None:
        if self.name not in PLANNERS:
            raise ConfigError(f"planner={self.name}: must be one of {', '.join(PLANNERS)}")

    def plan(self, counts_RE: Ints, home_E: Ints, costs: Costs, past_E: Floats | None) -> Plan:
        planner = partial(PLANNERS[self.name], **self.options)
        return planner(counts_RE, home_E, costs, Limits(guests=self.max_guests), State(past=past_E))


@dataclass(frozen=True)
class Machine:
    """A cluster, a layer's shape and a program together: what the parts of a layer cost there."""

    cluster: Cluster
    shape: Shape
    group: RoutedGroup
    stack: Stack
    dtype: str
    recompute: str = "none"
    stride: int = 1  # devices between neighbours of the group
    measured: Costs | None = None  # of this very layer on this machine, in place of what the cluster's figures give
    slices: int = 1  # of an expert, r: the costs are those of slices
    chunks: Chunks = 1  # in which rows travel and are computed

    @property
    def width_bytes(self) -> int:
        return BYTES[self.dtype]

    @property
    def forwards(self) -> float:
        """How often the experts' forward is computed: 2 under full recompute, 5/3 with two of three products again."""
        return {"none": 1.0, "selective": 5 / 3, "full": 2.0}[self.recompute]

    @property
    def transfers(self) -> int:
        """Exchanges of tokens in forward and backward: dispatch and combine, twice; full recompute repeats two."""
        return 6 if self.recompute == "full" else 4

    def costs(self) -> Costs:
        """For the planner: seconds of a row and of a segment, and the links."""
        if self.measured is not None:
            return self.measured
        cluster, shape = self.cluster, self.shape
        hidden, weights = shape.expert_hidden / self.slices, shape.expert_params / self.slices
        width = float(np.sqrt(shape.dim * hidden))
        flops = 2.0 * 3 * shape.dim * hidden
        product = cluster.product_seconds(flops, 1e12, width, self.dtype)
        moved = BYTES["bf16"] if self.dtype == "fp8" else self.width_bytes
        forward = cluster.memory_seconds(moved * (3.2 * shape.dim + 3 * hidden))
        backward = cluster.memory_seconds(moved * (5.2 * shape.dim + 6 * hidden))
        segment = cluster.gemm.half_rows * product
        gradient = cluster.memory_seconds(weights * self.stack.weight_gradient_bytes)
        row_bytes = self._row_bytes()
        message = max(row_bytes * self.group.tokens * self.group.top_k * self.slices / self.group.ranks, 1.0)
        inside, between = planner_links(cluster, self.group.ranks, message)
        again = self.forwards - 1
        return Costs(
            row_forward=product + forward,
            row_backward=2 * product + backward + again * (product + forward),
            segment_forward=segment,
            segment_backward=2 * segment + gradient + again * segment,
            row_bytes=int(row_bytes) or 1,
            weight_bytes=int(weights * moved),
            gradient_bytes=int(weights * moved),
            inside=inside,
            between=between,
            overlap=OVERLAP,
            handling=HANDLING,
            nodes=tuple(int(x) for x in self.domains()),
        )

    def domains(self) -> Ints:
        return domain_of(self.group.ranks, self.cluster, self.stride)

    def _row_bytes(self) -> float:
        """What a selection weighs on a link in the mean: a token goes to a rank once."""
        ranks, top_k = self.group.ranks, self.group.top_k * self.slices
        distinct = ranks * (1 - (1 - 1 / ranks) ** top_k) / top_k
        return self.shape.dim * self.token_bytes * distinct

    @property
    def token_bytes(self) -> float:
        """Of one number of a token on its way; in fp8 dispatch has one byte and combine two."""
        return 1.5 if self.dtype == "fp8" else float(self.width_bytes)


@dataclass(frozen=True)
class LayerResult:
    """Seconds of one layer's experts, forward and backward, and what moved."""

    experts: float
    dispatch: float  # two exchanges of tokens, or three under full recompute
    combine: float
    lend: float  # what nothing hides
    loads: Ints  # [R] rows computed
    guests: int  # copies on all ranks
    most_guests: int  # on one rank
    rows_here: float  # largest over mean load
    inside: float  # bytes that the mean rank sends in its NVLink domain, all exchanges
    between: float

    @property
    def total(self) -> float:
        return self.experts + self.dispatch + self.combine + self.lend


def distinct_tokens(rows: Floats, spread: Floats, tokens: Floats) -> Floats:
    """Tokens behind n `rows` that go to one place, where m experts (`spread`) share them: T (1 - (1 - n / mT)^m).

    One expert: a token chose it at most once. Many: a token may have chosen several of them.
    """
    share = np.clip(rows / np.maximum(spread * tokens, 1e-300), 0, 1)
    return tokens * (1 - (1 - share) ** np.maximum(spread, 1e-300))


def run_layer(counts_RE: Ints, machine: Machine, planner: PlannerChoice, past_E: Floats | None = None) -> LayerResult:
    """Plan the layer of counts [R, E] and predict it."""
    group, costs = machine.group, machine.costs()
    home_E = default_home(group.experts * machine.slices, group.ranks)
    past_E = None if past_E is None else count_slices(past_E, machine.slices)
    counts_RE = count_slices(counts_RE, machine.slices)
    plan = planner.plan(counts_RE, home_E, costs, past_E)
    time = layer_time(plan, counts_RE, home_E, costs, chunks=count_chunks(machine.chunks, plan, costs))
    exposed = 1 - time.hidden / max(time.dispatch + time.combine, 1e-300)  # of the exchanges' time
    if machine.measured is not None:
        again = machine.transfers / 4
        extra = machine.forwards - 1
        compute = _compute(plan, replace(costs, row_forward=(1 + extra) * costs.row_forward))
        dispatch, combine = (again * exposed * x for x in (time.dispatch, time.combine))
        return _result(plan, compute, dispatch, combine, time.lend, 0.0, 0.0)
    placed_RE = plan.placed().astype(np.float64)
    spread_R, times_R = _spread_rows(placed_RE, machine.slices)
    tokens_R = counts_RE.sum(1) / group.top_k / machine.slices
    tokens_RR = distinct_tokens(plan.traffic / times_R, spread_R[None, :], tokens_R[:, None])
    bytes_RR = tokens_RR * machine.shape.dim * machine.token_bytes
    domain_R = machine.domains()
    crossing = _crossing(plan, placed_RE, domain_R, tokens_R, machine) if machine.stack.two_level else None
    there = exchange(bytes_RR, machine.cluster, domain_R, crossing)
    back = exchange(bytes_RR.T, machine.cluster, domain_R, None if crossing is None else crossing[::-1])
    number = machine.transfers
    visible = exposed * (1 - machine.stack.exchange_hidden)
    dispatch, combine = (visible * number / 2 * x for x in (there.seconds, back.seconds))
    return _result(plan, time.compute, dispatch, combine, time.lend, number * there.inside, number * there.between)


def _spread_rows(placed_QE: Floats, slices: int) -> tuple[Floats, Floats]:
    """([Q] experts that share the rows of each place, [Q] slices of one that are there, on average).

    `placed_QE` [Q, r · E]: rows of each slice. The slices of an expert that are in one place have the same tokens.
    """
    if slices > 1:
        rows_Q = placed_QE.sum(1)
        placed_QE = placed_QE.reshape(len(placed_QE), slices, -1).max(1)
        times_Q = np.maximum(rows_Q, 1) / np.maximum(placed_QE.sum(1), 1)
    else:
        times_Q = np.ones(len(placed_QE))
    return placed_QE.sum(1) ** 2 / np.maximum((placed_QE**2).sum(1), 1e-300), times_Q


def _compute(plan: Plan, costs: Costs) -> float:
    return layer_time(plan, plan.counts, plan.home, costs).compute


def _result(
    plan: Plan, experts: float, dispatch: float, combine: float, lend: float, inside: float, between: float
) -> LayerResult:
    guests = plan.guests()
    per_rank = np.bincount([guest for _, _, guest in guests], minlength=plan.num_ranks) if guests else np.zeros(1, int)
    loads = plan.loads()
    return LayerResult(
        experts, dispatch, combine, lend, loads, len(guests), int(per_rank.max()), imbalance(loads), inside, between
    )


def _crossing(plan: Plan, placed_RE: Floats, domain_R: Ints, tokens_R: Floats, machine: Machine) -> Floats:
    """[2, R] bytes that each rank sends and receives between domains, every token once for each domain."""
    num_domains = int(domain_R.max()) + 1
    to_domain = np.zeros((plan.num_ranks, num_domains))
    for domain in range(num_domains):
        to_domain[:, domain] = plan.traffic[:, domain_R == domain].sum(1)
    placed = np.stack([placed_RE[domain_R == domain].sum(0) for domain in range(num_domains)])
    spread, times = _spread_rows(placed, machine.slices)
    tokens = distinct_tokens(to_domain / times, spread[None, :], tokens_R[:, None])
    tokens[np.arange(plan.num_ranks), domain_R] = 0
    sent = tokens.sum(1)
    members = np.bincount(domain_R, minlength=num_domains)
    came = np.zeros(num_domains)
    np.add.at(came, np.arange(num_domains), tokens.sum(0))
    received = (came / members)[domain_R]  # by equal local ranks, evenly
    return np.stack([sent, received]) * machine.shape.dim * machine.token_bytes


def run_layers(samples: Iterable[LayerSample], machine: Machine, planner: PlannerChoice) -> list[LayerResult]:
    """Plan and predict each layer."""
    return [run_layer(sample.counts, machine, planner, remember(None, sample.past)) for sample in samples]
