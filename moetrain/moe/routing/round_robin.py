"""The ideal to measure against. T tokens, E experts, K top-k, N = T·K."""

import torch

from moetrain.moe.options import UnbiasedOptions
from moetrain.moe.routing.base import Choice, Place, Scores
from moetrain.moe.routing.topk import TopK


class RoundRobin(TopK):
    """Experts are dealt out in turn, so that every one gets the same number of rows.

    Scores and weights are those of `TopK`; a token's K experts differ, as K ≤ E. Counts are exactly even where E
    divides T·K.
    """

    Options = UnbiasedOptions

    @torch.no_grad()
    def choose(self, scores: Scores, place: Place | None = None) -> Choice:
        (num_tokens, num_experts), k = scores.logits_TE.shape, self.k
        turn_N = torch.arange(num_tokens * k, device=scores.logits_TE.device)
        return Choice(turn_N // k, turn_N % num_experts)
