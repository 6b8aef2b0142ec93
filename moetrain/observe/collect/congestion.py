"""The congestion coefficient of a router, and the phase of training that it suggests.

"Three Phases of Expert Routing" (Mouzouni, 2026) fits the loads of a layer's experts to an equilibrium of a congestion
game with one scalar γ_eff, and sees it surge, stabilise and relax during pre-training. Its estimator and its limits of
the phases are not published with its abstract: what is here is a working definition of our own.

At equilibrium an expert's load is m_k ∝ exp(q_k - γ m_k), with Σ m_k = 1 and q_k how good the router finds it: the mean
of its logits over all tokens. Then log m_k - q_k is linear in m_k with slope -γ, which least squares recover.

E experts.
"""

from collections import deque
from collections.abc import Iterable

import numpy as np

from moetrain.common.arrays import Array

SURGE, STABILISATION, RELAXATION = 1, 2, 3
NAMES = {SURGE: "surge", STABILISATION: "stabilization", RELAXATION: "relaxation"}
READINGS = 20  # over which γ̂ is smoothed, and after which it is compared with itself
CHANGE = 0.1  # relative, of the smoothed γ̂ over as many readings: more is a surge or a relaxation


def gamma_eff(counts_E: Array, quality_E: Array) -> float:
    """Return γ̂ = -cov_k(m_k, log m_k - q_k) / var_k(m_k), over the experts that were selected at all.

    counts_E selections, quality_E mean logits; where a router masks an expert for some tokens they are not finite, and
    the expert is left out. NaN where fewer than three experts were selected, or all equally often.
    """
    some = (counts_E > 0) & np.isfinite(quality_E)
    load = counts_E[some] / max(counts_E.sum(), 1)
    away = load - load.mean() if some.any() else load
    variance = float((away**2).sum())
    if len(load) < 3 or variance <= 1e-20:
        return float("nan")
    return -float((away * (np.log(load) - quality_E[some])).sum()) / variance


class Phase:
    """Tells from one reading of γ̂ after another in which phase training is: ours, see the head of this file.

    γ̂ is smoothed by an exponential mean over `READINGS` readings and compared with its value so many readings ago:
    risen by more than `CHANGE` of the larger of the two is a surge, fallen by more a relaxation, else stabilisation.
    """

    def __init__(self) -> None:
        self._past: deque[float] = deque(maxlen=READINGS + 1)

    def update(self, gamma: float) -> int | None:
        """Take in a reading and return the phase after it; None as long as there are too few. NaN tells nothing."""
        if np.isfinite(gamma):
            smoothed = gamma if not self._past else self._past[-1] + (gamma - self._past[-1]) / (READINGS / 2)
            self._past.append(smoothed)
        if len(self._past) <= READINGS:
            return None
        then, now = self._past[0], self._past[-1]
        change = (now - then) / max(abs(now), abs(then), 1e-12)
        return SURGE if change > CHANGE else RELAXATION if change < -CHANGE else STABILISATION


def phases(gammas: Iterable[float | None]) -> list[int | None]:
    """Return the phase after every reading of a run (null readings tell nothing)."""
    phase = Phase()
    return [phase.update(float("nan") if gamma is None else gamma) for gamma in gammas]
