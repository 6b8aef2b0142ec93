"""The MoE layer: route, decide, compute; once, or several times over the same experts.

The three steps are apart so that activation recompute runs `route` and `compute` a second time while what `decide`
found (the choice and the plan) is replayed, never redone: statistics are taken once.

T tokens here, D width, E experts (where a router is concerned, those that compute nothing included; A where both are),
N selections, L of them that are rows for the experts, R ranks.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol, cast
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain.common.errors import ConfigError
from moetrain.common.registry import Options
from moetrain.distributed.comm import all_gather
from moetrain.moe.clock import Clock
from moetrain.moe.context import StepContext
from moetrain.moe.experts import Experts
from moetrain.moe.kernels.bags import find_true
from moetrain.moe.options import PLANNERS, ROUTERS, RouterOptions, ZeroComputeOptions, find_planner_problem
from moetrain.moe.planning import count_chunks, count_slices
from moetrain.moe.planning.cost import Costs, State
from moetrain.moe.planning.eplb import remember
from moetrain.moe.planning.plan import Floats, Ints, Plan
from moetrain.moe.routing import Choice, Place, Router, Scores, capacity
from moetrain.moe.routing.base import INIT_STD, RecordedChoice
from moetrain.moe.routing.zero_compute import ZeroCompute

Planner = Callable[..., Plan]


@dataclass(frozen=True)
class Decision:
    """What is replayed under recompute."""

    choice: Choice
    kept_N: Tensor | None  # bool: selections that are made and not dropped; None: all
    rows_L: Tensor | None  # which of them are rows for the experts; None: all
    plan: Plan
    most_per_token: int  # rows of any token on any rank of the expert group
    counts_E: Tensor  # int64: selections made here, before any is dropped
    kept_E: Tensor  # int64: and after
    num_lent: int  # copies of experts that the forward sends, in the whole group
    clock: Clock
    slices: int  # of an expert: what the plan counts
    num_chunks: int  # in which rows travel and are computed


@dataclass(frozen=True)
class LayerStats:
    """What one layer's routing on this rank contributes to losses and metrics."""

    scores: Scores  # with gradient
    choice: Choice
    counts_E: Tensor  # int64: selections made here, before any is dropped
    kept_E: Tensor  # int64: and after
    plan: Plan
    num_lent: int  # copies of experts sent in the forward, in the whole group
    clock: Clock
    real_T: Tensor | None = None  # bool: tokens that are not padding; None: all
    slices: int = 1  # of an expert: the plan's experts are these

    @classmethod
    def collect(cls, scores: Scores, decision: Decision, place: Place | None = None) -> "LayerStats":
        """After `compute`: ends the layer's clock."""
        decision.clock.stop()
        d, real_T = decision, None if place is None else place.real_T
        return cls(scores, d.choice, d.counts_E, d.kept_E, d.plan, d.num_lent, d.clock, real_T, d.slices)

    @property
    def num_experts(self) -> int:
        """Experts that compute, whole ones."""
        return self.plan.num_experts // self.slices

    @property
    def real_scores(self) -> Scores:
        """The scores with zeros for padding, with gradient: what sums over tokens are made of."""
        if self.real_T is None:
            return self.scores
        return Scores(*(x_TE * self.real_T[:, None] for x_TE in self.scores))

    def light(self) -> "LayerStats":
        """What the metrics of a step need: without scores and choice, which are large."""
        none = torch.empty(0)
        return replace(self, scores=Scores(none, none), choice=Choice(none, none), real_T=None)


class Watcher(Protocol):
    """Is told of a layer's forwards: by `moetrain.expert_parallel`."""

    def before(self, layer: "MoE", x_TD: Tensor) -> None: ...

    def after(self, layer: "MoE", stats: LayerStats) -> None: ...


