"""The K best experts of every token. T tokens, D model width, E experts, K top-k, G groups of experts."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.options import RouterOptions, TopKOptions
from moetrain.moe.routing.base import Choice, Place, Router, Scores
from moetrain.moe.routing.noise import normal


class TopK(Router):
    """A linear router, the K best experts of every token (Switch, Mixtral, Qwen3-MoE, OLMoE).

    `noise`: standard deviation of what is added to the logits where experts are chosen, in training alone; weights do
    not see it. `groups`, `top_groups`: experts e · G // E = g are group g; its score is the sum of its two best gates,
    and a token chooses among the experts of its `top_groups` best groups (DeepSeek-V3, 2024, §2.1.2).
    """

    Options: ClassVar[type[RouterOptions]] = TopKOptions

    def __init__(self, dim: int, num_experts: int, options: RouterOptions | None = None, index: int = 0) -> None:
        super().__init__(dim, num_experts, options, index)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()
        self.noise: float = getattr(self.options, "noise", 0.0)  # derived routers may have no such options
        self.groups: int | None = getattr(self.options, "groups", None)
        self.top_groups: int | None = getattr(self.options, "top_groups", None)
        self._stream = (0, 0)  # seed and step of the noise

    def at_step(self, step: int, steps: int, seed: int) -> None:
        self._stream = (seed, step)

    def logits(self, x_TD: Tensor, carry: Any, place: Place | None) -> tuple[Tensor, Any]:
        return F.linear(x_TD.float(), self.weight.float()), carry

    @torch.no_grad()
    def choose(self, scores: Scores, place: Place | None = None) -> Choice:
        expert_TK = self.preference(scores, place).topk(self.k, dim=-1).indices
        token_N = torch.arange(len(expert_TK), device=expert_TK.device).repeat_interleave(self.k)
        return Choice(token_N, expert_TK.flatten())

    def preference(self, scores: Scores, place: Place | None) -> Tensor:
        """[T, E] by what experts are chosen: gates plus bias; without one the logits, in whose order they are."""
        if self.noise and place is not None and place.sample_B is not None:
            noise_TE = normal((*self._stream, self.index), place.sample_B, place.length, self.num_experts)
            scores = self.scores_of(scores.logits_TE + self.noise * noise_TE)
        if self.bias is None and self.groups is None:
            return scores.logits_TE
        best_TE = self.gates(scores) if self.bias is None else self.gates(scores) + self.bias
        best_TE = best_TE.masked_fill(scores.logits_TE == -torch.inf, -torch.inf)  # no bias opens what is shut
        if self.groups is None or self.top_groups is None:
            return best_TE
        best_TGE = best_TE.unflatten(1, (self.groups, -1))
        group_TG = best_TGE.topk(min(2, best_TGE.shape[2]), dim=-1).values.sum(-1)
        open_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        open_TG.scatter_(1, group_TG.topk(self.top_groups, dim=-1).indices, True)
        left_TGE: Tensor = best_TGE.masked_fill(~open_TG[..., None], -torch.inf)
        return left_TGE.flatten(1)
