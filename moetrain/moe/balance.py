"""The load-balancing loss over the global batch, and the router's z-loss.

Demons in the Detail (Qwen, ACL 2025): LBL = N_E · Σ_i f̄_i P̄_i, with f̄ the share of selections that went to expert i,
counted over all ranks and, under gradient accumulation, over the micro-steps so far (Alg. 1, `buffer`). f̄ is a
constant for autograd, so one all-reduce of counts for all layers is all the communication it takes.

Every rank returns its share of the loss: summed over ranks and micro-steps, with P divided by the tokens of the
global batch, the shares are the loss. Gradients are summed over ranks, never averaged.

L layers, E experts of a layer, N experts of all layers, one layer after another: layers may differ in E.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain import config
from moetrain.comm import all_reduce_sum
from moetrain.moe.layer import LayerStats


class Losses(NamedTuple):
    """Of one micro-step on this rank."""

    weighted: Tensor  # with gradient: the sum of all, each times its coefficient; to be added to the loss
    shares: dict[str, Tensor]  # of each loss before its coefficient, summed over layers; no gradient
    entropy_L: Tensor  # Σ_t entropy of the token's probabilities, nats; no gradient


class Balance:
    """The router losses of one optimizer step, micro-step by micro-step; `tokens_in_batch`: of the global batch."""

    def __init__(self, options: config.Balance, tokens_in_batch: int) -> None:
        self._options, self._tokens = options, tokens_in_batch
        self._sizes: list[int] = []
        self._seen_N: Tensor | None = None

    @property
    def counts(self) -> list[Tensor]:
        """int64 [E] of every layer: selections on all ranks in the micro-steps so far."""
        assert self._seen_N is not None, "losses() comes first"
        return list(self._seen_N.split(self._sizes))

    def losses(self, stats: Sequence[LayerStats]) -> Losses:
        """Of the next micro-step. Enters one collective: all ranks call it."""
        options, tokens = self._options, self._tokens
        self._sizes = [len(s.counts_E) for s in stats]
        f_N = frequencies(self._basis(torch.cat([s.counts_E for s in stats])), self._sizes)
        terms = {
            "balance": (options.coefficient, balance_loss(stats, f_N, tokens)),
            "z": (options.z_coefficient, z_loss(stats, tokens)),
        }
        weighted = torch.stack([coefficient * value for coefficient, value in terms.values()]).sum()
        shares = {name: value.detach() for name, (_, value) in terms.items()}
        return Losses(weighted, shares, torch.stack([entropy(s).detach() for s in stats]))

    def _basis(self, local_N: Tensor) -> Tensor:
        """The counts that f̄ is made of. `local_N`: of this rank and micro-step."""
        counts_N = all_reduce_sum(local_N.clone())
        self._seen_N = counts_N if self._seen_N is None else self._seen_N + counts_N
        return {"micro": local_N, "data": counts_N, "global": self._seen_N}[self._options.scope]


def frequencies(counts_N: Tensor, sizes: Sequence[int]) -> Tensor:
    """fp32 [N] shares of selections, summing to one in every layer, or all zero where nothing was selected."""
    layer_N, _ = _places(tuple(sizes), counts_N.device)
    total_L = torch.zeros(len(sizes), dtype=torch.float64, device=counts_N.device)
    total_L.index_add_(0, layer_N, counts_N.double())
    return (counts_N / total_L.clamp(min=1)[layer_N]).float()


def balance_loss(stats: Sequence[LayerStats], f_N: Tensor, tokens_in_batch: int) -> Tensor:
    """This rank's and micro-step's share of Σ_layers N_E Σ_i f̄_i P̄_i; `tokens_in_batch`: of the global batch."""
    prob_N = torch.cat([s.scores.probs_TE.sum(0) for s in stats]) / tokens_in_batch
    _, size_N = _places(tuple(s.scores.probs_TE.shape[1] for s in stats), f_N.device)
    return (size_N * f_N * prob_N).sum()


def z_loss(stats: Sequence[LayerStats], tokens_in_batch: int) -> Tensor:
    """This rank's and micro-step's share of Σ_layers mean_t logsumexp(logits_t)² (ST-MoE, Eq. 5)."""
    return torch.stack([s.scores.logits_TE.logsumexp(-1).square().sum() for s in stats]).sum() / tokens_in_batch


def entropy(stats: LayerStats) -> Tensor:
    """Σ_t entropy of the token's probabilities, nats. With gradient, finite where a probability is zero."""
    probs_TE = stats.scores.probs_TE
    return -(probs_TE * probs_TE.clamp(min=torch.finfo(probs_TE.dtype).tiny).log()).sum()


@lru_cache(maxsize=8)
def _places(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """([N] the layer of each expert, [N] fp32 the number of experts in its layer)."""
    size_L = torch.tensor(sizes, device=device)
    layer_N = torch.arange(len(sizes), device=device).repeat_interleave(size_L, output_size=sum(sizes))
    return layer_N, size_L[layer_N].float()
