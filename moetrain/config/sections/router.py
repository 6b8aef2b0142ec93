"""The router and the planner of the MoE layers."""

from typing import Annotated, Any, Literal

from pydantic import Field

from moetrain.config.sections.base import Finite, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, Shape


class Router(Section):
    """Which tokens go to which experts (docs/routers.md).

    The fields with a default here belong to some routers only.
    """

    name: str = Field(
        description="The kind of router: topk, expert_choice, top_p, grouped, frozen, gating_residual, recurrent or "
        "round_robin (docs/routers.md)."
    )
    top_k: Positive = Field(
        description="Experts per token. Under `router.name=top_p` only the estimate of active parameters uses it."
    )
    scores: Literal["softmax", "sigmoid"] = Field(description="Function that turns the router's logits into scores.")
    normalise: bool | None = Field(
        description="Whether the weights of a token's experts are divided by their sum. null: as the router's paper "
        "has it, and never for `router.top_k=1`, where the only weight would be a constant."
    )
    scaling: PositiveFloat = Field(
        description="Factor on the weights of all experts (DeepSeek-V3's routed_scaling_factor)."
    )
    skew: Finite = Field(
        description="Number added to the logits of the first `router.top_k` experts, to study an uneven load."
    )
    k_schedule: Shape = Field(
        description="How the number of experts per token varies over depth; the mean stays `router.top_k` "
        "(docs/routers.md)."
    )
    capacity_factor: PositiveFloat | None = Field(
        description="Most token copies that an expert takes from a rank, as a multiple of the even share; the rest is "
        "dropped. null: nothing is dropped."
    )
    zero_compute_tau: PositiveFloat = Field(
        description="Weight of experts without computation in the balance loss, and of the others in the capacity "
        "(MoE++'s τ)."
    )
    noise: NonNegativeFloat = Field(
        default=0.0,
        description="Standard deviation of normal noise that is added to the logits where experts are chosen, in "
        "training only.",
    )
    groups: Positive | None = Field(
        default=None,
        description="Number of groups of experts, of which a token uses `router.top_groups` (DeepSeek-V3). null: no "
        "groups.",
    )
    top_groups: Positive | None = Field(
        default=None,
        description="Groups per token: those whose two best experts have the highest sum of scores. It goes with "
        "`router.groups`.",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.4, description="A token's experts are added, best first, until their probabilities sum to this."
    )
    k_start: Positive = Field(
        default=1, description="Experts per token at the first step; the number rises linearly to `router.top_k`."
    )
    token_groups: Positive = Field(
        default=2, description="Groups of experts; group g serves the tokens of every domain d with d mod groups = g."
    )
    state_dim: Positive = Field(default=128, description="Width of the recurrent state that goes from layer to layer.")

    @property
    def own_options(self) -> dict[str, Any]:
        """Those of single routers that are not as they are by default."""
        fields = type(self).model_fields
        return {k: v for k, v in self.model_dump().items() if not fields[k].is_required() and v != fields[k].default}


class Planner(Section):
    """Who computes what: the planner that moves token copies to idle ranks (docs/balancing.md)."""

    name: str = Field(
        description="The kind of planner: home (moves nothing), llep, makespan or eplb. Choose it by the group, "
        "`planner=llep`."
    )
    alpha: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Capacity of a device in mean loads (LLEP's α)."
    )
    min_rows: NonNegative | None = Field(
        default=None, description="Fewest token copies of an expert that are worth moving elsewhere (LLEP's m)."
    )
    threshold: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(
        default=None, description="Largest / mean device load below which nothing is moved (LLEP's λ)."
    )
    replicas: Positive | None = Field(default=None, description="Slots per rank for replicas of experts (EPLB).")

    @property
    def options(self) -> dict[str, Any]:
        return {k: v for k, v in self.model_dump(exclude={"name"}).items() if v is not None}
