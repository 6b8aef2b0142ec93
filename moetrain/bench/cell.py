"""What one rank runs when a layer is timed: the layer under one routing and planner, and its ceiling, the bare GEMMs.

T tokens here, D width, H expert hidden width, N selections here, E experts, S experts here.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.bench import cases, workloads
from moetrain.bench.cases import LayerShape
from moetrain.bench.timing import read_clock
from moetrain.distributed.comm import all_gather
from moetrain.distributed.mesh import ExpertGroup, Mesh
from moetrain.engine.precision import DTYPES
from moetrain.moe import calibrate
from moetrain.moe.clock import Clock
from moetrain.moe.exchange.dispatch import DispatchTables
from moetrain.moe.experts import Experts
from moetrain.moe.kernels.api import KernelChoice, use_kernels
from moetrain.moe.options import Chunks
from moetrain.moe.planning import PLANNERS, count_chunks
from moetrain.moe.planning.cost import Costs, State
from moetrain.moe.planning.eplb import remember
from moetrain.moe.planning.plan import Floats, Ints, Plan
from moetrain.moe.routing.base import Routing
from moetrain.simulate.traffic import RoutedGroup

GUEST_SLOTS = 8  # guests that stay between forward and backward
ANNOUNCEMENT_BYTES = 8  # an announced selection: which copy, and its weight
WEIGHT_GRADIENT_BYTES = 4  # its gradient, on the way back


def draw_tensor(*shape: int, like: LayerShape, device: torch.device, scale: float = 1.0) -> Tensor:
    """Return normally distributed numbers of standard deviation `scale`, in the dtype of the layer `like`."""
    return torch.randn(shape, device=device).mul_(scale).to(DTYPES[like.dtype])


def describe_layer(shape: LayerShape, experts: int | None = None) -> calibrate.Layer:
    """Return what costs are measured of: a layer of this shape, or one with another number of `experts`."""
    return calibrate.Layer(shape.dim, shape.hidden, experts or shape.experts, shape.top_k, DTYPES[shape.dtype])


def build_experts(shape: LayerShape, ep: ExpertGroup, device: torch.device) -> Experts:
    """Return the experts of one rank with random weights; nobody ever holds all experts."""
    with torch.device("meta"):
        experts = Experts(shape.dim, shape.hidden, shape.experts)
    experts.shard(ep, guest_slots=GUEST_SLOTS)
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(draw_tensor(*parameter.shape, like=shape, device=device, scale=0.03)))
    return experts


@dataclass(frozen=True)
class Inputs:
    """A rank's tokens, the weights of their selections, and the upstream gradient."""

    x_TD: Tensor
    weight_N: Tensor
    token_N: Tensor
    upstream_TD: Tensor

    @classmethod
    def draw(cls, shape: LayerShape, device: torch.device) -> "Inputs":
        """Return random tokens and weights of `shape.top_k` selections a token."""
        x_TD, upstream_TD = (draw_tensor(shape.tokens, shape.dim, like=shape, device=device) for _ in range(2))
        weight_N = torch.rand(shape.tokens * shape.top_k, device=device).requires_grad_()
        token_N = torch.arange(shape.tokens, device=device).repeat_interleave(shape.top_k)
        return cls(x_TD.requires_grad_(), weight_N, token_N, upstream_TD)


