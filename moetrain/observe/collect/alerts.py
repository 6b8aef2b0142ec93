"""What a person should be told while a run goes: experts that died, devices that stay uneven, a run that stopped."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Alert(NamedTuple):
    kind: str  # dead_experts, imbalance or not_finite
    text: str  # one line


class Alerts:
    """Watches the metrics; says a thing once, and again when it is worse or has been over in between."""

    def __init__(self, bound: float | None, window: int, first_step: int) -> None:
        """`bound` of the imbalance after planning; None: none. Experts can be dead `window` steps after the first."""
        self._bound, self._full = bound, first_step + window
        self._dead: dict[str, int] = {}
        self._uneven = False

    def check(self, step: int, metrics: Mapping[str, Any]) -> list[Alert]:
        return [*self._dead_experts(step, metrics), *self._imbalance(metrics)]

    def _dead_experts(self, step: int, metrics: Mapping[str, Any]) -> list[Alert]:
        if step < self._full:
            return []
        suffix = "/dead_experts_window"
        dead = {name.split("/")[1]: n for name, n in metrics.items() if name.endswith(suffix)}
        if not dead:
            return []
        worse = {layer: n for layer, n in dead.items() if n > self._dead.get(layer, 0)}
        self._dead = dead
        if not worse:
            return []
        where = ", ".join(f"{n} in {layer}" for layer, n in worse.items())
        return [Alert("dead_experts", f"experts that nothing chose for a whole window of steps: {where}")]

    def _imbalance(self, metrics: Mapping[str, Any]) -> list[Alert]:
        now = metrics.get("balance/imbalance_planned")
        if self._bound is None or now is None:
            return []
        was, self._uneven = self._uneven, now > self._bound or (self._uneven and now > (1 + self._bound) / 2)
        if was or not self._uneven:
            return []
        home = metrics["balance/imbalance_home"]
        return [
            Alert(
                "imbalance", f"devices uneven after planning: {now:.2f} is above {self._bound:g} ({home:.2f} at home)"
            )
        ]
