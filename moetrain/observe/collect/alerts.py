"""What a person should be told while a run goes: experts that died, devices that stay uneven, a run that stopped."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moetrain.observe.metrics import IMBALANCE_HOME, IMBALANCE_PLANNED, LAYER_DEAD_EXPERTS_WINDOW, METRICS


class Alert(NamedTuple):
    kind: str  # dead_experts, imbalance or not_finite
    text: str  # one line


class Alerts:
    """Watches the metrics; says a thing once, and again when it is worse or has been over in between."""

    def __init__(self, bound: float | None, window: int, first_step: int) -> None:
        """`bound` of the imbalance after planning; None: none. Experts can be dead `window` steps after the first."""
        self._bound, self._window, self._full = bound, window, first_step + window
        self._dead: dict[str, int] = {}
        self._uneven = False

    def check(self, step: int, metrics: Mapping[str, Any]) -> list[Alert]:
        return [*self._dead_experts(step, metrics), *self._imbalance(metrics)]

    def _dead_experts(self, step: int, metrics: Mapping[str, Any]) -> list[Alert]:
        if step < self._full:
            return []
        form = METRICS[LAYER_DEAD_EXPERTS_WINDOW].form
        dead = {found["layer"]: n for name, n in metrics.items() if (found := form.fullmatch(name))}
        if not dead:
            return []
        worse = {layer: n for layer, n in dead.items() if n > self._dead.get(layer, 0)}
        self._dead = dead
        if not worse:
            return []
        where = ", ".join(f"{n} in {layer}" for layer, n in worse.items())
        return [Alert("dead_experts", f"dead experts, selected by no token in the last {self._window} steps: {where}")]

    def _imbalance(self, metrics: Mapping[str, Any]) -> list[Alert]:
        now = metrics.get(IMBALANCE_PLANNED)
        if self._bound is None or now is None:
            return []
        was, self._uneven = self._uneven, now > self._bound or (self._uneven and now > (1 + self._bound) / 2)
        if was or not self._uneven:
            return []
        home = metrics[IMBALANCE_HOME]
        return [
            Alert(
                "imbalance",
                f"device imbalance after planning is {now:.2f}, above {self._bound:g}; with experts at home {home:.2f}",
            )
        ]
