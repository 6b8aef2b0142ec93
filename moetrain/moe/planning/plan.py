"""A `Plan` says which rank computes which rows of one MoE layer in one micro-step. Pure data, no torch.

Dimensions: R expert-parallel ranks, E experts, C chunks. A *row* is a token copy: one token for one of its experts.
An expert has a *home*, the rank that owns it; a *guest* is a temporary replica on another rank.
A chunk is a number of rows of one expert that one rank computes. Which source's rows they are follows from `near`:
the sources nearest to the rank give theirs first, the others in the order of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.moe.compiled import njit

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ANYWHERE: tuple[Ints, ...] = ()


@njit()
def pair(supply, rank, demand, order, begin, near, taken):  # type: ignore[no-untyped-def]
    """Give the rows of one expert to its chunks: in every stage, near sources only, in the order of ranks.

    supply [R] rows at each source and demand [C] rows of each chunk, both used up; rank [C]. `order`, `begin`, `near`
    [stages, R(+1)] as `stages` makes them. Writes (source, chunk, rows) to taken [stages · (R + C), 3]; returns how
    many.
    """
    used = 0
    first = np.empty(begin.shape[1], np.int64)
    for stage in range(near.shape[0]):
        num_labels = near[stage].max() + 1
        first[:num_labels] = begin[stage, :num_labels]
        for c in range(len(rank)):
            label = near[stage, rank[c]]
            at = first[label]
            while demand[c] > 0 and at < begin[stage, label + 1]:
                source = order[stage, at]
                part = min(supply[source], demand[c])
                if part > 0:
                    taken[used, 0], taken[used, 1], taken[used, 2] = source, c, part
                    used += 1
                    supply[source] -= part
                    demand[c] -= part
                if supply[source] == 0:
                    at += 1
            first[label] = at
    return used


@njit()
def stages(near):  # type: ignore[no-untyped-def]
    """Return, per stage, the ranks sorted by label, and where each label begins. near [stages, R], labels below R."""
    num_stages, num_ranks = near.shape
    order = np.empty((num_stages, num_ranks), np.int64)
    begin = np.zeros((num_stages, num_ranks + 1), np.int64)
    for stage in range(num_stages):
        for r in range(num_ranks):
            begin[stage, near[stage, r] + 1] += 1
        for r in range(num_ranks):
            begin[stage, r + 1] += begin[stage, r]
        place = begin[stage].copy()
        for r in range(num_ranks):
            order[stage, place[near[stage, r]]] = r
            place[near[stage, r]] += 1
    return order, begin


@njit()
def _match(counts, expert, rank, num_rows, near, me):  # type: ignore[no-untyped-def]
    """([R, R] traffic, [E, R] rows that `me` sends, [R, E] rows that `me` gets)."""
    num_ranks, num_experts = counts.shape
    order, begin = stages(near)
    traffic = np.zeros((num_ranks, num_ranks), np.int64)
    sent = np.zeros((num_experts, num_ranks), np.int64)
    received = np.zeros((num_ranks, num_experts), np.int64)
    taken = np.empty((0, 3), np.int64)
    c = 0
    while c < len(expert):
        e, end = expert[c], c + 1
        while end < len(expert) and expert[end] == e:
            end += 1
        if len(taken) < len(near) * (num_ranks + end - c):
            taken = np.empty((len(near) * (num_ranks + end - c), 3), np.int64)
        used = pair(counts[:, e].copy(), rank[c:end].copy(), num_rows[c:end].copy(), order, begin, near, taken)
        for s, at, part in taken[:used]:
            q = rank[c + at]
            traffic[s, q] += part
            if s == me:
                sent[e, q] += part
            if q == me:
                received[s, e] += part
        c = end
    return traffic, sent, received


@dataclass(frozen=True, eq=False)
class Plan:
    """Where the rows of one layer are computed. Every rank of the expert group holds the same one."""

    counts: Ints  # [R, E] rows held by source rank r that chose expert e
    home: Ints  # [E] the rank that owns each expert
    expert: Ints  # [C] ascending
    rank: Ints  # [C] who computes the chunk
    num_rows: Ints  # [C] at least one
    near: tuple[Ints, ...] = ANYWHERE  # [R] each: ranks of equal number are near each other; the narrowest first
    _shares: dict[int, tuple[Ints, Ints]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_chunks(
        cls,
        counts: Ints,
        home: Ints,
        chunks: Sequence[tuple[int, int, int]],
        near: tuple[Ints, ...] = ANYWHERE,
    ) -> "Plan":
        """From `(expert, rank, rows)`; the chunks of one expert in the order in which they take rows."""
        kept = sorted((c for c in chunks if c[2] > 0), key=lambda c: c[0])
        expert, rank, num_rows = np.ascontiguousarray(np.array(kept, dtype=np.int64).reshape(-1, 3).T)
        return cls(counts, home, expert, rank, num_rows, near)

    @property
    def num_ranks(self) -> int:
        return len(self.counts)

    @property
    def num_experts(self) -> int:
        return int(self.counts.shape[1])

    def loads(self) -> Ints:
        """Return [R] rows computed on each rank."""
        return _sum_at(self.rank, self.num_rows, self.num_ranks)

    def home_loads(self) -> Ints:
        """Return [R] rows that each rank would compute under standard expert parallelism."""
        return _sum_at(self.home, self.counts.sum(0), self.num_ranks)

    @cached_property
    def _guests(self) -> list[tuple[int, int, int]]:
        owner = self.home[self.expert]
        away = np.flatnonzero(self.rank != owner)
        triples = zip(self.expert[away].tolist(), owner[away].tolist(), self.rank[away].tolist(), strict=True)
        return sorted(set(triples))

    def guests(self) -> list[tuple[int, int, int]]:
        """Return `(expert, home_rank, guest_rank)` of every replica that computes rows away from home, sorted."""
        return self._guests

    def placed(self) -> Ints:
        """Return [R, E] rows of each expert that each rank computes."""
        flat = _sum_at(self.rank * self.num_experts + self.expert, self.num_rows, self.num_ranks * self.num_experts)
        return flat.reshape(self.num_ranks, self.num_experts)

    def moved(self) -> int:
        """Return how many rows are computed on another rank than the home of their expert."""
        return int(self.num_rows[self.rank != self.home[self.expert]].sum())

    @cached_property
    def traffic(self) -> Ints:
        """[R, R] rows that go from each source to each rank; the diagonal stays where it is."""
        return self._match(-1)[0]

    def crossing(self) -> int:
        """Return how many rows are computed on another rank than the one that holds them."""
        return int(self.traffic.sum() - self.traffic.trace())

    def rows(self, source: int) -> Ints:
        """Return [E, R] how many of its rows of each expert `source` sends to each rank."""
        return self._share(source)[0]

    def received(self, rank: int) -> Ints:
        """Return [R, E] how many rows of each expert `rank` gets from each source."""
        return self._share(rank)[1]

    def slots(self, rank: int) -> list[int]:
        """Return the experts that `rank` computes, in the order of its slots: its own, then its guests."""
        return np.flatnonzero(self.home == rank).tolist() + self.guests_on(rank)

    def guests_on(self, rank: int) -> list[int]:
        """Return the experts that are guests on `rank`, ascending."""
        return [e for e, _, guest in self._guests if guest == rank]

    def _share(self, rank: int) -> tuple[Ints, Ints]:
        if rank not in self._shares:
            self._shares[rank] = self._match(rank)[1:]
        return self._shares[rank]

    def _match(self, me: int) -> tuple[Ints, Ints, Ints]:
        near = np.zeros((len(self.near) + 1, self.num_ranks), np.int64)
        for stage, labels in enumerate(self.near):
            near[stage] = labels
        counts = np.ascontiguousarray(self.counts, np.int64)
        found: tuple[Ints, Ints, Ints] = _match(counts, self.expert, self.rank, self.num_rows, near, me)
        return found


def _sum_at(index: Ints, values: Ints, size: int) -> Ints:
    return np.bincount(index, values, size).astype(np.int64)


def imbalance(loads: Ints) -> float:
    """Return largest over mean device load; 1 is perfect balance, and by convention also no load at all."""
    total = loads.sum()
    return float(loads.max() * len(loads) / total) if total else 1.0


def stay_home(counts: Ints, home: Ints, costs: Any = None, limits: Any = None, state: Any = None) -> Plan:
    """Return the plan that moves nothing, standard expert parallelism: the planner `home`. counts [R, E], home [E]."""
    totals = counts.sum(0)
    expert = np.flatnonzero(totals)
    return Plan(counts, home, expert, home[expert], totals[expert])
