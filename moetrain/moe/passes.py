"""The two autograd nodes of an MoE layer: tokens are dispatched, and experts compute and combine.

What is computed between the two (shared experts) runs while rows are under way. Rows come, are computed and go home in
chunks (`transfers`): one chunk is computed while the next one travels. Backward, `ExpertsCombine` has the rows'
gradients on their way home before it computes the weights' gradients, once for all chunks (unless rows are computed in
pieces), and `DispatchTokens` waits for them at the end.

T tokens here, D width, H expert hidden width, N selections here, M rows computed here, Q of them at a time, S slots
here, G guests here, W parameters of an expert.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetrain.moe.context import Gradients, LayerContext
from moetrain.moe.exchange.guests import Copy, PackedGradients, Returning, packed_size
from moetrain.moe.exchange.residents import GuestLoan, Weights, batch_guests, start_returning
from moetrain.moe.exchange.transfers import SumCombine, TokenDispatch
from moetrain.moe.weight_products import WeightProducts, choose_products, join_chunks

GRADIENT_BYTES = 8 << 20  # of guests' gradients that are computed, and sent home, together


class DispatchTokens(torch.autograd.Function):
    """Tokens set off; backward, their gradients and those of their weights have come back."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_N: Tensor, context: LayerContext) -> Tensor:
        """Start the dispatch of x_TD. Returns an empty tensor that ties `ExpertsCombine` to this node."""
        ctx.context = context
        context.tokens.put(TokenDispatch(context.tables, x_TD))
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Wait for the gradients of x_TD and weight_N."""
        context: LayerContext = ctx.context
        ctx.context = None  # whoever holds a statistic of the layer holds this node, but nothing big with it
        gradients, clock = context.gradients.take(), context.clock
        with clock.backward("combine"):
            with clock.backward("wait_combine"):
                gradients.tokens.wait()
            return gradients.tokens.finish(), context.tables.finish_returning(gradients.weights), None


def receive_rows(context: LayerContext, tokens: TokenDispatch, chunk: int, rows_MD: Tensor) -> None:
    """Wait for a chunk of the tokens of the forward; write its rows to their place in `rows_MD` [M, D]."""
    with context.clock.phase("dispatch"):
        with context.clock.phase("wait_dispatch"):
            tokens.wait(chunk)
        _gather_rows(context, tokens, chunk, rows_MD)


def receive_gradients(context: LayerContext, tokens: TokenDispatch, chunk: int, grad_MD: Tensor) -> None:
    """Wait for a chunk of the sums' gradients; write those of its rows, before their weights, to `grad_MD` [M, D]."""
    with context.clock.backward("dispatch"):
        with context.clock.backward("wait_dispatch"):
            tokens.wait(chunk)
        _gather_rows(context, tokens, chunk, grad_MD)


def _gather_rows(context: LayerContext, tokens: TokenDispatch, chunk: int, out_MD: Tensor) -> None:
    part = context.tables.find_rows(chunk)
    torch.index_select(tokens.pool_PD, 0, context.tables.pool_M[part], out=out_MD[part])
    if chunk == context.chunks[-1]:
        tokens.drop_pool()


def combine_chunk(context: LayerContext, sums: SumCombine, chunk: int) -> None:
    """Begin to send a chunk of the experts' outputs home."""
    with context.clock.phase("combine"):
        sums.start(chunk)


def finish_combine(context: LayerContext, sums: SumCombine) -> Tensor:
    """Wait for the experts' outputs. Returns [T, D], the weighted sums."""
    with context.clock.phase("combine"):
        sums.sum_own()
        with context.clock.phase("wait_combine"):
            sums.wait()
        return sums.finish()


def send_home(context: LayerContext, sums: SumCombine, chunk: int, grad_weight_M: Tensor) -> None:
    """Set off the gradients of a chunk's rows, and with the last ones those of all weights.

    `DispatchTokens` waits for them.
    """
    with context.clock.backward("combine"):
        if chunk < context.chunks[-1]:
            sums.start(chunk)
            return
        weights = context.tables.start_returning(grad_weight_M)
        sums.start(chunk)
        sums.sum_own()
        context.gradients.put(Gradients(sums, weights))


