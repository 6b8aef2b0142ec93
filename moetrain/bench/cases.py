"""What is measured: shapes of layers, and synthetic selections. Loads no torch.

Selections are drawn with a fixed seed; a token may select an expert twice. Hot experts are the first ones, which live
on the first ranks: the hardest case for standard expert parallelism.

R ranks, E experts, N selections of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

import numpy as np

from moetrain.common.errors import ConfigError

if TYPE_CHECKING:  # compiled code comes with it: not for every command line
    from moetrain.moe.planning.plan import Floats, Ints

PERCENT = (30, 50, 80, 95)
ZIPF = 1.1  # exponent
FAVOURED = 0.7  # of a rank's selections into its favourite experts, under domain skew
BALANCED = "balanced"
HOST_EXPERTS = 16  # of `bench hosts`
HOST_SCENARIOS = [BALANCED, "50 % into 4", "80 % into 1", "domain skew"]
QUICK = (BALANCED, "50 % into 4", "95 % into 1", "domain skew")


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer, and the tokens of one rank."""

    tokens: int
    dim: int
    hidden: int
    experts: int
    top_k: int
    dtype: str  # fp32 or bf16; auto until the ranks have agreed on one

    @property
    def weights(self) -> int:
        """Parameters of an expert."""
        return 3 * self.dim * self.hidden

    def __str__(self) -> str:
        return (
            f"{self.dtype}, {self.experts} experts, top-{self.top_k}, "
            f"{self.tokens:,} tokens a rank, {self.dim} × {self.hidden}"
        )


PRESETS = {  # dim, hidden, experts, top_k
    "gpt-oss-120b": (2880, 2880, 128, 4),
    "deepseek-v3": (7168, 2048, 256, 8),
    "kimi-k2": (7168, 2048, 384, 8),
    "qwen3-30b": (2048, 768, 128, 8),
}


def list_scenarios(num_experts: int) -> list[str]:
    """Return the names of all routings of a layer with so many experts."""
    hot = sorted({n for n in (1, 4, num_experts // 4) if 0 < n < num_experts})
    return [BALANCED, *(f"{p} % into {n}" for p in PERCENT for n in hot), "zipf", "domain skew"]


def match_scenarios(patterns: list[str] | None, num_experts: int) -> list[str]:
    """Return the names of the routings that match any of the shell-style patterns; without patterns, all of them.

    Raises `ConfigError` where none matches.
    """
    names = list_scenarios(num_experts)
    found = [n for n in names if not patterns or any(fnmatch(n, p) for p in patterns)]
    if not found:
        raise ConfigError(f"--scenario {' '.join(patterns or [])}: matches none of: {', '.join(names)}")
    return found


def find_shares(scenario: str, num_ranks: int, num_experts: int, seed: int = 0) -> Floats:
    """Return [R, E]: how the selections of a rank spread over experts; each row sums to one."""
    even = np.full((num_ranks, num_experts), 1 / num_experts)
    if scenario == BALANCED:
        return even
    if scenario == "zipf":
        weight = 1 / np.arange(1, num_experts + 1) ** ZIPF
        return np.tile(weight / weight.sum(), (num_ranks, 1))
    out = np.zeros_like(even)
    if scenario == "domain skew":
        num_favourites = max(1, num_experts // 4)
        for rank in range(num_ranks):
            favourites = np.random.default_rng((seed, rank)).permutation(num_experts)[:num_favourites]
            out[rank, favourites] = FAVOURED / num_favourites
        return out + (1 - FAVOURED) * even
    percent, num_hot = (int(word) for word in scenario.split(" % into "))
    out[:, :num_hot] = percent / 100 / num_hot
    out[:, num_hot:] = (1 - percent / 100) / (num_experts - num_hot)
    return out


def draw_selections(scenario: str, rank: int, num_ranks: int, shape: LayerShape, seed: int = 0) -> Ints:
    """Return [N]: the experts that the tokens of a rank select, token by token; balanced: exactly even counts."""
    rng, size = np.random.default_rng((seed, 1, rank)), shape.tokens * shape.top_k
    if scenario == BALANCED:
        return rng.permutation(size) % shape.experts
    return rng.choice(shape.experts, size, p=find_shares(scenario, num_ranks, shape.experts, seed)[rank])


def count_selections(scenario: str, num_ranks: int, shape: LayerShape, seed: int = 0) -> Ints:
    """Return [R, E]: the selections of every rank, by expert."""
    drawn = (draw_selections(scenario, rank, num_ranks, shape, seed) for rank in range(num_ranks))
    return np.stack([np.bincount(expert_N, minlength=shape.experts) for expert_N in drawn])
