"""The two autograd nodes of an MoE layer: tokens are dispatched, and experts compute and combine.

What is computed between the two (shared experts) runs while rows are under way. Backward, `ExpertsCombine` has the
rows' gradients on their way home before it computes the weights' gradients (unless rows come in pieces), and
`DispatchTokens` waits for them at the end.

T tokens here, D width, H expert hidden width, N selections here, M rows computed here, Q of them at a time, S slots
here, G guests here, W parameters of an expert.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from moetrain.moe.context import Gradients, LayerContext
from moetrain.moe.exchange.guests import Copy, PackedGradients, Returning, packed_size
from moetrain.moe.exchange.residents import GuestLoan, Weights, batch_guests, start_returning
from moetrain.moe.kernels.api import Backend
from moetrain.moe.kernels.reference import Matrices

GRADIENT_BYTES = 8 << 20  # of guests' gradients that are computed, and sent home, together


class DispatchTokens(torch.autograd.Function):
    """Tokens set off; backward, their gradients and those of their weights have come back."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_N: Tensor, context: LayerContext) -> Tensor:
        """Start the dispatch of x_TD. Returns an empty tensor that ties `ExpertsCombine` to this node."""
        ctx.context = context
        context.tokens.put(context.tables.start_dispatch(x_TD))
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Wait for the gradients of x_TD and weight_N."""
        context: LayerContext = ctx.context
        ctx.context = None  # whoever holds a statistic of the layer holds this node, but nothing big with it
        gradients, clock = context.gradients.take(), context.clock
        with clock.backward("combine"):
            with clock.backward("wait_combine"):
                gradients.tokens.pending.wait()
            grad_TD = context.tables.finish_combine(gradients.tokens)
            return grad_TD, context.tables.finish_returning(gradients.weights), None


def receive_tokens(context: LayerContext) -> Tensor:
    """Wait for the dispatch of the forward. Returns the tokens that came, as the tables number them."""
    tokens = context.tokens.take()
    with context.clock.phase("wait_dispatch"):
        tokens.pending.wait()
    return tokens.pool_PD


def combine_rows(context: LayerContext, out_MD: Tensor) -> Tensor:
    """Send the experts' outputs home. Returns [T, D], the weighted sums."""
    tables, clock = context.tables, context.clock
    with clock.phase("combine"):
        sums = tables.start_combine(out_MD, tables.weight_M)
        with clock.phase("wait_combine"):
            sums.pending.wait()
        return tables.finish_combine(sums)


def receive_gradients(context: LayerContext, grad_TD: Tensor) -> Tensor:
    """Dispatch the gradients of the sums. Returns those of the rows here, before their weights [M, D]."""
    tables, clock = context.tables, context.clock
    with clock.backward("dispatch"):
        tokens = tables.start_dispatch(grad_TD)
        with clock.backward("wait_dispatch"):
            tokens.pending.wait()
        return tokens.pool_PD.index_select(0, tables.pool_M)


def start_sending_home(context: LayerContext, back_MD: Tensor, grad_weight_M: Tensor) -> None:
    """Set off the gradients of the rows and of their weights, for which `DispatchTokens` waits."""
    with context.clock.backward("combine"):
        weights = context.tables.start_returning(grad_weight_M)
        context.gradients.put(Gradients(context.tables.start_combine(back_MD, None), weights))


