"""All routers by name. A new one is a file here and a line in the table; docs/add-a-router.md shows how."""

from moetrain.moe.routers.base import Choice, Place, Router, Routing, Scores
from moetrain.moe.routers.round_robin import RoundRobin
from moetrain.moe.routers.topk import TopK

__all__ = ["ROUTERS", "Choice", "Place", "Router", "Routing", "Scores"]

ROUTERS: dict[str, type[Router]] = {"topk": TopK, "round_robin": RoundRobin}