@dataclass
class Cell:
    """One rank's layer under one routing and one planner."""

    shape: LayerShape
    experts: Experts
    inputs: Inputs
    expert_N: Tensor
    planner: str
    costs: Costs
    token_N: Tensor | None = None  # of the selections; None: `shape.top_k` of each token
    past_E: Floats | None = None  # [E] rows of steps before, for planners that look at them
    chunks: Chunks = 1  # in which rows travel

    @classmethod
    def draw(
        cls, scenario: str, planner: str, shape: LayerShape, experts: Experts, inputs: Inputs, costs: Costs, seed: int
    ) -> "Cell":
        """Return a cell whose tokens select as the routing `scenario` has it, the same for a rank and a seed."""
        drawn = cases.draw_selections(scenario, experts.ep.rank, experts.ep.size, shape, seed)
        return cls(shape, experts, inputs, torch.from_numpy(drawn).to(inputs.x_TD.device), planner, costs)

    @property
    def routing(self) -> Routing:
        """What a router would hand to the experts."""
        probs_TE = self.inputs.weight_N.new_empty(0, self.shape.experts)  # for the balance loss: not part of this
        token_N = self.inputs.token_N if self.token_N is None else self.token_N
        return Routing(token_N, self.expert_N, self.inputs.weight_N[: len(self.expert_N)], probs_TE)

    def decide(self) -> Plan:
        """Gather the counts of all ranks and return the plan, as a training step does after its choice of experts."""
        ep = self.experts.ep
        counts_E = torch.bincount(self.expert_N, minlength=self.shape.experts)
        return self.plan(all_gather(counts_E, ep.rows).cpu().numpy())

    def plan(self, counts_RE: Ints) -> Plan:
        """Return the planner's plan for these counts and the guests that have stayed."""
        state = State(resident=self.experts.residents.keeps_RE, past=self.past_E)
        return PLANNERS[self.planner](counts_RE, self.experts.home, self.costs, self.experts.limits, state)

    def forward(self, plan: Plan) -> Tensor:
        """Return [T, D], computed as planned; all ranks of the group call it."""
        self.experts.residents.admit(plan)
        clock = Clock(self.inputs.x_TD.device)
        num_chunks = count_chunks(self.chunks, plan, self.costs)
        return self.experts(self.inputs.x_TD, self.routing, plan, self.shape.top_k, clock, None, num_chunks)

    def time_pass(self, plan: Plan | None = None) -> tuple[float, float]:
        """Run forward and backward; return seconds until the forward is over, and in all.

        `plan`: as decided before; None: deciding is timed too.
        """
        device = self.inputs.x_TD.device
        began = read_clock(device)
        y_TD = self.forward(plan or self.decide())
        between = read_clock(device)
        y_TD.backward(self.inputs.upstream_TD)
        ended = read_clock(device)
        self.drop_gradients()
        return between - began, ended - began

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        self.inputs.x_TD.grad = self.inputs.weight_N.grad = None
        self.experts.gate_up.grad = self.experts.down.grad = None

    def keep_gradients(self, plan: Plan | None = None) -> list[Tensor]:
        """Run forward and backward; return the gradients of this rank's own experts, as large under any plan."""
        self.forward(plan or self.decide()).backward(self.inputs.upstream_TD)
        grads = [self.experts.gate_up.grad, self.experts.down.grad]
        self.drop_gradients()
        return [grad for grad in grads if grad is not None]

    def build_tables(self, plan: Plan) -> DispatchTables:
        """Build the index tables of this rank, as the layer does; all ranks call it."""
        experts, x_TD = self.experts, self.inputs.x_TD
        kernels = experts.choose_kernels(x_TD)
        return DispatchTables.build(self.routing, plan, experts.ep, kernels, len(x_TD), self.shape.top_k)

    def count_bytes(self, plan: Plan) -> int:
        """Return the bytes that leave this rank in forward and backward: rows, announcements, weights and gradients on
        loan."""
        ep, residents = self.experts.ep, self.experts.residents
        tables = self.build_tables(plan)
        row = self.inputs.x_TD.element_size() * self.shape.dim
        announced, received = (
            sum(n for r, n in enumerate(by) if r != ep.rank) for by in (tables.announced, tables.received)
        )
        copies = 2 * (sum(tables.copies_out) + sum(tables.copies_in)) * row  # x out, sums back; both again backward
        expert = self.shape.weights * self.inputs.x_TD.element_size()
        loans = 0
        residents.admit(plan)
        for number, home, guest in plan.guests():
            if home == ep.rank:
                loans += 1 if residents.keeps_RE[guest, number] else 2  # those that do not stay are lent again
            loans += guest == ep.rank  # its gradient
        residents.end_backward(is_final=True)
        return copies + announced * ANNOUNCEMENT_BYTES + received * WEIGHT_GRADIENT_BYTES + loans * expert


