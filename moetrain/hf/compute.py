"""Experts of any family on the rows of their slots: grouped products, and autograd through the family's own gate.

`GroupedExperts` stands where `moe.passes` has its SwiGLU. What is between the two products is the family's gate
(`hf.gate`), called once for all rows of the home slots and once for all those of the guests. Guests
carry every tensor of an expert, biases included.

Matrices are [S, out, in], or [S, in, out] where they are transposed; biases are [S, 1, out]. T tokens here, D width, H
hidden width, W width of the first product, M rows computed here, S slots.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetrain.hf.gate import run_gate, run_gate_for_backward
from moetrain.hf.layout import ExpertsLayout
from moetrain.moe.context import LayerContext
from moetrain.moe.exchange.residents import Weights
from moetrain.moe.exchange.transfers import SumCombine, TokenDispatch
from moetrain.moe.kernels.reference import Matrices
from moetrain.moe.passes import (
    ParameterGradients,
    combine_chunk,
    finish_combine,
    receive_gradients,
    receive_rows,
    return_guests,
    send_home,
)
from moetrain.moe.weight_products import SlotOrder, WeightProducts, choose_products, join_chunks


class GroupedExperts(torch.autograd.Function):
    """The rows' way through the experts, and home again."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, context: LayerContext, layout: ExpertsLayout, *parameters: Tensor) -> Tensor:
        """Return [T, D], the weighted sums. `parameters`: the tensors of `layout.names`, their adapters where
        `context.update` has them, then those of its norm.

        `ticket`: what `DispatchTokens` returned.
        """
        clock = context.clock
        own = parameters[: len(parameters) - layout.num_norms]
        loan, tokens = context.loan.take(), context.tokens.take()
        rows_MD = own[0].new_empty(len(context.tables.pool_M), tokens.pool_PD.shape[1])
        first_MW = rows_MD.new_empty(len(rows_MD), own[0].shape[2 if layout.transposed else 1])
        out_MD = torch.empty_like(rows_MD)
        sums = SumCombine(context.tables, out_MD, context.tables.weight_M)
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
                        _project(context, rows_MD[rows], weights, 0, sizes, first_MW[rows], layout)
                        hidden_MH = run_gate(layout.gate, layout.activate, first_MW[rows])
                        _project(context, hidden_MH, weights, 1, sizes, out_MD[rows], layout)
                        if layout.norm is not None:
                            out_MD[rows] = layout.norm(out_MD[rows])
            combine_chunk(context, sums, chunk)
        ctx.context, ctx.layout = context, layout
        ctx.save_for_backward(rows_MD, first_MW, *parameters)
        return finish_combine(context, sums)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:
        """Return the gradients of the parameters; leave those of the tokens to `DispatchTokens`."""
        rows_MD, first_MW, *parameters = ctx.saved_tensors
        context: LayerContext = ctx.context
        layout: ExpertsLayout = ctx.layout
        ctx.context = None
        tables, clock = context.tables, context.clock
        cut = len(parameters) - layout.num_norms
        own, norm = parameters[:cut], parameters[cut:]
        with clock.backward("lend"):
            loan = context.start_loan(own)
        with clock.backward("dispatch"):
            tokens = TokenDispatch(tables, grad_TD)
        grad_MD, back_MD = torch.empty_like(rows_MD), torch.empty_like(rows_MD)
        grad_weight_M, sums = tables.weight_M.new_empty(len(rows_MD)), SumCombine(tables, back_MD, None)
        rows = _Rows(rows_MD, first_MW, grad_MD, tables.weight_M)
        norm_grads = [torch.zeros_like(w) for w in norm if context.update.trains_base]
        found: dict[bool, list[ExpertProducts]] = {False: [], True: []}
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
                weights: Weights = guests if of_guests else tuple(own)
                with clock.backward("experts"):
                    ((part, sizes),) = context.cut_pieces(of_guests, chunk)
                    products, grad_weight_M[part] = _run_backward(
                        context, rows.select(part), weights, sizes, layout, back_MD[part], norm_grads
                    )
                    found[of_guests].append(products)
            send_home(context, sums, chunk, grad_weight_M)
        del weights, guests, back_MD, sums
        if context.step.is_final:  # no product with the guests' weights is left
            context.residents.weights.clear()
        trained = [torch.empty_like(w) for w in context.update.select_trained(own)]
        grads = return_guests(context, ParameterGradients(trained, None, join_chunks(context, found)))
        context.residents.end_backward(context.step.is_final)
        context.step.end_pass()
        of_norm: list[Tensor] | list[None] = norm_grads or [None] * len(norm)
        return None, None, None, *context.update.fill_in(grads, len(own)), *of_norm