class ExpertsCombine(torch.autograd.Function):
    """The rows' way through the experts, and home again."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, context: LayerContext, *own: Tensor) -> Tensor:
        """Return [T, D], the weighted sums. `own`: gate_up [S, 2H, D] and down [S, D, H] of the experts whose home is
        here, then their adapters, where `context.update` has them.

        `ticket`: what `DispatchTokens` returned.
        """
        tables, clock, kernels, update = context.tables, context.clock, context.kernels, context.update
        loan, tokens = context.loan.take(), context.tokens.take()
        pool_PD = None if context.keep_hidden else tokens.pool_PD
        rows_MD = own[0].new_empty(len(tables.pool_M), own[0].shape[2])
        width, keep = own[0].shape[1], context.keeps_hidden
        gate_up_MH2 = rows_MD.new_empty(len(rows_MD) if keep else 0, width)
        out_MD = torch.empty_like(rows_MD)
        sums = SumCombine(tables, out_MD, tables.weight_M)
        guests: Weights = ()
        for chunk in context.chunks:
            receive_rows(context, tokens, chunk, rows_MD)
            if chunk == 0:
                with clock.phase("lend"):
                    loan.relay()
            for of_guests in (False, True):
                if of_guests and chunk == 0:
                    with clock.phase("lend"):
                        guests = loan.finish(own)
                weights: Weights = guests if of_guests else own
                with clock.phase("experts"):
                    for rows, sizes in context.cut_pieces(of_guests, chunk):
                        part = gate_up_MH2[rows] if keep else rows_MD.new_empty(sum(sizes), width)
                        kernels.segment_mm(rows_MD[rows], weights[0], sizes, part, transpose=True)
                        update.add_product(kernels, 0, rows_MD[rows], weights, sizes, part)
                        hidden_QH = kernels.swiglu(part)
                        kernels.segment_mm(hidden_QH, weights[1], sizes, out_MD[rows], transpose=True)
                        update.add_product(kernels, 1, hidden_QH, weights, sizes, out_MD[rows])
            combine_chunk(context, sums, chunk)
        ctx.context = context
        ctx.save_for_backward(rows_MD if pool_PD is None else pool_PD.detach(), gate_up_MH2, *own)
        del rows_MD, pool_PD
        return finish_combine(context, sums)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:
        """Return the gradients of what trains of `own`; leave those of the tokens to `DispatchTokens`."""
        kept, gate_up_MH2, *own = ctx.saved_tensors
        context: LayerContext = ctx.context
        ctx.context = None
        tables, clock = context.tables, context.clock
        with clock.backward("lend"):
            loan = context.start_loan(own)  # those that did not stay
        with clock.backward("dispatch"):
            tokens = TokenDispatch(tables, grad_TD)
        rows_MD = kept if context.keep_hidden else kept.index_select(0, tables.pool_M)
        found = _compute_backward(context, loan, tokens, rows_MD, gate_up_MH2, tuple(own))
        torch.autograd.graph.increment_version(gate_up_MH2)  # a second backward has to fail
        grads = return_guests(context, found)
        context.residents.end_backward(context.step.is_final)
        context.step.end_pass()
        return None, None, *context.update.fill_in(grads, len(own))


class ParameterGradients(NamedTuple):
    """Gradients of home and guest experts: complete, or waiting as products until the rows' are on their way."""

    grads: list[Tensor]  # [S, ...] each, of each matrix; not filled in where products wait
    guest_grads: PackedGradients | None  # None where products wait
    waiting: dict[bool, Any]  # `WaitingProducts` of the home slots (False) and of the guests (True)