class Gemms:
    """The expert GEMMs of a balanced layer by themselves, forward and backward: `grouped_mm`, full precision."""

    def __init__(self, shape: LayerShape, num_ranks: int, device: torch.device) -> None:
        """Draw the rows and experts of one of `num_ranks` ranks."""
        num_own, rows = shape.experts // num_ranks, shape.tokens * shape.top_k
        new = lambda *size, scale=1.0: draw_tensor(*size, like=shape, device=device, scale=scale)  # noqa: E731
        self.device = device
        self.x_MD, self.hidden_MH = new(rows, shape.dim).requires_grad_(), new(rows, shape.hidden).requires_grad_()
        self.gate_up = new(num_own, 2 * shape.hidden, shape.dim, scale=0.03).requires_grad_()
        self.down = new(num_own, shape.dim, shape.hidden, scale=0.03).requires_grad_()
        self.upstream = [new(rows, 2 * shape.hidden), new(rows, shape.dim)]
        ends = np.arange(1, num_own + 1) * rows // num_own
        self.ends = torch.from_numpy(ends.astype(np.int32)).to(device)

    def time_pass(self) -> tuple[float, float]:
        """Run forward and backward; return seconds until the forward is over, and in all."""
        began = read_clock(self.device)
        out = [
            F.grouped_mm(self.x_MD, self.gate_up.mT, offs=self.ends),
            F.grouped_mm(self.hidden_MH, self.down.mT, offs=self.ends),
        ]
        between = read_clock(self.device)
        torch.autograd.backward(out, self.upstream)
        ended = read_clock(self.device)
        self.x_MD.grad = self.hidden_MH.grad = self.gate_up.grad = self.down.grad = None
        return between - began, ended - began


@dataclass
class Setup:
    """What all cells of a shape share on one rank, and what they are compared with."""

    shape: LayerShape
    experts: Experts
    inputs: Inputs
    costs: Costs
    seed: int
    gemms: Gemms
    reference: Cell  # our layer, balanced; rows move nowhere

    @classmethod
    def prepare(cls, mesh: Mesh, shape: LayerShape, seed: int, backend: str | None = None) -> "Setup":
        """Measure this machine's costs and draw a layer; all ranks call it. `backend`: as in `KernelChoice`."""
        torch.manual_seed(seed + mesh.rank)
        costs = calibrate.measure(mesh, describe_layer(shape), backend)
        experts, inputs = build_experts(shape, mesh.ep, mesh.device), Inputs.draw(shape, mesh.device)
        use_kernels(experts, KernelChoice(backend, frozenset(costs.by_torch)))
        gemms = Gemms(shape, mesh.ep.size, mesh.device)
        reference = Cell.draw(cases.BALANCED, "home", shape, experts, inputs, costs, seed)
        return cls(shape, experts, inputs, costs, seed, gemms, reference)

    def draw_cell(self, scenario: str, planner: str) -> Cell:
        """Return the layer under one routing and planner."""
        return Cell.draw(scenario, planner, self.shape, self.experts, self.inputs, self.costs, self.seed)

    def draw_workload(self, name: str, planner: str) -> tuple[list[Cell], list[Cell]]:
        """Return the layer in each step of a workload, or of a run's load trace, and with its rows spread evenly."""
        ep, shape = self.experts.ep, self.shape
        found: tuple[list[Cell], list[Cell]] = ([], [])
        group = RoutedGroup(ep.size, shape.experts, shape.tokens, shape.top_k)
        for step, sample in enumerate(workloads.draw_steps(name, group, self.seed)):
            past_E = remember(None, sample.past)
            even = workloads.spread_evenly(sample.counts)
            for cells, counts_RE, decided in zip(found, (sample.counts, even), (planner, "home"), strict=True):
                rng = np.random.default_rng((self.seed, step, ep.rank))
                chosen = workloads.select_tokens(counts_RE[ep.rank], shape.top_k, shape.tokens, rng)
                token_N, expert_N = (torch.from_numpy(each).to(self.inputs.x_TD.device) for each in chosen)
                cells.append(Cell(shape, self.experts, self.inputs, expert_N, decided, self.costs, token_N, past_E))
        return found
