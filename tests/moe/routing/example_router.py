"""Experts by direction. T tokens, D model width, E experts."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.options import NoisyOptions
from moetrain.moe.routing.base import Place
from moetrain.moe.routing.topk import TopK

TEMPERATURE = 0.1


class Cosine(TopK):
    """Logits are cosines over a temperature, so that no expert wins by the length of its vector (X-MoE, Chi et al.,
    NeurIPS 2022, §3.2; without its projection to fewer dimensions)."""

    Options = NoisyOptions

    def logits(self, x_TD: Tensor, carry: Any, place: Place | None) -> tuple[Tensor, Any]:
        token_TD, expert_ED = (F.normalize(x.float(), dim=-1) for x in (x_TD, self.weight))
        return F.linear(token_TD, expert_ED) / TEMPERATURE, carry
