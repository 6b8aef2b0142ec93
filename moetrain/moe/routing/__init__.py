"""Routers by name: which tokens go to which experts. docs/add-a-router.md shows how to add one."""

from moetrain.moe.options import ROUTERS
from moetrain.moe.routing.base import Choice, Place, Replicated, Router, Routing, Scores

__all__ = ["ROUTERS", "Choice", "Place", "Replicated", "Router", "Routing", "Scores"]
