"""How a router is doing: what it says of the experts, how evenly it selects, which experts die.

Gathered on the device, pass by pass through the MoE layers; read at the end of a step, together with all else.

T tokens here, L passes through MoE layers, E experts of one of them, N of all of them.
"""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetrain.common.arrays import Array
from moetrain.moe.layer import LayerStats
from moetrain.observe.collect.congestion import gamma_eff
from moetrain.observe.metrics import (
    LAYER_DEAD_EXPERTS,
    LAYER_DEAD_EXPERTS_WINDOW,
    LAYER_GAMMA_EFF,
    LAYER_LOAD,
    LAYER_LOAD_ENTROPY,
    LAYER_MAX_VIO,
    LAYER_STARVING_EXPERTS,
)

STARVING = 0.1  # of an even share


class RouterSums(NamedTuple):
    """Sums over this rank's tokens of one micro-step."""

    logits_N: Tensor  # fp32: of the router's logits
    norm_L: Tensor  # fp32: of the L2 norm of a token's logits

    @classmethod
    @torch.no_grad()
    def collect(cls, stats: Sequence[LayerStats]) -> "RouterSums":
        logits = [s.real_scores.logits_TE.detach() for s in stats]
        return cls(
            torch.cat([x_TE.sum(0) for x_TE in logits]),
            torch.stack([torch.linalg.vector_norm(x_TE, dim=-1).sum() for x_TE in logits]),
        )


class Window:
    """Selections of the last `size` optimizer steps, added up on the device."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._steps: deque[Tensor] = deque()
        self.counts_N: Tensor | None = None

    def add(self, counts_N: Tensor) -> None:
        """Add the counts of one step, int64 [N]."""
        self._steps.append(counts_N)
        self.counts_N = counts_N.clone() if self.counts_N is None else self.counts_N.add_(counts_N)
        if len(self._steps) > self._size:
            self.counts_N -= self._steps.popleft()


def max_vio(counts_E: Array) -> float:
    """Return (largest - mean) / mean load: MaxVio of Loss-Free Balancing (Wang et al., 2024). 0: even, or no load at
    all."""
    total = counts_E.sum()
    return float(counts_E.max() * len(counts_E) / total - 1) if total else 0.0


def load_entropy(counts_E: Array) -> float:
    """Return the entropy of the load as a share of log E: 1 is even, 0 is all for one."""
    share = counts_E[counts_E > 0] / max(counts_E.sum(), 1)
    return float(-(share * np.log(share)).sum()) / math.log(len(counts_E)) if len(counts_E) > 1 else 1.0


def starving(counts_E: Array) -> int:
    """Count the experts that were selected, but less than `STARVING` times an even share."""
    return int(((counts_E > 0) & (counts_E * len(counts_E) < STARVING * counts_E.sum())).sum())


def layer_metrics(counts_E: Array, window_E: Array, quality_E: Array) -> dict[str, Any]:
    """Return the metrics of one layer, by their names for any layer, from its selections in one step, those of the
    window, and its mean logits."""
    total = max(counts_E.sum(), 1)
    return {
        LAYER_MAX_VIO: max_vio(counts_E),
        LAYER_LOAD_ENTROPY: load_entropy(counts_E),
        LAYER_DEAD_EXPERTS: int((counts_E == 0).sum()),
        LAYER_DEAD_EXPERTS_WINDOW: int((window_E == 0).sum()),
        LAYER_STARVING_EXPERTS: starving(window_E),
        LAYER_GAMMA_EFF: gamma_eff(counts_E, quality_E),
        LAYER_LOAD: [round(float(share), 7) for share in counts_E / total],
    }
