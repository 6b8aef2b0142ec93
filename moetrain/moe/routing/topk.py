"""The K best experts of every token. T tokens, D model width, E experts, K top-k, G groups of experts."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain import config
from moetrain.moe.routing.base import Choice, Place, Router, Scores
from moetrain.moe.routing.noise import normal


class TopK(Router):
    """A linear router, the K best experts of every token (Switch, Mixtral, Qwen3-MoE, OLMoE).

    `noise`: standard deviation of what is added to the logits where experts are chosen, in training alone; weights do
    not see it. `groups`, `top_groups`: experts e · G // E = g are group g; its score is the sum of its two best gates,
    and a token chooses among the experts of its `top_groups` best groups (DeepSeek-V3, 2024, §2.1.2).
    """

    takes = frozenset({"noise", "groups", "top_groups"})

    def __init__(self, dim: int, num_experts: int, options: config.Router, index: int = 0) -> None:
        super().__init__(dim, num_experts, options, index)
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self._stream = (0, 0)  # seed and step of the noise

    @classmethod
    def problems(cls, num_experts: int, m: config.Model, r: config.Router) -> Iterator[tuple[str, str]]:
        groups, top = r.groups, r.top_groups
        if (groups is None) != (top is None):
            yield "router.groups", f"goes with router.top_groups, which is {top}"
        elif groups is not None and top is not None:
            if num_experts % groups:
                yield "router.groups", f"must divide the {num_experts} experts of a layer"
            if top > groups:
                yield "router.top_groups", f"must be at most router.groups={groups}"
            if num_experts // groups * top < r.top_k:
                yield "router.top_groups", f"must have at least router.top_k={r.top_k} experts together"

    def at_step(self, step: int, train: config.Train) -> None:
        self._stream = (train.seed, step)

    def logits(self, x_TD: Tensor, carry: Any, place: Place | None) -> tuple[Tensor, Any]:
        return F.linear(x_TD.float(), self.weight.float()), carry

    @torch.no_grad()
    def choose(self, scores: Scores, place: Place | None = None) -> Choice:
        expert_TK = self.preference(scores, place).topk(self.k, dim=-1).indices
        token_N = torch.arange(len(expert_TK), device=expert_TK.device).repeat_interleave(self.k)
        return Choice(token_N, expert_TK.flatten())

    def preference(self, scores: Scores, place: Place | None) -> Tensor:
        """[T, E] by what experts are chosen: gates plus bias; without one the logits, in whose order they are."""
        r = self.options
        if r.noise and place is not None and place.sample_B is not None:
            noise_TE = normal((*self._stream, self.index), place.sample_B, place.length, self.num_experts)
            scores = self.scores_of(scores.logits_TE + r.noise * noise_TE)
        if self.bias is None and r.groups is None:
            return scores.logits_TE
        best_TE = self.gates(scores) if self.bias is None else self.gates(scores) + self.bias
        best_TE = best_TE.masked_fill(scores.logits_TE == -torch.inf, -torch.inf)  # no bias opens what is shut
        if r.groups is None or r.top_groups is None:
            return best_TE
        best_TGE = best_TE.unflatten(1, (r.groups, -1))
        group_TG = best_TGE.topk(min(2, best_TGE.shape[2]), dim=-1).values.sum(-1)
        open_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        open_TG.scatter_(1, group_TG.topk(r.top_groups, dim=-1).indices, True)
        return best_TGE.masked_fill(~open_TG[..., None], -torch.inf).flatten(1)