class ExpertsCombine(torch.autograd.Function):
    """The rows' way through the experts, and home again."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, context: LayerContext, *own: Tensor) -> Tensor:
        """Return [T, D], the weighted sums. `own`: gate_up [S, 2H, D] and down [S, D, H] of the experts whose home is
        here, then their adapters, where `context.update` has them.

        `ticket`: what `DispatchTokens` returned.
        """
        tables, clock, kernels, update = context.tables, context.clock, context.kernels, context.update
        loan = context.loan.take()
        with clock.phase("dispatch"):
            pool_PD = receive_tokens(context)
            rows_MD = pool_PD.index_select(0, tables.pool_M)
            kept = rows_MD if context.keep_hidden else pool_PD.detach()
            del pool_PD
        with clock.phase("lend"):
            loan.relay()
        width, keep = own[0].shape[1], context.keeps_hidden
        gate_up_MH2 = rows_MD.new_empty(len(rows_MD) if keep else 0, width)
        out_MD = torch.empty_like(rows_MD)
        for of_guests in (False, True):
            with clock.phase("lend"):
                weights: Weights = loan.finish(own) if of_guests else own
            with clock.phase("experts"):
                for rows, sizes in context.cut_pieces(of_guests):
                    part = gate_up_MH2[rows] if keep else rows_MD.new_empty(sum(sizes), width)
                    kernels.segment_mm(rows_MD[rows], weights[0], sizes, part, transpose=True)
                    update.add_product(kernels, 0, rows_MD[rows], weights, sizes, part)
                    hidden_QH = kernels.swiglu(part)
                    kernels.segment_mm(hidden_QH, weights[1], sizes, out_MD[rows], transpose=True)
                    update.add_product(kernels, 1, hidden_QH, weights, sizes, out_MD[rows])
        ctx.context = context
        ctx.save_for_backward(kept, gate_up_MH2, *own)
        return combine_rows(context, out_MD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:
        """Return the gradients of what trains of `own`; leave those of the tokens to `DispatchTokens`."""
        kept, gate_up_MH2, *own = ctx.saved_tensors
        context: LayerContext = ctx.context
        ctx.context = None
        tables, clock = context.tables, context.clock
        with clock.backward("lend"):
            loan = context.start_loan(own)  # those that did not stay
        grad_MD = receive_gradients(context, grad_TD)
        with clock.backward("lend"):
            loan.relay()
        rows_MD = kept if context.keep_hidden else kept.index_select(0, tables.pool_M)
        back_MD, grad_weight_M, found = _compute_rows(context, loan, rows_MD, gate_up_MH2, grad_MD, tuple(own))
        torch.autograd.graph.increment_version(gate_up_MH2)  # a second backward has to fail
        start_sending_home(context, back_MD, grad_weight_M)
        del back_MD
        grads = return_guests(context, found)
        context.residents.end_backward(context.step.is_final)
        context.step.end_pass()
        return None, None, *context.update.fill_in(grads, len(own))


class WeightProducts(NamedTuple):
    """What a piece's weight gradients are made of: Σ leftᵀ · right over the rows of each slot, for each matrix."""

    pairs: Sequence[tuple[Tensor, Tensor]]
    sizes: list[int]
    kernels: Backend

    def select(self, slots: slice) -> "WeightProducts":
        """Return those of some of the slots."""
        ends = np.cumsum([0, *self.sizes])
        rows = slice(ends[slots.start], ends[slots.stop])
        return self._replace(pairs=[(left[rows], right[rows]) for left, right in self.pairs], sizes=self.sizes[slots])

    def write(self, totals: Sequence[Matrices], add: bool = False, without: Collection[int] = ()) -> None:
        """Write or add to `totals`. `without`: slots that have no rows, and whose totals are left as they are."""
        there = [s for s in range(len(self.sizes)) if s not in without]
        sizes = [self.sizes[s] for s in there]
        for (left_MA, right_MB), total in zip(self.pairs, totals, strict=True):
            out = total if add and not without else [total[s] for s in there]  # not one that might be replaced
            self.kernels.segment_outer(left_MA, right_MB, sizes, out, add)

    def fill(self, totals: Sequence[Tensor], without: Collection[int] = ()) -> list[Tensor]:
        """Return `totals` written to, or what stands in their place."""
        if without:
            self.write(totals, without=without)
            return list(totals)
        outer = self.kernels.segment_outer
        found = (outer(*pair, self.sizes, total, False) for pair, total in zip(self.pairs, totals, strict=True))
        return [cast(Tensor, one) for one in found]


class ParameterGradients(NamedTuple):
    """Gradients of home and guest experts: complete, or waiting as products until the rows' are on their way."""

    grads: list[Tensor]  # [S, ...] each, of each matrix; not filled in where products wait
    guest_grads: PackedGradients | None  # None where products wait
    waiting: dict[bool, WeightProducts]  # of the home slots (False) and of the guests (True)


def _compute_rows(
    context: LayerContext,
    loan: GuestLoan,
    rows_MD: Tensor,
    gate_up_MH2: Tensor,
    grad_MD: Tensor,
    own: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, ParameterGradients]:
    """Run the rows backward through the experts here, home and guest.

    Returns the gradients of the rows [M, D], those of their weights [M], and those of the parameters.
    """
    clock, kernels, weight_M = context.clock, context.kernels, context.tables.weight_M
    keep, is_one_piece, update = context.keeps_hidden, context.is_one_piece, context.update
    grads = [torch.empty_like(w) if is_one_piece else torch.zeros_like(w) for w in update.select_trained(own)]
    guest_grads = (
        None if is_one_piece or not grads else PackedGradients(len(context.guests_here), grads, context.ep).fill_zero()
    )
    back_MD, grad_weight_M = torch.empty_like(rows_MD), weight_M.new_empty(len(rows_MD))
    waiting: dict[bool, WeightProducts] = {}
    for of_guests in (False, True) if loan.is_under_way else (True, False):
        with clock.backward("lend"):
            weights: Weights = loan.finish(own) if of_guests else own
        with clock.backward("experts"):
            for rows, sizes in context.cut_pieces(of_guests):
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
                    waiting[of_guests] = products
                elif guest_grads is not None:
                    products.write(guest_grads.matrices if of_guests else grads, add=True)
        if of_guests:
            del weights
            if context.step.is_final:  # no product with the guests' weights is left
                context.residents.weights.clear()
    return back_MD, grad_weight_M, ParameterGradients(grads, guest_grads, waiting)


def choose_products(
    context: LayerContext,
    pairs: Sequence[tuple[Tensor, Tensor]],
    low_grads: Sequence[Tensor | None],
    weights: Weights,
    sizes: list[int],
) -> WeightProducts:
    """Return what the gradients of the tensors that train are made of: of the matrices, or of their adapters.

    `pairs`: (gradient, rows) of either product; `low_grads`: what `LowRankUpdate.add_backward` gave of these gradients.
    """
    kernels, update = context.kernels, context.update
    if update.trains_base:
        return WeightProducts(pairs, sizes, kernels)
    found = [
        pair
        for product, (low_grad, (grad, rows)) in enumerate(zip(low_grads, pairs, strict=True))
        for pair in update.list_pairs(kernels, product, low_grad, grad, rows, weights, sizes)
    ]
    rank = found[0][0].shape[1] if found else 0
    return WeightProducts(found, sizes, update.choose_kernels(kernels, rank))


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
