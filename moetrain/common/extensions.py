"""The kinds of corpora and optimizers, ours and those of other packages. Loads neither torch nor pydantic.

Routers and planners, which the layer alone needs too, are in `moetrain.moe.options`.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from moetrain.common.registry import Options, Registry


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(Options):
    """The base of the options of an optimizer."""

    state_names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")  # its state tensors of a parameter's shape


CORPORA: Registry[Any] = Registry(
    "corpus",
    {
        "local": ("moetrain.data.corpus:read_local", Options),
        "debian": ("moetrain.data.corpus:read_debian", Options),
        "folder": ("moetrain.data.corpus:read_folder", Options),
    },
    field="data.source",
)
OPTIMIZERS: Registry[Any] = Registry(
    "optimizer", {"adamw": ("moetrain.engine.optim:AdamW", OptimizerOptions)}, field="optim.name"
)


def state_names(options: type[Options]) -> tuple[str, ...]:
    """The state tensors of a parameter's shape of an optimizer with these options."""
    names: tuple[str, ...] = getattr(options, "state_names", OptimizerOptions.state_names)
    return names


def register_corpus(name: str, options: type[Options] | None = None) -> Any:
    """Returns a decorator that makes a corpus known as `data.source=NAME`: a function (data, left_out) that yields
    (domain, text, name of the document) in a fixed order. `data` is the section `data`, its own options included;
    `left_out.add(reason, name)` counts what it does not take.

    `options`: the dataclass of its options, `data.OPTION`; None: the function's attribute `Options`, if it has one.
    """
    return CORPORA.register(name, options)


def register_optimizer(name: str, options: type[Options] | None = None) -> Any:
    """Returns a decorator that makes an optimizer known as `optim.name=NAME`, under `engine=native`: a class or
    function (groups, **options) -> `torch.optim.Optimizer`. A group has `params`, `lr` and `weight_decay`; its `lr` is
    set before every step.

    `options`: the dataclass of its options, `optim.OPTION`; None: the attribute `Options`, if it has one. Its class
    variable `state_names` names the state tensors of a parameter's shape, which checkpoints hold; they begin as zeros.
    Other state than these and `step` is refused.
    """
    return OPTIMIZERS.register(name, options)
