"""Who chose which expert: counts [R, E] of one layer and micro-step, drawn or read from a run.

`balanced` spreads every rank's selections evenly. `natural` is a generative model: a layer's experts have popularities
p ~ Dirichlet(concentration · 1), and what a rank reads shifts them, p_s ~ Dirichlet(agreement · p). A token never
chooses an expert twice: rank s chooses expert e for a share π of its tokens, π = min(1, λ p_s) with Σ π = K. The
`W0_balanced` ... `W7_burst` have the names of a public list of workloads; their definitions are ours.

R expert-parallel ranks, E experts, T tokens of a rank, K experts of a token.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moetrain.common.arrays import BROKEN, read_arrays
from moetrain.common.errors import ConfigError
from moetrain.moe.planning.plan import Floats, Ints

CONCENTRATION = (
    1.25  # of an expert; 256 of them on 64 ranks have max/mean 2.3 then: the middle of UltraEP's 1.30 to 4.01
)
AGREEMENT = 1000.0  # of ranks with each other; small: every rank reads another domain


@dataclass(frozen=True)
class RoutedGroup:
    """The expert-parallel group that counts are drawn for."""

    ranks: int
    experts: int
    tokens: int  # of a rank
    top_k: int

    @property
    def experts_per_rank(self) -> int:
        return -(-self.experts // self.ranks)


def inclusion(shares: Floats, top_k: int) -> Floats:
    """[..., E] the share of tokens that choose each expert, for shares [..., E] that sum to 1: min(1, λ share)."""
    found = np.minimum(shares * top_k, 1.0)
    for _ in range(60):
        full = found >= 1
        rest = top_k - full.sum(-1, keepdims=True)
        left = np.where(full, 0, shares)
        total = left.sum(-1, keepdims=True)
        scaled = np.where(full, 1.0, left * rest / np.maximum(total, 1e-300))
        if (scaled <= 1 + 1e-12).all():
            return np.minimum(scaled, 1.0)
        found = np.minimum(scaled, 1.0)
    return found


def draw(probability: Floats, group: RoutedGroup, rng: np.random.Generator) -> Ints:
    """[R, E] counts of T tokens that choose each expert with that probability [R, E]; every row sums to T · K."""
    counts = rng.binomial(group.tokens, np.clip(probability, 0, 1)).astype(np.int64)
    target = group.tokens * group.top_k  # a token chooses exactly K: what is missing or too much is spread
    for row, possible in zip(counts, probability > 0, strict=True):
        while (gap := target - int(row.sum())) != 0:
            weight = np.where(possible, group.tokens - row, 0) if gap > 0 else row
            step = rng.multivariate_hypergeometric(weight, min(abs(gap), int(weight.sum())), method="marginals")
            row += np.sign(gap) * step
    return counts


def balanced(group: RoutedGroup) -> Ints:
    """[R, E] every rank's selections spread evenly, remainders over different experts."""
    each, more = divmod(group.tokens * group.top_k, group.experts)
    counts = np.full((group.ranks, group.experts), each, np.int64)
    for rank in range(group.ranks):
        counts[rank, (rank * more + np.arange(more)) % group.experts] += 1
    return counts


@dataclass(frozen=True)
class Natural:
    """The parameters of natural routing."""

    concentration: float = CONCENTRATION
    agreement: float = AGREEMENT

    def draw(self, group: RoutedGroup, rng: np.random.Generator) -> Ints:
        """[R, E] counts of one layer."""
        return self.draw_from(self.popularity(group, rng), group, rng)

    def popularity(self, group: RoutedGroup, rng: np.random.Generator) -> Floats:
        """[E] how popular the experts of one layer are; sums to 1."""
        return rng.dirichlet(np.full(group.experts, self.concentration))

    def draw_from(self, popular: Floats, group: RoutedGroup, rng: np.random.Generator) -> Ints:
        """[R, E] counts of one micro-step of a layer with that popularity [E]."""
        alphas = np.maximum(self.agreement * popular, 1e-6)
        gammas = rng.standard_gamma(np.broadcast_to(alphas, (group.ranks, group.experts)))
        shares = gammas / np.maximum(gammas.sum(1, keepdims=True), 1e-300)
        return draw(inclusion(shares, group.top_k), group, rng)


def fit_natural(counts_NRE: Ints) -> Natural:
    """Natural routing of the same moments as counts [N, R, E] of N layers or steps.

    Of a Dirichlet with total α, Σ_e E[p_e²] = (1 + α/E) / (1 + α), which the popularities over all ranks give α from;
    what single ranks have above it gives the agreement. Noise of the draw is taken off.
    """
    num_experts = counts_NRE.shape[-1]
    rows = counts_NRE.sum(-1, keepdims=True).astype(np.float64)
    shares = counts_NRE / np.maximum(rows, 1)
    popular = counts_NRE.sum(1) / np.maximum(counts_NRE.sum((1, 2))[:, None], 1)
    between = float(((popular**2).sum(-1)).mean())
    own = float(((shares**2).sum(-1) - (1 - (shares**2).sum(-1)) / np.maximum(rows[..., 0] - 1, 1)).mean())
    between -= max(own - between, 0.0) / counts_NRE.shape[1]
    concentration = (1 - between) / max(between - 1 / num_experts, 1e-9) / num_experts
    agreement = (1 - own) / max(own - between, 1e-9)
    return Natural(float(np.clip(concentration, 1e-3, 1e4)), float(np.clip(agreement, 0.1, 1e6)))


