"""All routers by name. A new one is a file here and a line in the table; docs/add-a-router.md shows how."""

from moetrain.moe.routing.base import Choice, Place, Replicated, Router, Routing, Scores
from moetrain.moe.routing.expert_choice import ExpertChoice
from moetrain.moe.routing.frozen import Frozen
from moetrain.moe.routing.gating_residual import GatingResidual
from moetrain.moe.routing.grouped import Grouped
from moetrain.moe.routing.recurrent import Recurrent
from moetrain.moe.routing.round_robin import RoundRobin
from moetrain.moe.routing.top_p import TopP
from moetrain.moe.routing.topk import TopK

__all__ = ["ROUTERS", "Choice", "Place", "Replicated", "Router", "Routing", "Scores"]

ROUTERS: dict[str, type[Router]] = {
    "topk": TopK,
    "expert_choice": ExpertChoice,
    "top_p": TopP,
    "grouped": Grouped,
    "frozen": Frozen,
    "gating_residual": GatingResidual,
    "recurrent": Recurrent,
    "round_robin": RoundRobin,
}
