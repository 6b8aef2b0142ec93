"""The router and the planner of the MoE layers: what all kinds have. `config.kinds` adds the options of each kind."""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from moetrain.config.sections.base import Finite, Positive, PositiveFloat, Section, Shape

ROUTER_OPTIONS: dict[str, tuple[Any, str]] = {  # of single kinds of ours: default and meaning, in the order of files
    "noise": (
        0.0,
        "Standard deviation of normal noise that is added to the logits where experts are chosen, in training only.",
    ),
    "groups": (
        None,
        "Number of groups of experts, of which a token uses `router.top_groups` (DeepSeek-V3). null: no groups.",
    ),
    "top_groups": (
        None,
        "Groups per token: those whose two best experts have the highest sum of scores. Set it with `router.groups`.",
    ),
    "top_p": (0.4, "A token's experts are added, best first, until their probabilities sum to this."),
    "k_start": (1, "Experts per token at the first step; the number rises linearly to `router.top_k`."),
    "token_groups": (2, "Groups of experts; group g serves the tokens of every domain d with d mod groups = g."),
    "state_dim": (128, "Width of the recurrent state that goes from layer to layer."),
}
PLANNER_OPTIONS: dict[str, tuple[Any, str]] = {  # None: the planner's own default
    "alpha": (None, "Capacity of a device in mean loads (LLEP's α)."),
    "min_rows": (None, "Fewest token copies of an expert that are worth moving to another rank (LLEP's m)."),
    "threshold": (None, "Largest / mean device load below which nothing is moved (LLEP's λ)."),
    "replicas": (None, "Slots per rank for replicas of experts (EPLB)."),
}


class Router(Section):
    """Which tokens go to which experts (docs/routers.md)."""

    name: str = Field(
        description="The kind of router (docs/routers.md). Kinds of other packages are known once these are installed."
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
    freeze: bool = Field(
        default=False,
        description="Whether the weights of the routers stay as they are, as in post-training. Gradients still flow "
        "through them to the layers below.",
    )

    @model_serializer(mode="wrap")
    def _write_flat(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return write_flat(write(self), ROUTER_OPTIONS)


class Planner(Section):
    """Who computes what: the planner that moves token copies to idle ranks (docs/balancing.md)."""

    name: str = Field(description="The kind of planner. Choose it by the group, `planner=llep`.")

    @property
    def options(self) -> dict[str, Any]:
        """Those of its kind that are given, for `PLANNERS.make_options`."""
        return {name: value for name, value in self if name != "name" and value is not None}

    @model_serializer(mode="wrap")
    def _write_flat(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return write_flat(write(self), PLANNER_OPTIONS)


def write_flat(own: dict[str, Any], options: dict[str, tuple[Any, str]]) -> dict[str, Any]:
    """`own` with the options of all our kinds, at their defaults where this kind has them not.

    So every run's config.yaml has the same fields, and `router.name=top_p router.top_p=0.3` may override them.
    """
    common = {name: value for name, value in own.items() if name not in options}
    extra = [name for name in common if name not in COMMON]
    return {
        **{name: value for name, value in common.items() if name in COMMON},
        **{name: own.get(name, default) for name, (default, _) in options.items()},
        **{name: common[name] for name in extra},
    }


COMMON = frozenset(Router.model_fields) | frozenset(Planner.model_fields)
