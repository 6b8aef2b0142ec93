"""The load-balancing loss over the global batch, and the router's z-loss.

Demons in the Detail (Qwen, ACL 2025): LBL = N_E · Σ_i f̄_i P̄_i, with f̄ the share of selections that went to expert i,
counted over all ranks and, under gradient accumulation, over the micro-steps so far (Alg. 1, `buffer`). f̄ is a
constant for autograd, so one all-reduce of counts for all layers is all the communication it takes.

Every rank returns its share of the loss: summed over ranks and micro-steps, with P divided by the tokens of the
global batch, the shares are the loss. Gradients are summed over ranks, never averaged.

L layers, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain import config
from moetrain.comm import all_reduce_sum
from moetrain.moe.layer import LayerStats


def synchronise(stats: Sequence[LayerStats], scope: str, seen_LE: Tensor | None) -> tuple[Tensor, Tensor]:
    """(f_LE, counts_LE): frequencies by `scope`, rows summing to one; and all ranks' counts of this micro-step.

    `seen_LE`: counts of all ranks in the earlier micro-steps of this optimizer step, None at the first.
    """
    local_LE = torch.stack([s.counts_E for s in stats])
    counts_LE = all_reduce_sum(local_LE.clone())
    basis = {
        "micro": local_LE,
        "data": counts_LE,
        "global": counts_LE if seen_LE is None else counts_LE + seen_LE,
    }
    total_LE = basis[scope].double()
    return (total_LE / total_LE.sum(1, keepdim=True).clamp(min=1)).float(), counts_LE


def balance_loss(stats: Sequence[LayerStats], f_LE: Tensor, tokens_in_batch: int) -> Tensor:
    """This rank's and micro-step's share of Σ_layers N_E Σ_i f̄_i P̄_i; `tokens_in_batch`: of the global batch."""
    prob_LE = torch.stack([s.prob_sum_E for s in stats]) / tokens_in_batch
    return f_LE.shape[1] * (f_LE * prob_LE).sum()


def z_loss(stats: Sequence[LayerStats], tokens_in_batch: int) -> Tensor:
    """This rank's and micro-step's share of Σ_layers mean_t logsumexp(logits_t)² (ST-MoE, Eq. 5)."""
    return torch.stack([s.z_sum for s in stats]).sum() / tokens_in_batch


def router_losses(
    stats: Sequence[LayerStats], options: config.Balance, tokens_in_batch: int, seen_LE: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weighted sum to add to the loss, balance loss, z-loss, counts_LE), the losses as this rank's share."""
    f_LE, counts_LE = synchronise(stats, options.scope, seen_LE)
    balance, z = balance_loss(stats, f_LE, tokens_in_batch), z_loss(stats, tokens_in_batch)
    return options.coefficient * balance + options.z_coefficient * z, balance.detach(), z.detach(), counts_LE
