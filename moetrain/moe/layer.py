"""The MoE layer: route, decide, compute.

The three steps are apart so that activation recompute runs `route` and `compute` a second time while what `decide`
found (the choice and the plan) is replayed, never redone: statistics are taken once.

T tokens here, D width, E experts, R ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moetrain import config
from moetrain.comm import all_gather
from moetrain.moe.clock import Clock
from moetrain.moe.cost import Costs, State
from moetrain.moe.experts import Experts
from moetrain.moe.kernels import positions
from moetrain.moe.plan import Ints, Plan
from moetrain.moe.planners import PLANNERS
from moetrain.moe.routers import ROUTERS, Choice, Place, Router, Scores

Planner = Callable[..., Plan]


@dataclass(frozen=True)
class Decision:
    """What is replayed under recompute."""

    choice: Choice
    rows_N: Tensor | None  # which of the selections are rows for the experts; None: all
    plan: Plan
    most_per_token: int  # rows of any token on any rank of the expert group
    counts_E: Tensor  # int64: selections made here, before any is dropped
    num_lent: int  # copies of experts that the forward sends, in the whole group
    clock: Clock


@dataclass(frozen=True)
class LayerStats:
    """What one layer's routing on this rank contributes to losses and metrics."""

    scores: Scores  # with gradient
    choice: Choice
    counts_E: Tensor  # int64: selections made here, before any is dropped
    plan: Plan
    num_lent: int  # copies of experts sent in the forward, in the whole group
    clock: Clock

    @classmethod
    def of(cls, scores: Scores, decision: Decision) -> "LayerStats":
        """After `compute`: ends the layer's clock."""
        decision.clock.stop()
        return cls(scores, decision.choice, decision.counts_E, decision.plan, decision.num_lent, decision.clock)

    def light(self) -> "LayerStats":
        """What the metrics of a step need: without scores and choice, which are large."""
        none = torch.empty(0)
        return replace(self, scores=Scores(none, none), choice=Choice(none, none))


class MoE(nn.Module):
    """Router, experts and shared experts of one layer. Built on one device; `experts.shard(ep)` spreads it."""

    def __init__(self, model: config.Model, router: config.Router, planner: config.Planner, shared: nn.Module | None):
        super().__init__()
        self.router = ROUTERS[router.name](model.dim, model.num_experts, router)
        self.experts = Experts(model.dim, model.expert_hidden, model.num_experts)
        self.shared = shared
        self.planner: Planner = partial(PLANNERS[planner.name], **planner.options)
        self.costs: Costs | None = None  # of this machine; None: those of the reference machine

    def forward(self, x_TD: Tensor, carry: Any = None, place: Place | None = None) -> tuple[Tensor, LayerStats, Any]:
        """[T, D] -> [T, D], the layer's statistics, and the router's carry for the next layer."""
        scores, carry = self.route(x_TD, carry, place)
        decision = self.decide(scores, place)
        return self.compute(x_TD, scores, decision), LayerStats.of(scores, decision), carry

    @property
    def routers(self) -> list[Router]:
        """In the order of the layer's statistics."""
        return [self.router]

    def route(self, x_TD: Tensor, carry: Any, place: Place | None) -> tuple[Scores, Any]:
        return self.router.score(x_TD, carry, place)

    def decide(self, scores: Scores, place: Place | None = None, choice: Choice | None = None) -> Decision:
        """Choose experts, unless `choice` is an earlier one to replay; count, plan.

        The layer's one host sync: the counts of all ranks of the expert group.
        """
        scores = Scores(*(x.detach() for x in scores))
        clock = Clock(scores.logits_TE.device)
        num_tokens, num_experts = scores.logits_TE.shape
        with clock.phase("route"):
            if choice is None:
                choice = self.router.choose(scores, place)
            chosen_N = choice.chosen_N
            counts_E = _count(choice.expert_N, num_experts, chosen_N)
            per_token = _count(choice.token_N, max(num_tokens, 1), chosen_N).max()
            ep = self.experts.ep
            assert ep is not None, "experts.shard() comes first"
            gathered = all_gather(torch.cat([counts_E, per_token[None]]), ep.rows).cpu().numpy()
        with clock.phase("plan"):
            counts_RE: Ints = gathered[:, :-1]
            rows_N = None if chosen_N is None else positions(chosen_N, int(counts_RE[ep.rank].sum()))
            store, home = self.experts.store, self.experts.home
            plan = self.planner(counts_RE, home, self.costs, self.experts.limits, State(resident=store.keeps_RE))
            num_lent = len(store.missing(plan))
            if torch.is_grad_enabled():
                store.admit(plan)
        return Decision(choice, rows_N, plan, int(gathered[:, -1].max()), counts_E, num_lent, clock)

    def compute(self, x_TD: Tensor, scores: Scores, decision: Decision) -> Tensor:
        routing = self.router.weigh(scores, decision.choice)
        if decision.rows_N is not None:
            routing = routing.take(decision.rows_N)
        return self.experts(x_TD, routing, decision.plan, decision.most_per_token, decision.clock, self.shared)


def _count(index_N: Tensor, size: int, made_N: Tensor | None) -> Tensor:
    """How often each number below `size` stands there, where `made_N` is true; `bincount` would wait for a GPU."""
    ones_N = torch.ones_like(index_N) if made_N is None else made_N.to(index_N.dtype)
    return index_N.new_zeros(size).scatter_add_(0, index_N, ones_N)