def _compute_backward(
    context: LayerContext,
    loan: GuestLoan,
    tokens: TokenDispatch,
    rows_MD: Tensor,
    gate_up_MH2: Tensor,
    own: tuple[Tensor, ...],
) -> ParameterGradients:
    """Run the rows backward through the experts here, home and guest, and send their gradients home.

    `tokens`: the sums' gradients on their way here. Returns the gradients of the parameters.
    """
    clock, kernels, weight_M = context.clock, context.kernels, context.tables.weight_M
    keep, is_one_piece, update = context.keeps_hidden, context.is_one_piece, context.update
    grads = [torch.empty_like(w) if is_one_piece else torch.zeros_like(w) for w in update.select_trained(own)]
    guest_grads = (
        None if is_one_piece or not grads else PackedGradients(len(context.guests_here), grads, context.ep).fill_zero()
    )
    grad_MD, back_MD = torch.empty_like(rows_MD), torch.empty_like(rows_MD)
    grad_weight_M, sums = weight_M.new_empty(len(rows_MD)), SumCombine(context.tables, back_MD, None)
    waiting: dict[bool, list[WeightProducts]] = {False: [], True: []}
    order = (False, True) if loan.is_under_way else (True, False)
    guests: Weights = ()
    for chunk in context.chunks:
        receive_gradients(context, tokens, chunk, grad_MD)
        if chunk == 0:
            with clock.backward("lend"):
                loan.relay()
        for of_guests in order:
            if of_guests and chunk == 0:
                with clock.backward("lend"):
                    guests = loan.finish(own)
            weights: Weights = guests if of_guests else own
            with clock.backward("experts"):
                for rows, sizes in context.cut_pieces(of_guests, chunk):
                    part_QH2 = gate_up_MH2[rows] if keep else rows_MD.new_empty(sum(sizes), own[0].shape[1])
                    if not keep:
                        kernels.segment_mm(rows_MD[rows], weights[0], sizes, part_QH2, transpose=True)
                        update.add_product(kernels, 0, rows_MD[rows], weights, sizes, part_QH2)
                    hidden_QH = rows_MD.new_empty(sum(sizes), own[1].shape[2])  # its gradient first
                    kernels.segment_mm(grad_MD[rows], weights[1], sizes, hidden_QH, transpose=False)
                    low_down = update.add_backward(kernels, 1, grad_MD[rows], weights, sizes, hidden_QH)
                    grad_weight_M[rows] = kernels.swiglu_backward(part_QH2, hidden_QH, weight_M[rows])
                    kernels.segment_mm(part_QH2, weights[0], sizes, back_MD[rows], transpose=False)
                    low_up = update.add_backward(kernels, 0, part_QH2, weights, sizes, back_MD[rows])
                    pairs = [(part_QH2, rows_MD[rows]), (grad_MD[rows], hidden_QH)]
                    products = choose_products(context, pairs, (low_up, low_down), weights, sizes)
                    if is_one_piece:
                        waiting[of_guests].append(products)
                    elif guest_grads is not None:
                        products.write(guest_grads.matrices if of_guests else grads, add=True)
        send_home(context, sums, chunk, grad_weight_M)
    if context.step.is_final:  # no product with the guests' weights is left
        context.residents.weights.clear()
    return ParameterGradients(grads, guest_grads, join_chunks(context, waiting) if is_one_piece else {})


def return_guests(context: LayerContext, found: ParameterGradients) -> list[Tensor]:
    """Send the guests' gradients home in batches, and add those that come. Returns the gradients of the own experts."""
    clock, ep, grads, waiting = context.clock, context.ep, found.grads, found.waiting
    if not grads:
        return []
    here, first = context.guests_here, context.first_expert
    leaving = context.residents.list_leaving(context.plan, context.home, context.step.is_final)
    overwritten = _list_overwritten(context, leaving) if context.is_one_piece else set()
    at_a_time = max(1, GRADIENT_BYTES // (packed_size(grads) * grads[0].element_size()))
    returning: Returning | None = None
    for batch in batch_guests(context.plan, leaving, at_a_time):
        slots = slice(*np.searchsorted(here, [batch[0], batch[-1] + 1]).tolist())
        with clock.backward("experts"):
            if found.guest_grads is None:
                packed = PackedGradients(slots.stop - slots.start, grads, ep)
                waiting[True].select(slots).write(packed.matrices)
                grads_GW = packed.packed_GW
            else:
                grads_GW = found.guest_grads.packed_GW[slots]
        with clock.backward("lend"):
            if returning is not None:
                returning.finish(grads, first, overwritten)
            of_batch = dict(zip(here[slots], grads_GW, strict=True))
            returning = start_returning(of_batch, grads_GW, batch, leaving, context.residents, ep)
        if False in waiting:  # while the first are under way
            with clock.backward("experts"):
                grads = waiting.pop(False).fill(grads, without=overwritten)
    if False in waiting:
        with clock.backward("experts"):
            grads = waiting.pop(False).fill(grads)
    if returning is not None:
        with clock.backward("lend"):
            returning.finish(grads, first, overwritten)
    return grads


def _list_overwritten(context: LayerContext, leaving: Sequence[Copy]) -> set[int]:
    """Return own slots without rows whose gradients come home with this backward: all there is of them."""
    own = {expert - context.first_expert for expert, home, _ in leaving if home == context.ep.rank}
    return {slot for slot in own if not context.tables.slot_rows[slot]}


dispatch_tokens: Callable[..., Tensor] = DispatchTokens.apply
combine_experts: Callable[..., Tensor] = ExpertsCombine.apply
