"""The options of a layer of experts, its routers, planners and losses, and the kinds that there are. Loads no torch.

The configuration of a run maps onto these, field by field and under the same names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from moetrain.common.registry import Options, Registry, option


@dataclass(frozen=True, kw_only=True)
class RouterOptions(Options):
    """What every router has. Those of one kind derive from it and add their own."""

    biased: ClassVar[bool] = True  # whether it chooses by gates plus the bias
    equal_layers: ClassVar[bool] = False  # whether all layers must have equally many experts

    top_k: int = option(2, "experts that a token chooses", above=0)
    scores: Literal["softmax", "sigmoid"] = option("softmax", "what turns logits into gates")
    normalise: bool | None = option(None, "a token's weights sum to one; none: as the router's paper has it")
    scaling: float = option(1.0, "factor of all weights (DeepSeek-V3 has 2.5)", above=0)
    skew: float = option(0.0, "added to the logits of the first top_k experts, to study imbalance")
    capacity_factor: float | None = option(
        None, "room of an expert in mean loads, beyond which selections are dropped; none: dropless", above=0
    )

    def problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        """Yields (field, rule) for every option that does not fit a layer of `num_experts` experts."""
        if self.top_k > num_experts:
            yield "top_k", f"must be at most the number of experts, {num_experts}"


@dataclass(frozen=True, kw_only=True)
class UnbiasedOptions(RouterOptions):
    """Of routers to which a bias means nothing: `expert_choice`, `round_robin`."""

    biased: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class NoisyOptions(RouterOptions):
    """Of routers that explore."""

    noise: float = option(0.0, "standard deviation of noise on the logits, in training alone", at_least=0)


@dataclass(frozen=True, kw_only=True)
class TopKOptions(NoisyOptions):
    """Of `topk`."""

    groups: int | None = option(None, "groups of experts; a token chooses within top_groups of them", above=0)
    top_groups: int | None = option(None, "groups that a token chooses from (DeepSeek-V3)", above=0)

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

    top_p: float = option(0.4, "probability that a token's experts reach together", above=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class GroupedOptions(NoisyOptions):
    """Of `grouped`."""

    token_groups: int = option(2, "groups of tokens, by data domain, each with experts of its own", above=0)

    def problems(self, num_experts: int) -> Iterator[tuple[str, str]]:
        if self.top_k > num_experts // self.token_groups:
            rule = f"must leave each group at least router.top_k={self.top_k} of {num_experts} experts"
            yield "token_groups", rule


@dataclass(frozen=True, kw_only=True)
class FrozenOptions(RouterOptions):
    """Of `frozen`."""

    k_start: int = option(1, "experts a token at the first step; top_k at the last", above=0)


@dataclass(frozen=True, kw_only=True)
class GatingResidualOptions(TopKOptions):
    """Of `gating_residual`."""

    equal_layers: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class RecurrentOptions(NoisyOptions):
    """Of `recurrent`."""

    state_dim: int = option(128, "width of the state that layers hand on", above=0)


@dataclass(frozen=True, kw_only=True)
class ZeroComputeOptions(Options):
    """Experts that compute next to nothing (MoE++)."""

    zero: int = option(0, "experts whose output is zero", at_least=0)
    copy: int = option(0, "experts whose output is their input", at_least=0)
    constant: int = option(0, "experts that mix their input with a vector of their own", at_least=0)
    tau: float = option(0.75, "load of an expert that computes, as a share of that of one that does not", above=0)

    @property
    def total(self) -> int:
        """How many experts of these kinds there are."""
        return self.zero + self.copy + self.constant


@dataclass(frozen=True, kw_only=True)
class BalanceOptions(Options):
    """The losses that keep routers balanced."""

    scope: Literal["micro", "data", "global"] = option("global", "whose selections the loss goes by")
    accumulate: Literal["buffer", "exact", "hold"] = option(
        "buffer", "under gradient accumulation: counts so far, of the whole batch, or of the last step"
    )
    coefficient: float = option(0.01, "of the load-balancing loss", at_least=0)
    micro_fraction: float = option(0.0, "share of coefficient for a loss of the micro-batch alone", at_least=0)
    sequence_coefficient: float = option(0.0, "of the loss within sequences (DeepSeek-V3)", at_least=0)
    device_coefficient: float = option(0.0, "of the loss over groups of experts (DeepSeekMoE)", at_least=0)
    device_groups: int | None = option(None, "groups for that; none: the ranks of the expert group", above=0)
    entropy_coefficient: float = option(0.0, "of the routers' entropy", at_least=0)
    z_coefficient: float = option(0.0, "of the z-loss (ST-MoE)", at_least=0)
    bias: Literal["none", "sign", "proportional"] = option("none", "rule of the loss-free bias")
    bias_rate: float = option(1e-3, "step of the bias", at_least=0)


@dataclass(frozen=True, kw_only=True)
class LlepOptions(Options):
    """Of `llep`: the paper's α, m and λ."""

    alpha: float = option(1.0, "capacity of a device in mean loads", at_least=1)
    min_rows: int = option(1024, "rows below which no part of an expert moves", at_least=0)
    threshold: float = option(1.3, "max/mean device load below which nothing moves", at_least=1)


@dataclass(frozen=True, kw_only=True)
class EplbOptions(Options):
    """Of `eplb`."""

    replicas: int = option(1, "guest slots of a rank", above=0)


ROUTERS: Registry[Any] = Registry(
    "router",
    {
        "topk": ("moetrain.moe.routing.topk:TopK", TopKOptions),
        "expert_choice": ("moetrain.moe.routing.expert_choice:ExpertChoice", UnbiasedOptions),
        "top_p": ("moetrain.moe.routing.top_p:TopP", TopPOptions),
        "grouped": ("moetrain.moe.routing.grouped:Grouped", GroupedOptions),
        "frozen": ("moetrain.moe.routing.frozen:Frozen", FrozenOptions),
        "gating_residual": ("moetrain.moe.routing.gating_residual:GatingResidual", GatingResidualOptions),
        "recurrent": ("moetrain.moe.routing.recurrent:Recurrent", RecurrentOptions),
        "round_robin": ("moetrain.moe.routing.round_robin:RoundRobin", UnbiasedOptions),
    },
)
PLANNERS: Registry[Any] = Registry(
    "planner",
    {
        "home": ("moetrain.moe.planning.home:home", Options),
        "llep": ("moetrain.moe.planning.llep:llep", LlepOptions),
        "makespan": ("moetrain.moe.planning.makespan:makespan", Options),
        "eplb": ("moetrain.moe.planning.eplb:eplb", EplbOptions),
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
