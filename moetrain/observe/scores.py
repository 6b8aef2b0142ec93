"""What an evaluation of held-out text found: scores of domains, metrics, specialisation."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Score:
    """Of one domain's held-out text; NaN where nothing of it was evaluated, never a perfect zero."""

    nats: float
    tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(50.0, self.loss)) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else math.nan


class HeldOut(NamedTuple):
    scores: dict[str, Score]  # per domain, and `all`
    metrics: dict[str, float]
    specialisation: list[dict[str, Any]]  # of every layer
