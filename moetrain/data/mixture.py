"""Which window of which source a sample of `data=tokens` is: a function of (seed, number of the sample) that keeps
neither lists nor permutations of all windows in memory.

Samples come in rounds. After every round each source has had its share of all turns so far, rounded down, and the
largest has the rest; in a round the turns of a source are spread evenly, at random places. Within a source, windows
come pass after pass, each pass in an order of its own: a format-preserving permutation (Black and Rogaway, "Ciphers
with arbitrary finite domains", 2002: a Feistel network over the next power of four, walked until it falls inside).
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

ROUND = 1024  # turns: at least the square of the number of sources
ROUNDS_OF_FEISTEL = 6
WORD = (1 << 64) - 1


class Windows(Protocol):
    """Sequences of a source: a stream of tokens, or rows of conversations."""

    labels: NDArray[np.int64]  # the numbers of the domains that there are in it

    @property
    def num_windows(self) -> int: ...

    def window(self, number: int) -> tuple[NDArray[Any], ...]:
        """Tokens, domains, document numbers [L + 1], and what else belongs to each token."""
        ...


@dataclass(frozen=True, eq=False)
class Source:
    """The streams of one entry of `data.sources`, and how often they come."""

    name: str
    weight: float | None
    epochs: float | None
    streams: tuple[Windows, ...]

    @cached_property
    def _ends(self) -> list[int]:
        return np.cumsum([stream.num_windows for stream in self.streams]).tolist()

    @property
    def num_windows(self) -> int:
        """Sequences of one pass."""
        return self._ends[-1]

    @property
    def share(self) -> Fraction:
        """Its share of the samples, relative to that of others."""
        if self.weight is not None:
            return Fraction(self.weight)
        return Fraction(1.0 if self.epochs is None else self.epochs) * self.num_windows

    def window(self, number: int) -> tuple[NDArray[Any], ...]:
        """Tokens, domains and document numbers [L + 1], and what else there is."""
        stream = bisect_right(self._ends, number)
        return self.streams[stream].window(number - (self._ends[stream - 1] if stream else 0))


class Mixture:
    """The order of samples: `block` consecutive ones are of one source."""

    def __init__(self, sources: Sequence[Source], seed: int, block: int = 1) -> None:
        self.sources, self.seed, self.block = sources, seed, block
        total = sum((source.share for source in sources), Fraction())
        self.shares = [source.share / total for source in sources]
        self.largest = max(range(len(sources)), key=lambda n: self.shares[n])
        self.turns = max(ROUND, len(sources) ** 2)
        self._round = lru_cache(maxsize=4)(self._draw)

    def window(self, sample: int) -> tuple[NDArray[Any], ...]:
        """Tokens, domains and document numbers [L + 1] of a sample, and what else there is."""
        number, window = self.place(sample)
        return self.sources[number].window(window)

    def place(self, sample: int) -> tuple[int, int]:
        """(number of the source, window of it)."""
        turn, offset = divmod(sample, self.block)
        round_, place = divmod(turn, self.turns)
        order, before, within = self._round(round_)
        number = int(order[place])
        source = self.sources[number]
        used = source.num_windows // self.block * self.block  # of a pass; which are left over differs
        epoch, position = divmod((before[number] + int(within[place])) * self.block + offset, used)
        return number, permute(position, source.num_windows, f"{self.seed}/{source.name}/{epoch}")

    def passes(self, samples: int) -> list[float]:
        """How often each source is used up by so many samples."""
        round_, place = divmod(-(-samples // self.block), self.turns)
        order, before, _ = self._round(round_)
        counts = np.bincount(order[:place], minlength=len(self.sources))
        turns = [earlier + int(count) for earlier, count in zip(before, counts, strict=True)]
        return [turn * self.block / source.num_windows for turn, source in zip(turns, self.sources, strict=True)]

    def _turns_before(self, round_: int) -> list[int]:
        """The turns of every source in all rounds before; what rounding down leaves goes to the largest."""
        found = [int(share * round_ * self.turns) for share in self.shares]
        found[self.largest] += round_ * self.turns - sum(found)
        return found

    def _draw(self, round_: int) -> tuple[NDArray[np.int64], list[int], NDArray[np.int64]]:
        """(source of every turn, turns of each source before the round, turns of its own source before a turn)."""
        before, after = self._turns_before(round_), self._turns_before(round_ + 1)
        counts = np.array([late - early for late, early in zip(after, before, strict=True)])
        draw = np.random.Generator(np.random.Philox([self.seed, round_]))
        within = np.concatenate([np.arange(count) for count in counts])
        places = (within + draw.random(self.turns)) / np.repeat(counts, counts)
        order = np.argsort(places, kind="stable")
        return np.repeat(np.arange(len(counts)), counts)[order], before, within[order]


def permute(place: int, size: int, key: str) -> int:
    """Where `place` goes in the permutation of `size` places that `key` stands for."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = _keys(key)
    while True:
        left, right = place >> half, place & mask
        for number in keys:
            left, right = right, left ^ (_mix(right + number) & mask)
        place = left << half | right
        if place < size:
            return place


@lru_cache(maxsize=1024)
def _keys(key: str) -> list[int]:
    raw = hashlib.blake2b(key.encode(), digest_size=8 * ROUNDS_OF_FEISTEL).digest()
    return [int.from_bytes(raw[n : n + 8], "little") for n in range(0, len(raw), 8)]


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = ((value ^ (value & WORD) >> 30) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & WORD
    return value ^ value >> 31
