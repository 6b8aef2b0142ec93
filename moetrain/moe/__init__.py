"""Routing, planning, moving load, and the experts themselves."""
