"""moetrain: Mixture-of-Experts layers whose experts are spread over devices, and trained there without waiting.

    layer = moetrain.MoE(dim=512, hidden=1024, experts=16, top_k=2)  # a plain module, whole on one device
    handle = moetrain.expert_parallel(model, group)  # every such layer in a model, over a process group

Names are imported when they are first used: `import moetrain` loads no torch, nor do `Plan`, `PLANNERS`, `ROUTERS`,
`default_costs`, `layer_time` and the decorators. docs/library.md shows how they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moetrain.common.extensions import OptimizerOptions as OptimizerOptions
    from moetrain.common.extensions import register_corpus as register_corpus
    from moetrain.common.extensions import register_optimizer as register_optimizer
    from moetrain.distributed.mesh import ExpertGroup as ExpertGroup
    from moetrain.moe.experts import Experts as Experts
    from moetrain.moe.layer import MoE as MoE
    from moetrain.moe.options import PLANNERS as PLANNERS
    from moetrain.moe.options import ROUTERS as ROUTERS
    from moetrain.moe.options import BalanceOptions as BalanceOptions
    from moetrain.moe.options import RouterOptions as RouterOptions
    from moetrain.moe.options import ZeroComputeOptions as ZeroComputeOptions
    from moetrain.moe.options import register_planner as register_planner
    from moetrain.moe.options import register_router as register_router
    from moetrain.moe.parallel import expert_parallel as expert_parallel
    from moetrain.moe.planning.cost import Costs as Costs
    from moetrain.moe.planning.cost import default_costs as default_costs
    from moetrain.moe.planning.cost import layer_time as layer_time
    from moetrain.moe.planning.plan import Plan as Plan
    from moetrain.moe.routing.balance import BalanceLoss as BalanceLoss
    from moetrain.moe.routing.base import Router as Router

__version__ = "0.2.0"

_HOMES = {
    "MoE": "moetrain.moe.layer",
    "Experts": "moetrain.moe.experts",
    "Router": "moetrain.moe.routing.base",
    "ROUTERS": "moetrain.moe.options",
    "RouterOptions": "moetrain.moe.options",
    "ZeroComputeOptions": "moetrain.moe.options",
    "BalanceLoss": "moetrain.moe.routing.balance",
    "BalanceOptions": "moetrain.moe.options",
    "Plan": "moetrain.moe.planning.plan",
    "PLANNERS": "moetrain.moe.options",
    "Costs": "moetrain.moe.planning.cost",
    "default_costs": "moetrain.moe.planning.cost",
    "layer_time": "moetrain.moe.planning.cost",
    "expert_parallel": "moetrain.moe.parallel",
    "ExpertGroup": "moetrain.distributed.mesh",
    "register_router": "moetrain.moe.options",
    "register_planner": "moetrain.moe.options",
    "register_corpus": "moetrain.common.extensions",
    "register_optimizer": "moetrain.common.extensions",
    "OptimizerOptions": "moetrain.common.extensions",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "hf":
        return import_module("moetrain.hf")
    if name not in _HOMES:
        raise AttributeError(f"module 'moetrain' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
