"""The options of a layer of experts, its routers, planners and losses, and the kinds that there are. Loads no torch.

The configuration of a run maps onto these, field by field and under the same names: what an option means and which
values it takes stands here alone. Descriptions name fields of the configuration, `router.top_k`; null is None.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from moetrain.common.registry import Options, Registry, option


@dataclass(frozen=True, kw_only=True)
class RouterOptions(Options):
    """What every router has. Those of one kind derive from it and add their own."""

    biased: ClassVar[bool] = True  # whether it chooses by gates plus the bias
    equal_layers: ClassVar[bool] = False  # whether all layers must have equally many experts
    ragged: ClassVar[bool] = False  # whether tokens choose unequal numbers of experts

    top_k: int = option(
        2,
        "Experts per token. Under `router.name=top_p` only the estimate of active parameters uses it.",
        above=0,
    )
    scores: Literal["softmax", "sigmoid"] = option("softmax", "Function that turns the router's logits into scores.")
    normalise: bool | None = option(
        None,
        "Whether the weights of a token's experts are divided by their sum. null: as the router's paper has it, and "
        "never for `router.top_k=1`, where the only weight would be a constant.",
    )
    scaling: float = option(1.0, "Factor on the weights of all experts (DeepSeek-V3's routed_scaling_factor).", above=0)
    skew: float = option(
        0.0, "Number added to the logits of the first `router.top_k` experts, to study an uneven load."
    )
    capacity_factor: float | None = option(
        None,
        "Most token copies that an expert takes from a rank, as a multiple of the even share; the rest is dropped. "
        "null: nothing is dropped.",
        above=0,
    )

    @property
    def has_fixed_rows(self) -> bool:
        """Whether equally many tokens always have equally many selections that are kept."""
        return not self.ragged and self.capacity_factor is None

    def problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        """Yields (field, rule) for every option that does not fit a layer of `num_experts` experts."""
        if self.top_k > num_experts:
            yield "top_k", f"must be at most the number of experts, {num_experts}"


@dataclass(frozen=True, kw_only=True)
class UnbiasedOptions(RouterOptions):
    """Of routers to which a bias means nothing: `round_robin`, and those that derive from it."""

    biased: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceOptions(UnbiasedOptions):
    """Of `expert_choice`."""

    ragged: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class NoisyOptions(RouterOptions):
    """Of routers that explore."""

    noise: float = option(
        0.0,
        "Standard deviation of normal noise that is added to the logits where experts are chosen, in training only.",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class TopKOptions(NoisyOptions):
    """Of `topk`."""

    groups: int | None = option(
        None,
        "Number of groups of experts, of which a token uses `router.top_groups` (DeepSeek-V3). null: no groups.",
        above=0,
    )
    top_groups: int | None = option(
        None,
        "Groups per token: those whose two best experts have the highest sum of scores. Set it with `router.groups`.",
        above=0,
    )

    def problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        yield from super().problems(num_experts)
        groups, top = self.groups, self.top_groups
        if (groups is None) != (top is None):
            field, other = ("groups", "top_groups") if top is None else ("top_groups", "groups")
            yield field, f"must be set together with router.{other}, which is null"
        elif groups is not None and top is not None:
            if num_experts % groups:
                yield "groups", f"must divide the {num_experts} experts of a layer"
            if top > groups:
                yield "top_groups", f"must be at most router.groups={groups}"
            if num_experts // groups * top < self.top_k:
                yield "top_groups", f"must have at least router.top_k={self.top_k} experts together"


@dataclass(frozen=True, kw_only=True)
class TopPOptions(UnbiasedOptions):
    """Of `top_p`."""

    ragged: ClassVar[bool] = True
    top_p: float = option(
        0.4, "A token's experts are added, best first, until their probabilities sum to this.", above=0, at_most=1
    )


@dataclass(frozen=True, kw_only=True)
class GroupedOptions(NoisyOptions):
    """Of `grouped`."""

    token_groups: int = option(
        2, "Groups of experts; group g serves the tokens of every domain d with d mod groups = g.", above=0
    )

    def problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        if self.top_k > num_experts // self.token_groups:
            rule = f"must leave each group at least router.top_k={self.top_k} of {num_experts} experts"
            yield "token_groups", rule


@dataclass(frozen=True, kw_only=True)
class FrozenOptions(RouterOptions):
    """Of `frozen`."""

    k_start: int = option(
        1, "Experts per token at the first step; the number rises linearly to `router.top_k`.", above=0
    )


@dataclass(frozen=True, kw_only=True)
class GatingResidualOptions(TopKOptions):
    """Of `gating_residual`."""

    equal_layers: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class RecurrentOptions(NoisyOptions):
    """Of `recurrent`."""

    state_dim: int = option(128, "Width of the recurrent state that goes from layer to layer.", above=0)


@dataclass(frozen=True, kw_only=True)
class ZeroComputeOptions(Options):
    """Experts that compute next to nothing (MoE++)."""

    zero: int = option(
        0, "Additional experts per layer whose output is zero (MoE++). They need no computation.", at_least=0
    )
    copy: int = option(0, "Additional experts per layer whose output is the token (MoE++).", at_least=0)
    constant: int = option(
        0, "Additional experts per layer whose output mixes the token with a learned vector (MoE++).", at_least=0
    )
    tau: float = option(
        0.75,
        "Weight of experts without computation in the balance loss, and of the others in the capacity (MoE++'s τ).",
        above=0,
    )

    @property
    def total(self) -> int:
        """How many experts of these kinds there are."""
        return self.zero + self.copy + self.constant


@dataclass(frozen=True, kw_only=True)
class BalanceOptions(Options):
    """The losses that keep routers balanced."""

    scope: Literal["micro", "data", "global"] = option(
        "global",
        "Tokens over which the balance loss counts the frequencies of the experts. micro: a rank's micro-batch. data: "
        "the micro-batches of all ranks. global: the whole global batch.",
    )
    accumulate: Literal["buffer", "exact", "hold"] = option(
        "buffer",
        "Where the counts of `balance.scope=global` come from under gradient accumulation. buffer: from the "
        "micro-steps so far. exact: from the whole batch, by a counting pass. hold: from the step before.",
    )
    coefficient: float = option(
        0.01,
        "Weight of the balance loss, per selection: frequencies sum to 1 and a balanced layer has loss 1. It is summed "
        "over layers.",
        at_least=0,
    )
    micro_fraction: float = option(
        0.0,
        "Weight of an additional balance loss over this rank's micro-batch alone, as a fraction of "
        "`balance.coefficient`.",
        at_least=0,
    )
    sequence_coefficient: float = option(
        0.0, "Weight of the balance loss within every sequence, averaged over sequences (DeepSeek-V3).", at_least=0
    )
    device_coefficient: float = option(
        0.0,
        "Weight of the balance loss over groups of experts instead of single ones (DeepSeekMoE).",
        at_least=0,
    )
    device_groups: int | None = option(
        None,
        "Number of groups for `balance.device_coefficient`, formed by home rank. null: the ranks of `parallel.ep`.",
        above=0,
    )
    entropy_coefficient: float = option(
        0.0,
        "Weight of the mean entropy of a token's probabilities. A small value makes the router decisive, which "
        "`router.name=top_p` needs.",
        at_least=0,
    )
    z_coefficient: float = option(
        0.0,
        "Weight of the z-loss: the mean squared logsumexp of the router's logits, summed over layers.",
        at_least=0,
    )
    bias: Literal["none", "sign", "proportional"] = option(
        "none",
        "Rule for a bias per expert, added to the scores only where experts are chosen: balance without a loss "
        "(DeepSeek-V3). sign: a fixed step up or down. proportional: a step in proportion to the missing load.",
    )
    bias_rate: float = option(
        1e-3,
        "Change of the bias per optimizer step. For `balance.bias=proportional` it is multiplied by the missing load "
        "in units of the mean load.",
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class LlepOptions(Options):
    """Of `llep`: the paper's α, m and λ."""

    alpha: float = option(1.0, "Capacity of a device in mean loads (LLEP's α).", at_least=1)
    min_rows: int = option(
        1024, "Fewest token copies of an expert that are worth moving to another rank (LLEP's m).", at_least=0
    )
    threshold: float = option(1.3, "Largest / mean device load below which nothing is moved (LLEP's λ).", at_least=1)


