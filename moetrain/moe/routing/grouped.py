"""Experts for certain tokens only. T tokens, E experts, G groups."""

from typing import Any

import torch
from torch import Tensor

from moetrain.moe.options import GroupedOptions
from moetrain.moe.routing.base import Place
from moetrain.moe.routing.topk import TopK


class Grouped(TopK):
    """A token of group g chooses among the experts of group g alone (MoMa, Lin et al., 2024, §2.2, with top-K inside a
    group where the paper has expert choice). Expert e is in group e mod G; a token's group is its data domain mod G.

    Where the domain is unknown, as in generation from a prompt, all experts are allowed.
    """

    Options = GroupedOptions
    options: GroupedOptions

    def logits(self, x_TD: Tensor, carry: Any, place: Place | None) -> tuple[Tensor, Any]:
        logits_TE, carry = super().logits(x_TD, carry, place)
        if place is not None and place.group_T is not None:
            num_groups = self.options.token_groups
            expert_E = torch.arange(self.num_experts, device=logits_TE.device)
            other_TE = place.group_T[:, None] % num_groups != expert_E % num_groups
            logits_TE = logits_TE.masked_fill(other_TE, -torch.inf)
        return logits_TE, carry
