"""An experts module of transformers whose experts are spread over a group of ranks.

transformers calls the function that is registered as `moetrain` in `ALL_EXPERTS_FUNCTIONS` with the tokens, the
chosen experts and their weights; routers and all else stay the family's own code.

T tokens here, K experts a token, D width, E experts, N selections, R ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moetrain.common.errors import ConfigError
from moetrain.common.registry import Options
from moetrain.distributed.comm import all_gather
from moetrain.distributed.mesh import ExpertGroup
from moetrain.hf.compute import GroupedExperts
from moetrain.hf.layout import ExpertsLayout
from moetrain.hf.pinning import count_selections
from moetrain.hf.replay import checkpoint_with_replay, decide_once
from moetrain.hf.scores import FamilyRouter
from moetrain.moe.adapters import TRAIN_ALL, ExpertAdapters
from moetrain.moe.clock import Clock
from moetrain.moe.context import LayerContext, StepContext
from moetrain.moe.exchange.dispatch import DispatchTables
from moetrain.moe.exchange.residents import GuestLoan, ResidentGuests
from moetrain.moe.kernels.api import KernelUser
from moetrain.moe.kernels.bags import find_true
from moetrain.moe.options import PLANNERS, Chunks
from moetrain.moe.passes import DispatchTokens, ExpertsCombine
from moetrain.moe.planning import count_chunks, default_home
from moetrain.moe.planning.cost import Costs, Limits, State
from moetrain.moe.planning.eplb import remember
from moetrain.moe.planning.plan import Floats, Ints, Plan
from moetrain.moe.routing.base import Routing

NAME = "moetrain"  # in ALL_EXPERTS_FUNCTIONS


@dataclass(frozen=True)
class SpreadDecision:
    """What is decided for the tokens of one pass, and replayed under recompute."""

    plan: Plan
    index_TK: Tensor  # int64: the experts that were chosen; num_experts stands for none
    counts_E: Tensor  # int64: selections here
    rows_N: Tensor | None  # which selections are rows; None: all
    most_per_token: int  # rows of a token, on any rank
    num_lent: int  # copies of experts that the forward sends, in the whole group
    clock: Clock
    num_chunks: int  # in which rows travel and are computed


class SpreadWatcher(Protocol):
    """Who is told what the experts do."""

    def before_experts(self, one: "SpreadExperts", hidden_TD: Tensor, top_k: int) -> None: ...

    def after_decision(self, one: "SpreadExperts", decision: SpreadDecision) -> None: ...


class SpreadExperts(KernelUser):
    """The experts of one module, of which this rank keeps those whose home it is."""

    def __init__(
        self,
        name: str,
        module: Any,
        group: ExpertGroup,
        planner: tuple[str, Options | Mapping[str, Any] | None],
        costs: Costs | None,
    ) -> None:
        """Take away the other experts' weights from `module`, in place.

        `name`: of the module. Raises `ConfigError` where the module or the planner is none that is covered.
        """
        self.name, self.module, self.costs = name, module, costs
        self.regions: Sequence[nn.Module] = ()  # the modules around it, one of which may be recomputed
        self.watcher: SpreadWatcher | None = None
        self.router: FamilyRouter | None = None  # where its scores are wanted
        self.plan_with(*planner)
        self.layout = ExpertsLayout.read(name, module)
        self.num_experts: int = module.num_experts
        self.slices = 1  # families' experts stay whole
        self.is_fused = self.layout.is_swiglu  # else: the path of any family
        self.adapters: ExpertAdapters | None = None  # of frozen experts
        self.step = StepContext()
        self.chunks: Chunks = 1  # in which rows travel and are computed; auto: as costs have it
        self.real_T: Tensor | None = None  # bool: tokens of this pass that are not padding; None: all
        self._past_E: Floats | None = None  # [E] rows of the group in training so far, the later the heavier
        self.shard(group)

    def cut(self, slices: int) -> None:
        """Leave the experts whole. Raises `ConfigError` for more than one slice."""
        if slices > 1:
            raise ConfigError(f"r={slices}: must be 1, the experts of a transformers model are never cut")

    def shard(
        self, ep: ExpertGroup, guest_slots: int = 0, max_rows: int | None = None, keep_hidden: bool = True
    ) -> None:
        """Keep the experts whose home is `ep.rank`, of all of them; on the meta device, too.

        `guest_slots`: guests that stay here until the last backward of an optimizer step; `max_rows`: rows computed at
        a time; `keep_hidden`: whether rows and hidden activations stay for the backward, or just the tokens that came.
        """
        self.ep, self.max_rows, self.keep_hidden = ep, max_rows, keep_hidden
        self.residents = ResidentGuests.empty(guest_slots, ep.size, self.num_experts)
        adapters = [] if self.adapters is None else self.adapters.own_names
        for key in (*self.layout.names, *adapters) if ep.size > 1 else ():
            whole = getattr(self.module, key)
            own = nn.Parameter(whole.detach()[self.own_experts()].clone(), requires_grad=whole.requires_grad)
            setattr(self.module, key, own)

    def plan_with(self, planner: str, options: Options | Mapping[str, Any] | None = None) -> None:
        """Choose the planner by its name and options. Raises `ConfigError` where there is no such one."""
        made = options if isinstance(options, Options) else PLANNERS.make_options(planner, options or {})
        self.planner: Callable[..., Plan] = partial(PLANNERS[planner], **asdict(made))

    def use_costs(self, costs: Costs) -> None:
        """Have the planner decide with these costs from now on."""
        self.costs = costs

    @property
    def experts(self) -> "SpreadExperts":
        """Itself: where a `moetrain.MoE` has its experts."""
        return self

    @property
    def routers(self) -> tuple[None]:
        """One pass through the experts in every forward; the router is the family's own."""
        return (None,)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The parameters of the module that hold one entry an expert, but for adapters."""
        return self.layout.names

    @property
    def is_transposed(self) -> bool:
        """Whether matrices are [E, in, out]."""
        return self.layout.transposed

    @property
    def home(self) -> Ints:
        """[E] the rank that owns each expert."""
        return default_home(self.num_experts, self.ep.size)

    def own_experts(self) -> list[int]:
        """Global numbers of the experts kept here, in the order of their slots."""
        return (self.home == self.ep.rank).nonzero()[0].tolist()

    @property
    def limits(self) -> Limits:
        """What a planner is to keep within; one guest may always pass."""
        return Limits(rows=self.max_rows, guests=max(self.residents.slots, 1))

    def parameters(self) -> list[nn.Parameter]:
        """The tensors that hold one entry an expert."""
        return [getattr(self.module, key) for key in self.layout.names]

    @property
    def is_recomputed(self) -> bool:
        """Whether a backward runs the module's forward again."""
        return any(
            isinstance(region, GradientCheckpointingLayer) and region.gradient_checkpointing and region.training
            for region in self.regions
        )

    @property
    def dim(self) -> int:
        """D"""
        return self.gate_up.shape[1 if self.layout.transposed else 2]

    @property
    def hidden(self) -> int:
        """H"""
        down = self.parameters()[1]
        return down.shape[1 if self.layout.transposed else 2]

    @property
    def gate_up(self) -> nn.Parameter:
        return self.parameters()[0]

    def __call__(self, hidden_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Return [T, D], the weighted sum of every token's experts, wherever the plan has them computed."""
        if self.watcher is not None:
            self.watcher.before_experts(self, hidden_TD, index_TK.shape[1])
        decision: SpreadDecision = decide_once(lambda: self.decide(index_TK))
        routing = _routing(decision.index_TK, weight_TK)
        if decision.rows_N is not None:
            routing = routing.take(decision.rows_N)
        dtype = _compute_dtype(hidden_TD, self.gate_up)
        weights = [p.to(dtype) for p in self.parameters()]
        weights = [p[:, None] if p.dim() == 2 else p for p in weights]
        if self.adapters is not None:
            weights += self.adapters.list_tensors(len(weights[0]), dtype)
        x_TD = hidden_TD.to(dtype)
        with torch.autocast(x_TD.device.type, enabled=False):
            context = self._start(x_TD, routing, decision, weights)
            ticket = DispatchTokens.apply(x_TD, routing.weight_N, context)
            if self.is_fused:
                y_TD = ExpertsCombine.apply(ticket, context, *weights)
            else:
                norm = list(self.layout.norm.parameters()) if self.layout.norm else []
                y_TD = GroupedExperts.apply(ticket, context, self.layout, *weights, *norm)
        decision.clock.stop()  # what a recompute does is not counted again
        return y_TD.to(hidden_TD.dtype)

    def _start(self, x_TD: Tensor, routing: Routing, decision: SpreadDecision, weights: list[Tensor]) -> LayerContext:
        """Begin to lend, and tell the other ranks which rows come."""
        is_wide = all(size % 32 == 0 for w in weights[:2] for size in w.shape[1:])  # kernels of our own need it
        kernels = self.kernel_choice.choose(x_TD.device, x_TD.dtype, weights[:2] if is_wide else ())
        first = int(np.searchsorted(self.home, self.ep.rank))
        plan, clock = decision.plan, decision.clock
        with clock.phase("lend"):
            loan = GuestLoan(weights, first, plan, self.residents, self.ep)
        with clock.phase("dispatch"):
            tables = DispatchTables.build(
                routing, plan, self.ep, kernels, len(x_TD), decision.most_per_token, decision.num_chunks
            )
        clock.sent_bytes = sum(tables.copies_out) * x_TD.shape[1] * x_TD.element_size()
        context = LayerContext(
            ep=self.ep,
            home=self.home,
            first_expert=first,
            plan=plan,
            tables=tables,
            kernels=kernels,
            residents=self.residents,
            step=self.step,
            clock=clock,
            max_rows=self.max_rows,
            keep_hidden=self.keep_hidden,
            update=TRAIN_ALL if self.adapters is None else self.adapters.update,
        )
        context.loan.put(loan)
        return context

    def run_empty(self, carry: Tensor) -> Tensor:
        """A pass without tokens, in forward and backward, after the one that gave `carry`; both are zero."""
        weight = self.gate_up
        num_experts = torch.zeros(0, 1, dtype=torch.int64, device=weight.device)

        def compute_empty(carry: Tensor) -> Tensor:
            x_TD = weight.new_zeros(0, self.dim) + carry
            return carry + self(x_TD, num_experts, weight.new_zeros(0, 1)).sum()

        return checkpoint_with_replay(compute_empty, carry) if self.is_recomputed else compute_empty(carry)

    def decide(self, index_TK: Tensor) -> SpreadDecision:
        """Count the selections of all ranks, and plan. The layer's one wait of the host for the device."""
        num_experts, clock = self.num_experts, Clock(index_TK.device, self.step.observer)
        with clock.phase("route"):
            if self.real_T is not None:
                index_TK = index_TK.masked_fill(~self.real_T[:, None], num_experts)
            is_row_TK = index_TK < num_experts  # some families name an expert beyond the last where a token has none
            expert_N, counts_E = index_TK.flatten(), count_selections(index_TK, num_experts)
            most = is_row_TK.sum(1).max() if len(index_TK) else expert_N.new_zeros(())
            facts = torch.cat([counts_E, most[None]])
            with clock.phase("wait_counts"):
                gathered = all_gather(facts, self.ep.rows).cpu().numpy()
        with clock.phase("plan"):
            counts_RE: Ints = gathered[:, :-1]
            num_rows = int(counts_RE[self.ep.rank].sum())
            rows_N = None if num_rows == len(expert_N) else find_true(is_row_TK.flatten(), num_rows)
            state = State(self.residents.keeps_RE, self._past_E)
            plan = self.planner(counts_RE, self.home, self.costs, self.limits, state)
            num_lent = len(self.residents.list_missing(plan))
            if torch.is_grad_enabled():
                self.residents.admit(plan)
                self._past_E = remember(self._past_E, counts_RE)
        most_per_token = int(gathered[:, -1].max())
        num_chunks = count_chunks(self.chunks, plan, self.costs)
        decision = SpreadDecision(plan, index_TK, counts_E, rows_N, most_per_token, num_lent, clock, num_chunks)
        if self.watcher is not None:
            self.watcher.after_decision(self, decision)
        return decision


def compute_spread(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **ignored: Any
) -> Tensor:
    """The function that transformers calls. Raises `ConfigError` where the module has not been spread."""
    spread: SpreadExperts | None = getattr(module, "_moetrain", None)
    if spread is None and getattr(module, "_moetrain_whole", False):
        return type(module).forward.__wrapped__(module, hidden_states, top_k_index, top_k_weights)
    if spread is None:
        raise ConfigError(f"experts_implementation={NAME}: moetrain.hf.expert_parallel(model, group) comes first")
    return spread(hidden_states, top_k_index, top_k_weights)


def register() -> None:
    """Make `moetrain` one of the experts implementations of transformers."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, compute_spread)


def _routing(index_TK: Tensor, weight_TK: Tensor) -> Routing:
    num_tokens, num_selected = index_TK.shape
    token_N = torch.arange(num_tokens, device=index_TK.device).repeat_interleave(num_selected)
    weight_N = weight_TK.reshape(-1).float()
    return Routing(token_N, index_TK.flatten().long(), weight_N, weight_N.new_empty(0))


def _compute_dtype(hidden_TD: Tensor, weight: Tensor) -> torch.dtype:
    """That of autocast where it is on; else that of the weights."""
    kind = hidden_TD.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
