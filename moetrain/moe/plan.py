"""A `Plan` says which rank computes which rows of one MoE layer in one micro-step. Pure data, no torch.

Dimensions: R expert-parallel ranks, E experts, C chunks. A *row* is one selection: one token for one expert.
The rows of an expert stand in a global order: by source rank, then in the source's own order. A chunk is a
consecutive run of them that one rank computes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the rows of one layer are computed. Every rank of the expert group holds the same one."""

    counts: Ints  # [R, E] rows held by source rank r that chose expert e
    home: Ints  # [E] the rank that owns each expert
    expert: Ints  # [C] ascending; the chunks of an expert in the order of its rows
    rank: Ints  # [C] who computes the chunk
    num_rows: Ints  # [C] at least one

    @classmethod
    def of(cls, counts: Ints, home: Ints, chunks: Sequence[tuple[int, int, int]]) -> "Plan":
        """From `(expert, rank, rows)`, the chunks of one expert in the order of its rows; empty ones go."""
        kept = sorted((c for c in chunks if c[2] > 0), key=lambda c: c[0])
        table = np.array(kept, dtype=np.int64).reshape(-1, 3)
        return cls(counts, home, table[:, 0], table[:, 1], table[:, 2])

    @property
    def num_ranks(self) -> int:
        return self.counts.shape[0]

    @property
    def num_experts(self) -> int:
        return self.counts.shape[1]

    def loads(self) -> Ints:
        """[R] rows computed on each rank."""
        return _sum_at(self.rank, self.num_rows, self.num_ranks)

    def home_loads(self) -> Ints:
        """[R] rows that each rank would compute under standard expert parallelism."""
        return _sum_at(self.home, self.counts.sum(0), self.num_ranks)

    @cached_property
    def _guests(self) -> list[tuple[int, int, int]]:
        away = self.rank != self.home[self.expert]
        triples = zip(
            self.expert[away].tolist(),
            self.home[self.expert[away]].tolist(),
            self.rank[away].tolist(),
            strict=True,
        )
        return sorted(set(triples))

    def guests(self) -> list[tuple[int, int, int]]:
        """`(expert, home_rank, guest_rank)` of every expert copy lent, sorted."""
        return self._guests

    def moved(self) -> int:
        """Rows computed on another rank than the home of their expert."""
        return int(self.num_rows[self.rank != self.home[self.expert]].sum())

    @cached_property
    def _spans(self) -> tuple[Ints, Ints]:
        """[C] first and last-plus-one row of each chunk in its expert's global order."""
        end = np.cumsum(self.num_rows)
        before = np.cumsum(self.counts.sum(0)) - self.counts.sum(0)
        end = end - before[self.expert]
        return end - self.num_rows, end

    def rows(self, source: int) -> Ints:
        """[E, R] how many of its rows of each expert `source` sends to each rank."""
        begin, end = self._spans
        last = np.cumsum(self.counts, axis=0)[source][self.expert]
        first = last - self.counts[source][self.expert]
        part = np.clip(np.minimum(end, last) - np.maximum(begin, first), 0, None)
        out = np.zeros((self.num_experts, self.num_ranks), np.int64)
        np.add.at(out, (self.expert, self.rank), part)
        return out

    def received(self, rank: int) -> Ints:
        """[R, E] how many rows of each expert `rank` gets from each source."""
        here = self.rank == rank
        begin, end = (x[here] for x in self._spans)
        last = np.cumsum(self.counts, axis=0)[:, self.expert[here]]
        first = last - self.counts[:, self.expert[here]]
        part = np.clip(np.minimum(end, last) - np.maximum(begin, first), 0, None)
        out = np.zeros_like(self.counts)
        np.add.at(out.T, self.expert[here], part.T)
        return out

    def slots(self, rank: int) -> list[int]:
        """The experts that `rank` computes, in the order of its slots: its own, then its guests."""
        return np.flatnonzero(self.home == rank).tolist() + [e for e, _, guest in self._guests if guest == rank]


def _sum_at(index: Ints, values: Ints, size: int) -> Ints:
    out = np.zeros(size, np.int64)
    np.add.at(out, index, values)
    return out


def imbalance(loads: Ints) -> float:
    """Largest over mean device load; 1 is perfect balance, and by convention also no load at all."""
    total = loads.sum()
    return float(loads.max() * len(loads) / total) if total else 1.0
