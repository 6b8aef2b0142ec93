"""The router and the planner of the MoE layers: what all kinds have. `config.kinds` adds the options of each kind."""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from moetrain.config.sections.base import Section, Shape, core_field
from moetrain.moe.options import PLANNERS, ROUTERS, RouterOptions, ZeroComputeOptions

ROUTER_OPTIONS = {  # of single kinds of ours, with their defaults
    name: default for name, default in ROUTERS.own_options().items() if name not in RouterOptions.names()
}
PLANNER_OPTIONS: dict[str, Any] = dict.fromkeys(PLANNERS.own_options())  # None: the planner's own default


class RouterSection(Section):
    """Which tokens go to which experts (docs/routers.md)."""

    name: str = Field(
        description="The kind of router (docs/routers.md). Kinds of other packages are known once these are installed."
    )
    top_k: int = core_field(RouterOptions, "top_k")
    scores: Literal["softmax", "sigmoid"] = core_field(RouterOptions, "scores")
    normalise: bool | None = core_field(RouterOptions, "normalise")
    scaling: float = core_field(RouterOptions, "scaling")
    skew: float = core_field(RouterOptions, "skew")
    k_schedule: Shape = Field(
        description="How the number of experts per token varies over depth; the mean stays `router.top_k` "
        "(docs/routers.md)."
    )
    capacity_factor: float | None = core_field(RouterOptions, "capacity_factor")
    zero_compute_tau: float = core_field(ZeroComputeOptions, "tau")
    freeze: bool = Field(
        default=False,
        description="Whether the weights of the routers stay as they are, as in post-training. Gradients still flow "
        "through them to the layers below.",
    )
    replay: str | None = Field(
        default=None,
        description="A file of recorded choices, .npz or .safetensors (docs/post-train.md): the routers choose these "
        "experts in training, with fresh weights. null: they choose themselves.",
    )
    replay_missing: Literal["error", "route"] = Field(
        default="error",
        description="What becomes of tokens that the file has no choices for. error: the run does not start. route: "
        "the router chooses; the share that was replayed is a metric.",
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


def write_flat(own: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """`own` with the options of all our kinds, at their defaults where this kind has them not.

    So every run's config.yaml has the same fields, and `router.name=top_p router.top_p=0.3` may override them.
    """
    common = {name: value for name, value in own.items() if name not in options}
    extra = [name for name in common if name not in COMMON]
    return {
        **{name: value for name, value in common.items() if name in COMMON},
        **{name: own.get(name, default) for name, default in options.items()},
        **{name: common[name] for name in extra},
    }


COMMON = frozenset(RouterSection.model_fields) | frozenset(Planner.model_fields)
