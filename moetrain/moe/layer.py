"""The MoE layer: route, decide, compute; once, or several times over the same experts.

The three steps are apart so that activation recompute runs `route` and `compute` a second time while what `decide`
found (the choice and the plan) is replayed, never redone: statistics are taken once.

T tokens here, D width, E experts (where a router is concerned, those that compute nothing included), N selections, R
ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from moetrain import config
from moetrain.distributed.comm import all_gather
from moetrain.moe.clock import Clock, Mark, unmarked
from moetrain.moe.experts import Experts
from moetrain.moe.kernels.api import positions
from moetrain.moe.planning import PLANNERS
from moetrain.moe.planning.cost import Costs, State
from moetrain.moe.planning.eplb import remember
from moetrain.moe.planning.plan import Floats, Ints, Plan
from moetrain.moe.routing import ROUTERS, Choice, Place, Router, Scores, capacity
from moetrain.moe.routing.zero_compute import ZeroCompute

Planner = Callable[..., Plan]


@dataclass(frozen=True)
class Decision:
    """What is replayed under recompute."""

    choice: Choice
    kept_N: Tensor | None  # bool: selections that are made and not dropped; None: all
    rows_N: Tensor | None  # which of them are rows for the experts; None: all
    plan: Plan
    most_per_token: int  # rows of any token on any rank of the expert group
    counts_E: Tensor  # int64: selections made here, before any is dropped
    kept_E: Tensor  # int64: and after
    num_lent: int  # copies of experts that the forward sends, in the whole group
    clock: Clock


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

    @classmethod
    def of(cls, scores: Scores, decision: Decision) -> "LayerStats":
        """After `compute`: ends the layer's clock."""
        decision.clock.stop()
        d = decision
        return cls(scores, d.choice, d.counts_E, d.kept_E, d.plan, d.num_lent, d.clock)

    def light(self) -> "LayerStats":
        """What the metrics of a step need: without scores and choice, which are large."""
        none = torch.empty(0)
        return replace(self, scores=Scores(none, none), choice=Choice(none, none))


class MoE(nn.Module):
    """Routers, experts and shared experts of one layer. Built on one device; `experts.shard(ep)` spreads it.

    `model.chain` passes run over the same experts, each with its own router; `index`: the first one's number.
    """

    def __init__(
        self,
        model: config.Model,
        router: config.Router,
        planner: config.Planner,
        shared: nn.Module | None,
        index: int = 0,
    ) -> None:
        super().__init__()
        kind, num_all = ROUTERS[router.name], model.num_experts + model.num_zero_compute
        self.router = kind(model.dim, num_all, router, index)
        self.later_routers = nn.ModuleList(kind(model.dim, num_all, router, index + i) for i in range(1, model.chain))
        self.experts = Experts(model.dim, model.expert_hidden, model.num_experts)
        self.zero_compute = ZeroCompute(model) if model.num_zero_compute else None
        self.shared = shared
        self.capacity_factor = router.capacity_factor
        self.room_weights: tuple[float, ...] | None = None  # [E] of the experts' shares of the capacity; None: equal
        self.planner: Planner = partial(PLANNERS[planner.name], **planner.options)
        self.costs: Costs | None = None  # of this machine; None: those of the reference machine
        self.past_E: Floats | None = None  # [E] rows of the expert group in training so far, the later the heavier
        self.mark: Mark = unmarked
        if model.num_zero_compute:
            tau = router.zero_compute_tau
            self.room_weights = (tau,) * model.num_experts + (1.0,) * model.num_zero_compute
            for one in self.routers:
                one.loss_weights = (1.0,) * model.num_experts + (tau,) * model.num_zero_compute

    def forward(self, x_TD: Tensor, carry: Any = None, place: Place | None = None) -> tuple[Tensor, LayerStats, Any]:
        """One pass: [T, D] -> [T, D], its statistics, and the router's carry for the next one."""
        scores, carry = self.route(x_TD, carry, place)
        decision = self.decide(scores, place)
        return self.compute(x_TD, scores, decision), LayerStats.of(scores, decision), carry

    @property
    def routers(self) -> list[Router]:
        """In the order of the layer's statistics."""
        return [self.router, *cast(list[Router], list(self.later_routers))]

    def route(self, x_TD: Tensor, carry: Any, place: Place | None, turn: int = 0) -> tuple[Scores, Any]:
        """`turn`: which pass through the layer this is."""
        return self.routers[turn].score(x_TD, carry, place)

    def decide(
        self, scores: Scores, place: Place | None = None, choice: Choice | None = None, turn: int = 0
    ) -> Decision:
        """Choose experts, unless `choice` is an earlier one to replay; count, plan.

        The layer's one host sync: the counts of all ranks of the expert group.
        """
        scores = Scores(*(x.detach() for x in scores))
        clock = Clock(scores.logits_TE.device, self.mark)
        (num_tokens, num_all), num_experts = scores.logits_TE.shape, self.experts.num_experts
        with clock.phase("route"):
            if choice is None:
                choice = self.routers[turn].choose(scores, place)
            token_N, expert_N, kept_N = choice
            kept_E = counts_E = _count(expert_N, num_all, kept_N)
            if self.capacity_factor is not None:
                kept_N = capacity.within(choice, capacity.room(counts_E, self.capacity_factor, self.room_weights))
                kept_E = _count(expert_N, num_all, kept_N)
            is_row_N = kept_N
            if num_all > num_experts:
                is_row_N = expert_N < num_experts if kept_N is None else kept_N & (expert_N < num_experts)
            per_token = _count(token_N, max(num_tokens, 1), is_row_N).max()
            ep = self.experts.ep
            facts = torch.cat([kept_E[:num_experts], per_token[None]])
            with clock.phase("wait_counts"):
                gathered = all_gather(facts, ep.rows).cpu().numpy()
        with clock.phase("plan"):
            counts_RE: Ints = gathered[:, :-1]
            rows_N = None if is_row_N is None else positions(is_row_N, int(counts_RE[ep.rank].sum()))
            store, home = self.experts.store, self.experts.home
            state = State(resident=store.keeps_RE, past=self.past_E)
            plan = self.planner(counts_RE, home, self.costs, self.experts.limits, state)
            num_lent = len(store.missing(plan))
            if torch.is_grad_enabled():
                store.admit(plan)
                self.past_E = remember(self.past_E, counts_RE)
        return Decision(choice, kept_N, rows_N, plan, int(gathered[:, -1].max()), counts_E, kept_E, num_lent, clock)

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
        rows = routing if decision.rows_N is None else routing.take(decision.rows_N)
        y_TD = self.experts(x_TD, rows, decision.plan, decision.most_per_token, decision.clock, shared)
        if self.zero_compute is None:
            return y_TD
        weight_N = routing.weight_N if decision.kept_N is None else routing.weight_N * decision.kept_N
        return y_TD + self.zero_compute(x_TD, routing.token_N, routing.expert_N, weight_N)


def _count(index_N: Tensor, size: int, made_N: Tensor | None) -> Tensor:
    """How often each number below `size` stands there, where `made_N` is true; `bincount` would wait for a GPU."""
    ones_N = torch.ones_like(index_N) if made_N is None else made_N.to(index_N.dtype)
    return index_N.new_zeros(size).scatter_add_(0, index_N, ones_N)
