"""Routers in which tokens choose their experts by a score: the K best, as many as needed, in turn, within groups.

T tokens, D model width, E experts, K top-k, G groups of M experts each, N selections.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.moe.options import (
    FrozenOptions,
    GroupedOptions,
    RouterOptions,
    TopKOptions,
    TopPOptions,
    UnbiasedOptions,
)
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
        best_TGM = best_TE.unflatten(1, (self.groups, -1))
        group_TG = best_TGM.topk(min(2, best_TGM.shape[2]), dim=-1).values.sum(-1)
        open_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        open_TG.scatter_(1, group_TG.topk(self.top_groups, dim=-1).indices, True)
        left_TGM: Tensor = best_TGM.masked_fill(~open_TG[..., None], -torch.inf)
        return left_TGM.flatten(1)


class TopP(TopK):
    """Chooses the fewest experts whose probabilities reach `top_p` together (Huang et al., ACL 2024, "Harder Tasks Need
    More Experts", Eq. 3 to 5): S = the first t experts in order of probability, t = min {k : Σ_{j≤k} P_(j) ≥ p}.

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


class Frozen(TopK):
    """SMoE-Dropout (Chen et al., ICLR 2023): the router stays as it was drawn; K grows linearly over training from
    `k_start` to `top_k`, k = round((top_k - k_start) · step / steps) + k_start (half to even). Evaluation uses the
    current K.
    """

    Options = FrozenOptions
    options: FrozenOptions

    def __init__(self, dim: int, num_experts: int, options: RouterOptions | None = None, index: int = 0) -> None:
        super().__init__(dim, num_experts, options, index)
        self.weight.requires_grad_(False)

    def at_step(self, step: int, steps: int, seed: int) -> None:
        super().at_step(step, steps, seed)
        start, end = min(self.options.k_start, self.options.top_k), self.options.top_k
        self.k = round((end - start) * min(step, steps) / steps) + start


class RoundRobin(TopK):
    """Deals experts out in turn, so that every one gets the same number of rows: the ideal to measure against.

    Scores and weights are those of `TopK`; a token's K experts differ, as K ≤ E. Counts are exactly even where E
    divides T·K.
    """

    Options = UnbiasedOptions

    @torch.no_grad()
    def choose(self, scores: Scores, place: Place | None = None) -> Choice:
        (num_tokens, num_experts), k = scores.logits_TE.shape, self.k
        turn_N = torch.arange(num_tokens * k, device=scores.logits_TE.device)
        return Choice(turn_N // k, turn_N % num_experts)
