"""Experts choose tokens. T tokens, B sequences, L positions, E experts, C tokens an expert takes."""

import torch

from moetrain.moe.options import UnbiasedOptions
from moetrain.moe.routing.base import Choice, Place, Scores
from moetrain.moe.routing.topk import TopK


class ExpertChoice(TopK):
    """Within each sequence every expert takes the C = ⌈L·K/E⌉ tokens that score it highest (Zhou et al., 2022, Eq. 1).

    Loads are exactly even; a token gets any number of experts, on average K, perhaps none.

    Warning: whether a token gets an expert depends on the tokens after it. A language model that is trained so sees
    into the future (up to K · log2((1 − R)/R) bits a token and layer with R = K/E; Wang et al., 2024, App. D): its loss
    is flattering, and generating token by token it has less to go by. For comparisons and for encoders.
    """

    Options = UnbiasedOptions
    normalises = False
    warning = (
        "router.name=expert_choice: experts pick tokens over the whole sequence, so a token's experts depend on later "
        "tokens. Losses are lower than an autoregressive use can keep."
    )

    @torch.no_grad()
    def choose(self, scores: Scores, place: Place | None = None) -> Choice:
        gate_TE = self.gates(scores)
        if place is not None and place.real_T is not None:
            gate_TE = gate_TE.masked_fill(~place.real_T[:, None], -1.0)  # padding comes last
        num_tokens, num_experts = gate_TE.shape
        length = max(num_tokens if place is None else place.length, 1)
        num_sequences, device = num_tokens // length, gate_TE.device
        most = -(-length * self.k // num_experts)
        position_BCE = gate_TE.view(num_sequences, length, num_experts).topk(most, dim=1).indices
        token_BCE = position_BCE + length * torch.arange(num_sequences, device=device)[:, None, None]
        expert_BCE = torch.arange(num_experts, device=device).expand_as(token_BCE)
        order_N = token_BCE.flatten().argsort(stable=True)
        return Choice(token_BCE.flatten()[order_N], expert_BCE.flatten()[order_N])
