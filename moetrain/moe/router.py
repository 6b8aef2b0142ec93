"""Routers: which tokens go to which experts, and with what weight. All of it in fp32.

A router works in three steps, so that activation recompute can replay a choice instead of making it again:
`score` (differentiable), `choose` (no gradient), `weigh` (differentiable, given the choice).
`router(x_TD, carry) -> (Routing, carry)` is all three. `carry` is what some routers hand from layer to layer.

T tokens, D model width, E experts, K top-k, N selections (any number a token).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain import config


class Scores(NamedTuple):
    logits_TE: Tensor  # fp32
    probs_TE: Tensor  # fp32, rows sum to one


class Choice(NamedTuple):
    token_N: Tensor  # int64, ascending
    expert_N: Tensor  # int64


class Routing(NamedTuple):
    token_N: Tensor  # int64, ascending; a token may stand in it any number of times
    expert_N: Tensor  # int64
    weight_N: Tensor  # fp32, with gradient
    probs_TE: Tensor  # fp32, with gradient: what the balance loss sees


class TopK(nn.Module):
    """Softmax or sigmoid scores, the K best experts of every token (Switch, Mixtral, Qwen3-MoE, OLMoE)."""

    def __init__(self, dim: int, num_experts: int, options: config.Router) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.options = options

    def forward(self, x_TD: Tensor, carry: Any = None) -> tuple[Routing, Any]:
        scores, carry = self.score(x_TD, carry)
        return self.weigh(scores, self.choose(scores)), carry

    def score(self, x_TD: Tensor, carry: Any = None) -> tuple[Scores, Any]:
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        if self.options.skew:
            hot = torch.arange(logits_TE.shape[1], device=logits_TE.device) < self.options.top_k
            logits_TE = logits_TE + self.options.skew * hot
        if self.options.scores == "softmax":
            return Scores(logits_TE, logits_TE.softmax(-1)), carry
        probs_TE = logits_TE.sigmoid()
        return Scores(logits_TE, probs_TE / probs_TE.sum(-1, keepdim=True)), carry

    @torch.no_grad()
    def choose(self, scores: Scores) -> Choice:
        num_tokens, k = scores.logits_TE.shape[0], self.options.top_k
        expert_TK = scores.logits_TE.topk(k, dim=-1).indices  # both score functions keep the logits' order
        token_N = torch.arange(num_tokens, device=expert_TK.device).repeat_interleave(k)
        return Choice(token_N, expert_TK.flatten())

    def weigh(self, scores: Scores, choice: Choice) -> Routing:
        source = scores.probs_TE if self.options.scores == "softmax" else scores.logits_TE.sigmoid()
        weight_TK = source.gather(1, choice.expert_N.view(-1, self.options.top_k))
        if self.options.normalise:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return Routing(*choice, weight_TK.flatten(), scores.probs_TE)


class RoundRobin(TopK):
    """The ideal to measure against: experts are dealt out in turn, so that every one gets the same number of rows.

    Scores and weights are those of `TopK`; a token's K experts differ, as K ≤ E. Counts are exactly even where E
    divides T·K.
    """

    @torch.no_grad()
    def choose(self, scores: Scores) -> Choice:
        (num_tokens, num_experts), k = scores.logits_TE.shape, self.options.top_k
        turn_N = torch.arange(num_tokens * k, device=scores.logits_TE.device)
        return Choice(turn_N // k, turn_N % num_experts)


ROUTERS: dict[str, type[TopK]] = {"topk": TopK, "round_robin": RoundRobin}
