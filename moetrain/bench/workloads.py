"""Selections of a named workload, or of a run's load trace, in the place of a router's: `--workload`, `--trace`.

The workloads are those of `moetrain simulate routing=NAME` (`simulate.traffic`): made of (name, seed, step) alone, a
token selects distinct experts. Each is measured over `STEPS` steps that follow one another, beside as many rows that
are spread evenly over ranks and experts.

R ranks of the expert group, E experts, T tokens of a rank, K experts of a token, N selections of a rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain import runs
from moetrain.common.errors import ConfigError
from moetrain.moe.planning.plan import Ints
from moetrain.moe.routing.base import Choice, Place, Scores
from moetrain.simulate.traffic import WORKLOADS, LayerSample, Natural, RoutedGroup, find_routing, read_trace

STEPS = 4  # one of which is the burst of W7_burst


def list_workloads(asked: Sequence[str], trace: str | None = None) -> list[str]:
    """Return the names of the workloads asked for, `all` of them perhaps, and the folder of a run.

    Raises `ConfigError` where there is no such workload or run, or where the run has no load trace.
    """
    for name in asked:
        if name != "all" and name not in WORKLOADS:
            raise ConfigError(f"--workload {name}: must be all or one of {', '.join(WORKLOADS)}")
    names = list(WORKLOADS) if "all" in asked else list(dict.fromkeys(asked))
    if trace is not None:
        run = runs.find(trace)
        if read_trace(run) is None:
            raise ConfigError(f"--trace {trace}: has no load trace that can be read (track.trace_every=0 keeps none)")
        names.append(str(run))
    return names


def draw_steps(name: str, group: RoutedGroup, seed: int) -> list[LayerSample]:
    """Return the counts [R, E] of the steps of a workload, or of a run's load trace, and of the steps before them."""
    source = find_routing(name, group, Natural())
    return [sample._replace(counts=_fit(sample.counts, group)) for sample in source.layers(group, STEPS, seed)]


def _fit(counts_RE: Ints, group: RoutedGroup) -> Ints:
    """Return counts that T tokens can have: at most T selections of an expert, T · K of all."""
    fitted = np.minimum(counts_RE, group.tokens)
    for row in fitted:
        while (excess := int(row.sum()) - group.tokens * group.top_k) > 0:
            row[row.argmax()] -= min(excess, max(1, int(row.max()) // 2))
    return fitted


def spread_evenly(counts_RE: Ints) -> Ints:
    """Return as many rows, evenly over sources and experts: the ideal beside which a workload is measured."""
    each, more = divmod(int(counts_RE.sum()), counts_RE.size)
    return (each + (np.arange(counts_RE.size) < more)).reshape(counts_RE.shape)


def select_tokens(counts_E: Ints, top_k: int, tokens: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Return ([N] tokens ascending, [N] experts) with these counts; a token selects an expert at most once.

    Rows of an expert go to consecutive tokens, round and round, so that no token has two of its at most T rows.
    """
    expert_N = np.repeat(np.arange(len(counts_E)), counts_E)
    used = max(-(-len(expert_N) // top_k), int(counts_E.max(initial=0)), 1)
    token_N = np.sort(rng.permutation(tokens)[:used])[np.arange(len(expert_N)) % used]
    order = np.argsort(token_N, kind="stable")
    return token_N[order], expert_N[order]


@dataclass
class ForcedRouting:
    """What the routers of a model choose: every layer's selections by a workload; `step` is the training step's."""

    name: str
    rank: int  # of the expert group
    ranks: int
    seed: int
    is_even: bool = False  # the ideal: as many rows, spread evenly
    step: int = 0
    _drawn: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def replace_choice(self, router: Any, layer: int) -> Callable[[Scores, Place | None], Choice]:
        """Return what takes the place of `router.choose` in a layer of this number."""

        def choose(scores: Scores, place: Place | None) -> Choice:
            tokens, experts = scores.logits_TE.shape
            key = (layer, tokens, experts, router.options.top_k)
            if key not in self._drawn:
                self._drawn[key] = self._draw(*key, device=scores.logits_TE.device)
            return Choice(*self._drawn[key][self.step % STEPS])

        return choose

    def _draw(
        self, layer: int, tokens: int, experts: int, top_k: int, device: torch.device
    ) -> list[tuple[Tensor, Tensor]]:
        found = []
        group = RoutedGroup(self.ranks, experts, tokens, top_k)
        for step, sample in enumerate(draw_steps(self.name, group, self.seed + layer)):
            counts = spread_evenly(sample.counts) if self.is_even else sample.counts
            rng = np.random.default_rng((self.seed, layer, step, self.rank))
            chosen = select_tokens(counts[self.rank], top_k, tokens, rng)
            found.append((torch.from_numpy(chosen[0]).to(device), torch.from_numpy(chosen[1]).to(device)))
        return found