class ExpertProducts(NamedTuple):
    """What weight gradients are made of: products for the matrices, sums over a slot's rows for the biases."""

    matrices: WeightProducts
    summed: Sequence[Tensor]  # [M, out] each

    @property
    def row_bytes(self) -> int:
        """Bytes of what is kept of a row."""
        return self.matrices.row_bytes + sum(each.shape[1] * each.element_size() for each in self.summed)

    @classmethod
    def join(cls, chunks: Sequence["ExpertProducts"], order: SlotOrder) -> "ExpertProducts":
        """Return those of all chunks together, their rows copied."""
        summed = [order.gather(one.summed[n] for one in chunks) for n in range(len(chunks[0].summed))]
        return cls(WeightProducts.join([one.matrices for one in chunks], order), summed)

    def select(self, slots: slice) -> "ExpertProducts":
        """Return those of some of the slots."""
        ends = np.cumsum([0, *self.matrices.sizes])
        rows = slice(ends[slots.start], ends[slots.stop])
        return ExpertProducts(self.matrices.select(slots), [each[rows] for each in self.summed])

    def write(self, totals: Sequence[Matrices], without: Collection[int] = ()) -> None:
        """Write to `totals`. `without`: slots that have no rows, and whose totals are left as they are."""
        cut = len(self.matrices.pairs)
        self.matrices.write(totals[:cut], without=without)
        for rows_MB, total in zip(self.summed, totals[cut:], strict=True):
            for slot, part in enumerate(_split(rows_MB, self.matrices.sizes)):
                if slot not in without:
                    torch.sum(part, 0, keepdim=True, out=total[slot])

    def fill(self, totals: Sequence[Tensor], without: Collection[int] = ()) -> list[Tensor]:
        """Return `totals`, written to."""
        self.write(totals, without)
        return list(totals)


class _Rows(NamedTuple):
    rows_MD: Tensor  # what the experts read
    first_MW: Tensor  # their first product, with its bias
    grad_MD: Tensor  # the gradient of the tokens, not weighted
    weight_M: Tensor  # fp32

    def select(self, part: slice) -> "_Rows":
        return _Rows(*(each[part] for each in self))


def _project(
    context: LayerContext,
    rows_MA: Tensor,
    weights: Weights,
    place: int,
    sizes: list[int],
    out_MB: Tensor,
    layout: ExpertsLayout,
) -> None:
    """The first (`place` 0) or the second product of each slot, with its bias."""
    context.kernels.segment_mm(rows_MA, weights[place], sizes, out_MB, transpose=not layout.transposed)
    context.update.add_product(context.kernels, place, rows_MA, weights, sizes, out_MB)
    if layout.has_bias:
        for part, bias in zip(_split(out_MB, sizes), weights[place + 2], strict=True):
            part += bias


def _run_backward(
    context: LayerContext,
    rows: _Rows,
    weights: Weights,
    sizes: list[int],
    layout: ExpertsLayout,
    back_MD: Tensor,
    norm_grads: list[Tensor],
) -> tuple[ExpertProducts, Tensor]:
    """Write the gradient of the rows to `back_MD`, add to that of the norm.

    Returns what the weights' gradients are made of, and the [M] fp32 gradients of the routing weights.
    """
    kernels, update = context.kernels, context.update
    plain_MH, run_gate_backward = run_gate_for_backward(layout.gate, layout.activate, rows.first_MW)
    weight_M1 = rows.weight_M[:, None].to(rows.grad_MD.dtype)
    grad_out_MD, weighted_MD = rows.grad_MD, rows.grad_MD * weight_M1
    grad_MH = torch.empty_like(plain_MH)
    if layout.norm is not None:
        before_MD = torch.empty_like(rows.grad_MD)
        _project(context, plain_MH, weights, 1, sizes, before_MD, layout)
        with torch.enable_grad():
            out_MD = layout.norm(before_MD.requires_grad_())
        grad_weight_M = torch.linalg.vecdot(rows.grad_MD.float(), out_MD.detach().float())
        learned = list(layout.norm.parameters()) if norm_grads else []
        weighted_MD, *found = torch.autograd.grad(out_MD, [before_MD, *learned], weighted_MD)
        for total, part in zip(norm_grads, found, strict=True):
            total += part
        weighted_MD = weighted_MD.contiguous()
        kernels.segment_mm(weighted_MD, weights[1], sizes, grad_MH, transpose=layout.transposed)
        low_down = update.add_backward(kernels, 1, weighted_MD, weights, sizes, grad_MH)
    else:
        kernels.segment_mm(grad_out_MD, weights[1], sizes, grad_MH, transpose=layout.transposed)
        low_down = update.add_backward(kernels, 1, grad_out_MD, weights, sizes, grad_MH)
        grad_weight_M = torch.linalg.vecdot(grad_MH.float(), plain_MH.float())
        if layout.has_bias:
            for total_M, part, bias in zip(
                _split(grad_weight_M, sizes), _split(grad_out_MD, sizes), weights[3], strict=True
            ):
                total_M += part.float() @ bias.view(-1).float()
        grad_MH *= weight_M1
        if low_down is not None:
            low_down *= weight_M1
    grad_first_MW = run_gate_backward(grad_MH).contiguous()
    kernels.segment_mm(grad_first_MW, weights[0], sizes, back_MD, transpose=layout.transposed)
    low_first = update.add_backward(kernels, 0, grad_first_MW, weights, sizes, back_MD)
    pairs = [(grad_first_MW, rows.rows_MD), (weighted_MD, plain_MH)]
    if layout.transposed and update.trains_base:
        pairs = [(right, left) for left, right in pairs]
    products = choose_products(context, pairs, (low_first, low_down), weights, sizes)
    summed = [grad_first_MW, weighted_MD] if layout.has_bias and update.trains_base else []
    return ExpertProducts(products, summed), grad_weight_M


def _split(rows: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """Cut the rows into segments; none where there is no slot, for which torch returns one."""
    return rows.split(sizes) if sizes else ()