@dataclass(frozen=True, kw_only=True)
class EplbOptions(Options):
    """Of `eplb`."""

    replicas: int = option(1, "Slots per rank for replicas of experts (EPLB).", above=0)


NEED_FIXED_ROWS = ("static",)  # planners
NEED_NO_COSTS = ("home", "llep", "static")  # planners


def find_planner_problem(planner: str, router: RouterOptions, num_zero_compute: int) -> str | None:
    """Returns the rule that a planner breaks with this router and so many experts that compute nothing; None: none."""
    if planner not in NEED_FIXED_ROWS or (router.has_fixed_rows and not num_zero_compute):
        return None
    return (
        "needs a router whose number of rows is fixed: not top_p or expert_choice, no router.capacity_factor, no "
        "experts that compute nothing; use makespan"
    )


Chunks = Literal[1, 2, 4, 8, "auto"]
CHUNKS: tuple[Chunks, ...] = get_args(Chunks)


ROUTERS: Registry[Any] = Registry(
    "router",
    {
        "topk": ("moetrain.moe.routing.topk:TopK", TopKOptions),
        "expert_choice": ("moetrain.moe.routing.expert_choice:ExpertChoice", ExpertChoiceOptions),
        "top_p": ("moetrain.moe.routing.topk:TopP", TopPOptions),
        "frozen": ("moetrain.moe.routing.topk:Frozen", FrozenOptions),
        "grouped": ("moetrain.moe.routing.topk:Grouped", GroupedOptions),
        "gating_residual": ("moetrain.moe.routing.recurrent:GatingResidual", GatingResidualOptions),
        "recurrent": ("moetrain.moe.routing.recurrent:Recurrent", RecurrentOptions),
        "round_robin": ("moetrain.moe.routing.topk:RoundRobin", UnbiasedOptions),
    },
)
PLANNERS: Registry[Any] = Registry(
    "planner",
    {
        "home": ("moetrain.moe.planning.plan:stay_home", Options),
        "llep": ("moetrain.moe.planning.llep:llep", LlepOptions),
        "makespan": ("moetrain.moe.planning.makespan:makespan", Options),
        "eplb": ("moetrain.moe.planning.eplb:eplb", EplbOptions),
        "static": ("moetrain.moe.planning.static:static", Options),
        "auto": ("moetrain.moe.planning.static:auto", Options),
    },
)


def register_router(name: str, options: type[RouterOptions] | None = None) -> Any:
    """Returns a decorator that makes a subclass of `Router` known as `router.name=NAME`.

    `options`: the dataclass of its options; None: the class's attribute `Options`.
    """
    return ROUTERS.register(name, options)


def register_planner(name: str, options: type[Options] | None = None) -> Any:
    """Returns a decorator that makes a planner known as `planner.name=NAME`: a function (counts, home, costs, limits,
    state, **options) -> `Plan`, the same on every rank for the same arguments.

    `options`: the dataclass of its options, which are its keyword-only arguments; None: it has none.
    """
    return PLANNERS.register(name, options)
