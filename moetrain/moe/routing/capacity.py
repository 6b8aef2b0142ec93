"""Room for so many rows an expert, for comparisons with Switch and GShard; what finds none goes past.

Dropless is the default. Room is counted on each rank, so what is dropped depends on how a batch lies on ranks and
micro-steps: a run with a capacity factor is exempt from the rule that every layout gives the same result.

E experts (those that compute nothing included), N selections.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.moe.routing.base import Choice


def room(counts_E: Tensor, factor: float, weights: Sequence[float] | None = None) -> Tensor:
    """int64 [E] rows of an expert that one rank may send: ⌈factor · N / E⌉ (GShard; Switch, Eq. 3); with weights, each
    expert's share of factor · N is w_e / Σ w (MoE++, Eq. 8, where T has to mean selections).

    `counts_E`: this rank's selections, N = their sum.
    """
    weights = [1.0] * len(counts_E) if weights is None else weights
    part_E = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64).to(
        counts_E.device, non_blocking=True
    )
    return (factor * counts_E.sum() * part_E - 1e-6).ceil().to(torch.int64)


def within(choice: Choice, room_E: Tensor) -> Tensor:
    """bool [N]: the selections that find room. All tokens' first choices come before the second ones, and so on; then
    the earlier token first (GShard, Alg. 1)."""
    token_N, expert_N, chosen_N = choice
    number_N = torch.arange(len(token_N), device=token_N.device)
    turn_N = number_N - torch.searchsorted(token_N, token_N)
    key_N = expert_N if chosen_N is None else torch.where(chosen_N, expert_N, len(room_E))
    order_N = turn_N.argsort(stable=True)
    order_N = order_N[key_N[order_N].argsort(stable=True)]
    sorted_N = key_N[order_N]
    place_N = number_N - torch.searchsorted(sorted_N, sorted_N)
    fits_N = torch.zeros_like(token_N, dtype=torch.bool)
    fits_N[order_N] = place_N < torch.cat([room_E, room_E.new_zeros(1)])[sorted_N]
    return fits_N
