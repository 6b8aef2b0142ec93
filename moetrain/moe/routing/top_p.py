"""As many experts as a token needs. T tokens, E experts, N = T·E candidates."""

import torch

from moetrain.moe.options import TopPOptions
from moetrain.moe.routing.base import Choice, Place, Scores
from moetrain.moe.routing.topk import TopK


class TopP(TopK):
    """The fewest experts whose probabilities reach `top_p` together (Huang et al., ACL 2024, "Harder Tasks Need More
    Experts", Eq. 3 to 5): S = the first t experts in order of probability, t = min {k : Σ_{j≤k} P_(j) ≥ p}.

    A sure token takes one expert, an unsure one many; their weights are the probabilities, not normalised. The paper
    adds an entropy loss (1e-4) against the way out of taking all experts for everything. `router.top_k` chooses
    nothing here: it is what the estimate of active parameters goes by.
    """

    Options = TopPOptions
    normalises = False
    options: TopPOptions

    @torch.no_grad()
    def choose(self, scores: Scores, place: Place | None = None) -> Choice:
        probs_TE, expert_TE = scores.probs_TE.sort(dim=-1, descending=True, stable=True)
        before_TE = probs_TE.cumsum(-1) - probs_TE
        chosen_TE = before_TE < self.options.top_p
        chosen_TE[:, :1] = True  # rounding may leave the first a little above zero
        num_tokens, num_experts = probs_TE.shape
        token_N = torch.arange(num_tokens, device=probs_TE.device).repeat_interleave(num_experts)
        return Choice(token_N, expert_TE.flatten(), chosen_TE.flatten())
