"""Dispatch and combine: rows travel to the ranks that the plan names, and back, and are summed per token.

The dispatcher holds no parameters. `Route.of` turns a routing and a plan into index tables; `dispatch` and
`combine` obey them and never ask who made the plan. Sums run in fp32 and in a fixed order: no atomic adds, so that
a repeat is equal bit for bit on any device.

T tokens here, D width, N rows sent, M rows received, S slots on this rank, R ranks, E experts, K most rows a token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.comm import all_to_all
from moetrain.mesh import Expert
from moetrain.moe.plan import Ints, Plan
from moetrain.moe.router import Choice, Routing


@dataclass(frozen=True)
class Route:
    """One rank's tables for one layer and micro-step."""

    selection_N: Tensor  # which selection is the n-th row sent (by rank, then expert)
    token_N: Tensor  # its token
    row_TK: Tensor  # where the rows of a token stand among those sent; N where it has fewer than K
    send: list[int]  # [R]
    receive: list[int]  # [R]
    to_slots_M: Tensor  # arrival order (by source, then expert) -> slot order
    from_slots_M: Tensor  # and back
    slot_rows: list[int]  # [S]

    @classmethod
    def of(cls, choice: Choice | Routing, plan: Plan, rank: int, num_tokens: int, most_per_token: int) -> "Route":
        device = choice.expert_N.device
        sent_ER, received_RE = plan.rows(rank), plan.received(rank)
        slots_S = plan.slots(rank)

        # Selections sorted by expert; then each expert's run is cut into what every rank gets.
        by_expert_N = choice.expert_N.argsort(stable=True)
        selection_N = by_expert_N[_regroup(sent_ER, device)]
        token_N = choice.token_N[selection_N]
        to_slots_M = _regroup(received_RE, device, slots_S)
        return cls(
            selection_N=selection_N,
            token_N=token_N,
            row_TK=_rows_of_tokens(choice.token_N, _inverse(selection_N), num_tokens, most_per_token),
            send=sent_ER.sum(0).tolist(),
            receive=received_RE.sum(1).tolist(),
            to_slots_M=to_slots_M,
            from_slots_M=_inverse(to_slots_M),
            slot_rows=received_RE[:, slots_S].sum(0).tolist(),
        )


def dispatch(x_TD: Tensor, route: Route, ep: Expert) -> Tensor:
    """[T, D] tokens -> [M, D] rows of this rank's slots, slot by slot."""
    rows_ND = _Gather.apply(x_TD, route.token_N, route.row_TK)
    arrived_MD = all_to_all(rows_ND, route.send, route.receive, ep.rows)
    return _Permute.apply(arrived_MD, route.to_slots_M, route.from_slots_M)


def combine(rows_MD: Tensor, weight_N: Tensor, route: Route, ep: Expert) -> Tensor:
    """[M, D] expert outputs -> [T, D]: every token's rows, weighted and summed in fp32. weight_N by selection."""
    arrived_MD = _Permute.apply(rows_MD, route.from_slots_M, route.to_slots_M)
    rows_ND = all_to_all(arrived_MD, route.receive, route.send, ep.rows)
    return _WeightedSum.apply(rows_ND, weight_N[route.selection_N], route.token_N, route.row_TK)


def _regroup(sizes: Ints, device: torch.device, second: list[int] | None = None) -> Tensor:
    """Index that turns an order by (first, second) into one by (second, first).

    `sizes` [first, second] are run lengths; `second` the order of the second key, ascending if None.
    """
    start = np.cumsum(sizes).reshape(sizes.shape) - sizes
    columns = slice(None) if second is None else second
    moved, begin = sizes[:, columns].T.ravel(), start[:, columns].T.ravel()
    shift = begin - (np.cumsum(moved) - moved)
    index = np.arange(moved.sum()) + np.repeat(shift, moved)
    return torch.from_numpy(index).to(device, non_blocking=True)


def _inverse(index_N: Tensor) -> Tensor:
    out = torch.empty_like(index_N)
    out[index_N] = torch.arange(len(index_N), device=index_N.device)
    return out


def _rows_of_tokens(token_N: Tensor, row_N: Tensor, num_tokens: int, most: int) -> Tensor:
    """[T, K] the sent rows of each token, in the order of its selections; filled up with N."""
    if len(token_N) == num_tokens * most:  # every token has K: they stand in order already
        return row_N.view(num_tokens, most)
    first_T = torch.searchsorted(token_N, torch.arange(num_tokens, device=token_N.device))
    place_N = torch.arange(len(token_N), device=token_N.device) - first_T[token_N]
    out = row_N.new_full((num_tokens, most), len(token_N))
    out[token_N, place_N] = row_N
    return out


def _sum_rows(rows_ND: Tensor, weight_N: Tensor | None, row_TK: Tensor) -> Tensor:
    """[T, D] fp32: the sum of each token's rows, one after another."""
    total_TD = rows_ND.new_zeros(row_TK.shape[0], rows_ND.shape[1], dtype=torch.float32)
    if not len(rows_ND):
        return total_TD
    ragged = row_TK.numel() != len(rows_ND)
    for row_T in row_TK.unbind(1):
        index_T = row_T.clamp(max=len(rows_ND) - 1) if ragged else row_T
        part_TD = rows_ND[index_T].float()
        weight_T = weight_N[index_T] if weight_N is not None else part_TD.new_ones(len(index_T))
        if ragged:
            weight_T = torch.where(row_T < len(rows_ND), weight_T, 0.0)
        total_TD.addcmul_(part_TD, weight_T[:, None])
    return total_TD


class _Gather(torch.autograd.Function):
    """[T, D] -> [N, D], a row for every selection. Gradient: the sum over a token's rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TD[token_N]

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> Any:
        (row_TK,) = ctx.saved_tensors
        return _sum_rows(grad_ND, None, row_TK).to(grad_ND.dtype), None, None


class _WeightedSum(torch.autograd.Function):
    """[N, D] -> [T, D], the weighted sum of a token's rows."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, weight_N: Tensor, token_N: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, weight_N, token_N)
        return _sum_rows(rows_ND, weight_N, row_TK).to(rows_ND.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:
        rows_ND, weight_N, token_N = ctx.saved_tensors
        grad_ND = grad_TD[token_N]
        grad_weight_N = torch.linalg.vecdot(grad_ND.float(), rows_ND.float())
        return grad_ND * weight_N[:, None].to(grad_ND.dtype), grad_weight_N, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order. Gradient: the inverse permutation, gathered as well."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, index_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return rows_MD[index_M]

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> Any:
        (inverse_M,) = ctx.saved_tensors
        return grad_MD[inverse_M], None, None
