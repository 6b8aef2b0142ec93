"""A bigram model with absolute discounting, fitted on the very tokens that the network saw: the bar to clear.

p(w | v) = max(c(v,w) - d, 0) / c(v) + d · N(v) / c(v) · p(w), with p(w) = (c(w) + 1) / (N + V), N(v) the number of
kinds of tokens seen after v. The discount d is tuned on the held-out text itself, in the baseline's favour.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DISCOUNTS = np.linspace(0.1, 0.95, 18)


class Bigram:
    """Counts over pairs of tokens. All inputs [..., L + 1] int64."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._pairs: list[tuple[NDArray, NDArray]] = []

    def see(self, tokens: NDArray[np.int64]) -> None:
        pairs = tokens[..., :-1].ravel() * self.vocab_size + tokens[..., 1:].ravel()
        self._pairs.append(np.unique(pairs, return_counts=True))

    def fit(self) -> None:
        keys, place = np.unique(np.concatenate([k for k, _ in self._pairs]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([c for _, c in self._pairs]), minlength=len(keys))
        self._pairs = [(keys, counts)]
        first, second = np.divmod(keys, self.vocab_size)
        self._after = np.bincount(first, counts, minlength=self.vocab_size)
        self._kinds = np.bincount(first, minlength=self.vocab_size)
        single = np.bincount(second, counts, minlength=self.vocab_size)
        self._single = (single + 1) / (single.sum() + self.vocab_size)

    def nats(self, tokens: NDArray[np.int64], discount: float) -> NDArray[np.float64]:
        """[..., L] -log p of every token given the one before."""
        keys, counts = self._pairs[0]
        before, after = tokens[..., :-1], tokens[..., 1:]
        wanted = before * self.vocab_size + after
        place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        seen = np.where(keys[place] == wanted, counts[place], 0)
        total = self._after[before]
        rest = np.where(total > 0, discount * self._kinds[before] / total.clip(min=1), 1.0)
        return -np.log(np.maximum(seen - discount, 0) / total.clip(min=1) + rest * self._single[after])

    def tune(self, texts: Sequence[NDArray[np.int64]]) -> float:
        """The discount that suits the texts together best; they may differ in length."""
        return float(min(DISCOUNTS, key=lambda d: sum(self.nats(tokens, float(d)).sum() for tokens in texts)))