class MoE(nn.Module):
    """Router, experts and shared experts of one layer, in place of an MLP: a plain module, whole on one device.

    `moetrain.expert_parallel` spreads the experts over ranks. Parameters: `router.*`, `experts.gate_up` [E, 2H, D] and
    `experts.down` [E, D, H] (SwiGLU, as Hugging Face fuses them), `shared.*`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        top_k: int | None = None,
        *,
        router: str = "topk",
        router_options: RouterOptions | Mapping[str, Any] | None = None,
        planner: str = "makespan",
        planner_options: Options | Mapping[str, Any] | None = None,
        zero_compute: ZeroComputeOptions | None = None,
        shared: nn.Module | None = None,
        passes: int = 1,
        index: int = 0,
        init_std: float = INIT_STD,
    ) -> None:
        """Build the layer with normally distributed weights.

        Arguments:
            dim: width of the model, D; a multiple of 8.
            hidden: width of an expert, H; a multiple of 8.
            experts: experts that compute, E.
            top_k: experts that a token chooses; None: as `router_options` has it, by default 2.
            router: its kind, a key of `moetrain.ROUTERS`; `router_options`: the kind's own dataclass or a mapping.
            planner: a key of `moetrain.PLANNERS`, for when the experts are spread over ranks; likewise its options.
            zero_compute: experts that compute next to nothing, numbered after the others.
            shared: a module [T, D] -> [T, D] that is added for every token.
            passes: routers over the same experts, one for each pass of a chained layer; `index`: the first one's number
                in the model.
            init_std: standard deviation of the weights; those of `shared` are left as they are.

        Raises `ConfigError`, a `ValueError`, for options that there are not or that do not fit.
        """
        super().__init__()
        options = _router_options(router, router_options, top_k)
        others = zero_compute or ZeroComputeOptions()
        num_all = experts + others.total
        for name, width in (("dim", dim), ("hidden", hidden)):
            if width <= 0 or width % 8:
                raise ConfigError(f"{name}={width}: must be a multiple of 8 (grouped GEMM: 16-byte rows)")
        for field, rule in options.problems(num_all):
            raise ConfigError(f"{field}={getattr(options, field)}: {rule}")
        kind = ROUTERS[router]
        self.router = kind(dim, num_all, options, index)
        self.later_routers = nn.ModuleList(kind(dim, num_all, options, index + i) for i in range(1, passes))
        self.experts = Experts(dim, hidden, experts, num_passes=passes)
        self.zero_compute = ZeroCompute(dim, experts, others) if others.total else None
        self.shared = shared
        self.capacity_factor = options.capacity_factor
        self.room_weights: tuple[float, ...] | None = None  # [E] of the experts' shares of the capacity; None: equal
        self._router_options, self._num_zero_compute = options, others.total
        self.plan_with(planner, planner_options)
        self.costs: Costs | None = None  # of this machine; None: those of the reference machine
        self.past_E: Floats | None = None  # [E] rows of the expert group in training so far, the later the heavier
        self.recompute = False  # whether experts are computed again in the backward instead of keeping what they need
        self.watcher: Watcher | None = None  # of a layer in somebody's own loop
        self._alive: list[ReferenceType[Decision]] = []  # of forwards whose backward may be to come
        if others.total:
            self.room_weights = (others.tau,) * experts + (1.0,) * others.total
            for one in self.routers:
                one.loss_weights = (1.0,) * experts + (others.tau,) * others.total
        if init_std != INIT_STD:
            self.reset_parameters(init_std)

    @torch.no_grad()
    def reset_parameters(self, std: float = INIT_STD) -> None:
        """Draw the weights of routers and experts from normal distributions; on the meta device, draw nothing."""
        for module in (*self.routers, self.zero_compute, self.experts):
            if module is not None:
                module.reset_parameters(std)

    def plan_with(self, planner: str, options: Options | Mapping[str, Any] | None = None) -> None:
        """Choose the planner by its name and options. Raises `ConfigError` where there is no such one, or it does not
        suit the router."""
        if broken := find_planner_problem(planner, self._router_options, self._num_zero_compute):
            raise ConfigError(f"planner={planner}: {broken}")
        made = options if isinstance(options, Options) else PLANNERS.make_options(planner, options or {})
        self.planner: Planner = partial(PLANNERS[planner], **asdict(made))

    def forward(self, x: Tensor, carry: Any = None, place: Place | None = None) -> Tensor:
        """Returns [..., D] for [..., D]: the weighted sum of every token's experts, and the shared ones.

        Of [B, L, D], each of the B is a sequence to routers that look at sequences, unless `place` says otherwise.
        """
        if place is None and x.ndim > 2:
            place = Place(x.shape[-2])
        y_TD, _, _ = self.forward_with_stats(x.reshape(-1, x.shape[-1]), carry, place)
        return y_TD.view_as(x)

    def forward_with_stats(
        self, x_TD: Tensor, carry: Any = None, place: Place | None = None
    ) -> tuple[Tensor, LayerStats, Any]:
        """Returns [T, D] for [T, D], the statistics of the pass, and the router's carry for the next layer."""
        if self.watcher is not None:
            self.watcher.before(self, x_TD)
        scores, carry = self.route(x_TD, carry, place)
        is_again = torch._C._current_graph_task_id() != -1  # recomputed in a backward, by a checkpoint around the layer
        decision = self._find_decision(scores, place) if is_again else self.decide(scores, place)
        if self.recompute and torch.is_grad_enabled():
            y_TD = checkpoint(self.compute, x_TD, scores, decision, use_reentrant=False, preserve_rng_state=False)
        else:
            y_TD = self.compute(x_TD, scores, decision)
        stats = LayerStats.collect(scores, decision, place)
        if not is_again:
            if y_TD.requires_grad:  # the graph keeps them, and they go with it
                y_TD.register_hook(partial(_keep, decision, stats))
                self._alive = [one for one in self._alive if one() is not None] + [ref(decision)]
            if self.watcher is not None:
                self.watcher.after(self, stats)
        return y_TD, stats, carry

    def _find_decision(self, scores: Scores, place: Place | None) -> Decision:
        """The decision of the forward that is computed again: of those whose backward is to come, the one with these
        choices. Raises `RuntimeError` where there is none, or several with different plans."""
        alive = [found for one in self._alive if (found := one()) is not None]
        if not alive:  # a reentrant checkpoint, whose first forward has no graph
            return self.decide(scores, place)
        token_N, expert_N, _ = self.router.choose(Scores(*(x.detach() for x in scores)), place)
        same = [d for d in alive if torch.equal(d.choice.expert_N, expert_N) and torch.equal(d.choice.token_N, token_N)]
        if not same:
            raise RuntimeError("a recomputed forward of an MoE layer chose other experts: is its input the same?")
        if any(d.plan is not same[-1].plan and not _is_same_plan(d.plan, same[-1].plan) for d in same):
            raise RuntimeError("recompute cannot tell micro-batches with equal choices apart; recompute one at a time")
        return same[-1]

    @property
    def step(self) -> StepContext:
        """What the layer knows of the optimizer step; the training loop tells it."""
        return self.experts.step

    def use_costs(self, costs: Costs) -> None:
        """Have the planner decide with these costs from now on."""
        self.costs = costs

    @property
    def routers(self) -> list[Router]:
        """In the order of the layer's statistics."""
        return [self.router, *cast(list[Router], list(self.later_routers))]

    def route(self, x_TD: Tensor, carry: Any, place: Place | None, turn: int = 0) -> tuple[Scores, Any]:
        """`turn`: which pass through the layer this is."""
        return self.routers[turn].score(x_TD, carry, place)

    def decide(
        self,
        scores: Scores,
        place: Place | None = None,
        choice: Choice | RecordedChoice | None = None,
        turn: int = 0,
    ) -> Decision:
        """Choose experts, unless `choice` is an earlier one to replay; count, plan.

        The layer's one host sync: the counts of all ranks of the expert group.
        """
        scores = Scores(*(x.detach() for x in scores))
        clock = Clock(scores.logits_TE.device, self.step.observer)
        (num_tokens, num_all), num_experts = scores.logits_TE.shape, self.experts.num_experts
        with clock.phase("route"):
            if choice is None or isinstance(choice, RecordedChoice):
                router = self.routers[turn]
                choose = partial(router.choose, scores, place)
                choice = choose() if choice is None else choice.complete(router.k, choose)
                if place is not None and place.real_T is not None:
                    choice = choice.within(place.real_T)
            token_N, expert_N, kept_N = choice
            kept_A = counts_A = _count(expert_N, num_all, kept_N)
            if self.capacity_factor is not None:
                kept_N = capacity.within(choice, capacity.room(counts_A, self.capacity_factor, self.room_weights))
                kept_A = _count(expert_N, num_all, kept_N)
            is_row_N = kept_N
            if num_all > num_experts:
                is_row_N = expert_N < num_experts if kept_N is None else kept_N & (expert_N < num_experts)
            per_token = _count(token_N, max(num_tokens, 1), is_row_N).max()
            ep = self.experts.ep
            facts = torch.cat([kept_A[:num_experts], per_token[None]])
            with clock.phase("wait_counts"):
                gathered = all_gather(facts, ep.rows).cpu().numpy()
        with clock.phase("plan"):
            counts_RE: Ints = gathered[:, :-1]
            rows_L = None if is_row_N is None else find_true(is_row_N, int(counts_RE[ep.rank].sum()))
            residents, home = self.experts.residents, self.experts.home
            slices = self.experts.slices
            past = None if self.past_E is None else count_slices(self.past_E, slices)
            state = State(resident=residents.keeps_RE, past=past)
            plan = self.planner(count_slices(counts_RE, slices), home, self.costs, self.experts.limits, state)
            num_lent = len(residents.list_missing(plan))
            if torch.is_grad_enabled():
                residents.admit(plan)
                self.past_E = remember(self.past_E, counts_RE)
            num_chunks = count_chunks(self.experts.chunks, plan, self.costs)
        most = int(gathered[:, -1].max())
        return Decision(choice, kept_N, rows_L, plan, most, counts_A, kept_A, num_lent, clock, slices, num_chunks)

    def compute(
        self,
        x_TD: Tensor,
        scores: Scores,
        decision: Decision,
        turn: int = 0,
        run_shared: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """[T, D] -> [T, D]. `run_shared(shared, x_TD)` calls the shared experts, perhaps recomputing them later."""
        shared = partial(run_shared, self.shared) if run_shared and self.shared else self.shared
        routing = self.routers[turn].weigh(scores, decision.choice)
        rows = routing if decision.rows_L is None else routing.take(decision.rows_L)
        d = decision
        y_TD: Tensor = self.experts(x_TD, rows, d.plan, d.most_per_token, d.clock, shared, d.num_chunks)
        if self.zero_compute is None:
            return y_TD
        weight_N = routing.weight_N if decision.kept_N is None else routing.weight_N * decision.kept_N
        cheap_TD: Tensor = self.zero_compute(x_TD, routing.token_N, routing.expert_N, weight_N)
        return y_TD + cheap_TD


def _keep(decision: Decision, stats: LayerStats, grad: Tensor) -> None:
    """A hook that does nothing: it holds what has to live as long as the graph."""


def _is_same_plan(one: Plan, other: Plan) -> bool:
    pairs = ((one.expert, other.expert), (one.rank, other.rank), (one.num_rows, other.num_rows))
    return all(np.array_equal(a, b) for a, b in (*pairs, (one.counts, other.counts)))


def _count(index_N: Tensor, size: int, made_N: Tensor | None) -> Tensor:
    """How often each number below `size` stands there, where `made_N` is true; `bincount` would wait for a GPU."""
    ones_N = torch.ones_like(index_N) if made_N is None else made_N.to(index_N.dtype)
    return index_N.new_zeros(size).scatter_add_(0, index_N, ones_N)


def _router_options(router: str, options: RouterOptions | Mapping[str, Any] | None, top_k: int | None) -> RouterOptions:
    """The options of a router of this kind. Raises `ConfigError` where they are not."""
    if not isinstance(options, RouterOptions):
        values = dict(options or {})
        if top_k is not None:
            values["top_k"] = top_k
        made: RouterOptions = ROUTERS.make_options(router, values)
        return made
    return options if top_k is None else replace(options, top_k=top_k)