def _hot(group: RoutedGroup, share: float, experts: Ints) -> Floats:
    """[R, E] `share` of all selections evenly into `experts`, the rest evenly into the others."""
    into = np.zeros(group.experts)
    into[experts] = 1 / len(experts)
    rest = np.where(into > 0, 0, 1 / max(group.experts - len(experts), 1))
    return np.tile(share * into + (1 - share) * rest, (group.ranks, 1))


def _hot_set(group: RoutedGroup, step: int) -> Floats:
    return _hot(group, 0.5, np.arange(max(group.top_k, group.experts // 16)))


def _hot_rank(group: RoutedGroup, step: int) -> Floats:
    return _hot(group, 0.5, np.arange(min(group.experts_per_rank, group.experts - 1)))


def _spread_hot(group: RoutedGroup, step: int) -> Floats:
    stride = max(1, group.experts // max(group.top_k, group.experts // 16))
    return _hot(group, 0.5, np.arange(0, group.experts, stride)[: group.experts - 1])


def _even(group: RoutedGroup, step: int) -> Floats:
    return np.full((group.ranks, group.experts), 1 / group.experts)


def _zero_rank(group: RoutedGroup, step: int) -> Floats:
    first = np.arange(group.experts) < group.experts_per_rank
    rest = np.where(first & (group.ranks > 1), 0, 1.0)
    return np.tile(rest / rest.sum(), (group.ranks, 1))


def _rotating(group: RoutedGroup, step: int) -> Floats:
    first = step * group.experts_per_rank + np.arange(min(group.experts_per_rank, group.experts - 1))
    return _hot(group, 0.5, np.unique(first % group.experts))


def _burst(group: RoutedGroup, step: int) -> Floats:
    return _hot_rank(group, step) if step % 4 == 3 else _even(group, step)


WORKLOADS: dict[str, Callable[[RoutedGroup, int], Floats]] = {
    "W0_balanced": _even,
    "W1_hot_expert_set": _hot_set,
    "W2_hot_rank": _hot_rank,
    "W3_spread_hot_experts": _spread_hot,
    "W4_source_ragged": _even,
    "W5_zero_expert_rank": _zero_rank,
    "W6_rotating_hotspot": _rotating,
    "W7_burst": _burst,
}


def workload(name: str, group: RoutedGroup, seed: int, step: int) -> Ints:
    """[R, E] counts of a named workload: made of its name, the seed and the step alone."""
    rng = np.random.default_rng((seed, step, *name.encode()))
    if name == "W0_balanced":
        return balanced(group)
    counts = draw(inclusion(WORKLOADS[name](group, step), group.top_k), group, rng)
    if name == "W4_source_ragged":  # rank r holds between nothing and all of its tokens, uneven before dispatch
        held = np.linspace(2 / (group.ranks + 1), 1, group.ranks)[:, None]
        counts = (counts * held).astype(np.int64)
    return counts


class LayerSample(NamedTuple):
    """One layer of one micro-step."""

    counts: Ints  # [R, E]
    past: Ints  # [R, E] of the same layer a step before, for planners that know the past only


@dataclass(frozen=True)
class RoutingSource:
    """A source of counts."""

    name: str
    natural: Natural
    trace: Ints | None = None  # [N, R, E] recorded

    @property
    def is_drawn(self) -> bool:
        """Whether a hot rank of one layer is as likely as any other to be hot in the next."""
        return self.name != "balanced" and self.name not in WORKLOADS and self.trace is None

    def layers(self, group: RoutedGroup, number: int, seed: int) -> Iterator[LayerSample]:
        """One sample for each of as many layers."""
        for layer in range(number):
            rng = np.random.default_rng((seed, 7, layer))  # its popularities do not depend on the number of tokens
            if self.name == "balanced":
                yield LayerSample(balanced(group), balanced(group))
            elif self.name in WORKLOADS:
                now, before = (workload(self.name, group, seed, step) for step in (layer + 1, layer))
                yield LayerSample(now, before)
            elif self.trace is not None:
                at = int(rng.integers(len(self.trace)))
                yield LayerSample(self.trace[at], self.trace[at])
            else:
                popular = self.natural.popularity(group, rng)
                now, before = (self.natural.draw_from(popular, group, rng) for _ in range(2))
                yield LayerSample(now, before)


def find_routing(name: str, group: RoutedGroup, natural: Natural) -> RoutingSource:
    """The routing of that name, or the load trace of the run in that folder. Raises `ConfigError`.

    Traces of other group sizes stand for natural routing: its parameters are fit to them.
    """
    if name in ("balanced", "natural", *WORKLOADS):
        return RoutingSource(name, natural)
    counts = read_trace(Path(name))
    if counts is None:
        known = ", ".join(("balanced", "natural", *WORKLOADS))
        raise ConfigError(f"routing={name}: must be the folder of a run with a load trace, or one of {known}")
    same = counts.shape[1:] == (group.ranks, group.experts)
    scale = group.tokens * group.top_k * group.ranks / max(counts.sum((1, 2)).mean(), 1)
    if same:
        return RoutingSource(name, natural, np.rint(counts * scale).astype(np.int64))
    return RoutingSource(f"natural, fit to {name}", fit_natural(counts))


def read_trace(folder: Path) -> Ints | None:
    """Return the counts of a run's load trace, [N, R, E] of all layers and samples; None where none can be read."""
    found = []
    for path in sorted((folder / "load_trace").glob("part_*.npz")):
        with suppress(*BROKEN):
            counts = read_arrays(path, ["counts"])["counts"]
            found.append(counts.reshape(-1, *counts.shape[-2:]).astype(np.int64))
    shapes = {counts.shape[1:] for counts in found}
    return np.concatenate(found) if len(shapes) == 1 else None
