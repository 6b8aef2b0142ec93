"""All routers by name. A new one is a file here and a line in the table; docs/add-a-router.md shows how."""

from moetrain.moe.routers.base import Choice, Place, Replicated, Router, Routing, Scores
from moetrain.moe.routers.expert_choice import ExpertChoice
from moetrain.moe.routers.frozen import Frozen
from moetrain.moe.routers.gating_residual import GatingResidual
from moetrain.moe.routers.grouped import Grouped
from moetrain.moe.routers.recurrent import Recurrent
from moetrain.moe.routers.round_robin import RoundRobin
from moetrain.moe.routers.top_p import TopP
from moetrain.moe.routers.topk import TopK

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
