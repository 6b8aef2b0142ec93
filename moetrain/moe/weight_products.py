"""What the gradients of weights are made of, until the rows' own gradients are on their way.

Rows of several chunks stand chunk by chunk. The sums of the weights' gradients run over all rows of a slot in the order
that they have in a single chunk, so that they are the same, bit for bit, whatever the number of chunks.

M rows computed here, S slots, K chunks, Q rows of a chunk of some slots.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, Self, cast

import numpy as np
import torch
from torch import Tensor

from moetrain.moe.adapters import Weights
from moetrain.moe.context import LayerContext
from moetrain.moe.kernels.api import Backend
from moetrain.moe.kernels.reference import Matrices

GATHERED_BYTES = 32 << 20  # of rows that are brought in order together


class SlotOrder(NamedTuple):
    """How the rows of some slots are brought from an order by chunk, then slot, to one by slot."""

    sizes: list[list[int]]  # [K][S]
    places: list[Tensor]  # [K] of [Q]: where each row goes

    @classmethod
    def find(cls, context: LayerContext, of_guests: bool) -> "SlotOrder":
        """Return that of the home slots, or of the guests."""
        tables = context.tables
        assert tables.slotwise_M is not None
        place_M = torch.empty_like(tables.slotwise_M)
        place_M[tables.slotwise_M] = torch.arange(len(place_M), device=place_M.device)
        places = list(place_M.split([sum(sizes) for sizes in tables.chunk_rows]))
        return cls(tables.chunk_rows, places).select(context.find_slots(of_guests))

    @property
    def slot_sizes(self) -> list[int]:
        """[S] rows of each slot in all chunks."""
        return [sum(sizes) for sizes in zip(*self.sizes, strict=True)]

    def select(self, slots: slice) -> "SlotOrder":
        """Return that of some of the slots."""
        begin, end, _ = slots.indices(len(self.sizes[0]))
        before = sum(self.slot_sizes[:begin])
        places = []
        for sizes, place_Q in zip(self.sizes, self.places, strict=True):
            first = sum(sizes[:begin])
            places.append(place_Q[first : first + sum(sizes[begin:end])] - before)
        return SlotOrder([sizes[begin:end] for sizes in self.sizes], places)

    def gather(self, parts: Iterable[Tensor]) -> Tensor:
        """Return the rows of all chunks, [Q, ...] each, slot by slot."""
        parts = list(parts)
        out = parts[0].new_empty(sum(len(part) for part in parts), *parts[0].shape[1:])
        for place_Q, part in zip(self.places, parts, strict=True):
            out.index_copy_(0, place_Q, part)
        return out


class ProductsOfRows(Protocol):
    """What gradients of some rows are made of: `WeightProducts`, or a family's own."""

    @property
    def row_bytes(self) -> int:
        """Bytes of what is kept of a row."""

    @classmethod
    def join(cls, chunks: Sequence[Self], order: SlotOrder) -> Self:
        """Return those of all chunks together."""

    def select(self, slots: slice) -> Self:
        """Return those of some of the slots."""

    def write(self, totals: Sequence[Matrices], *, without: Collection[int] = ()) -> None:
        """Write the gradients of the slots to `totals`."""


class WeightProducts(NamedTuple):
    """What a piece's weight gradients are made of: Σ leftᵀ · right over the rows of each slot, for each matrix."""

    pairs: Sequence[tuple[Tensor, Tensor]]
    sizes: list[int]
    kernels: Backend

    @property
    def row_bytes(self) -> int:
        """Bytes of what is kept of a row."""
        return sum(each.shape[1] * each.element_size() for pair in self.pairs for each in pair)

    @classmethod
    def join(cls, chunks: Sequence["WeightProducts"], order: SlotOrder) -> "WeightProducts":
        """Return those of all chunks together, their rows copied."""
        first = chunks[0]
        pairs = [
            (order.gather(one.pairs[n][0] for one in chunks), order.gather(one.pairs[n][1] for one in chunks))
            for n in range(len(first.pairs))
        ]
        return first._replace(pairs=pairs, sizes=order.slot_sizes)

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


class ChunkedProducts(NamedTuple):
    """Those of several chunks: rows are brought in order when gradients are formed, those of some slots at a time."""

    chunks: Sequence[ProductsOfRows]
    order: SlotOrder

    def select(self, slots: slice) -> "ChunkedProducts":
        """Return those of some of the slots."""
        return ChunkedProducts([chunk.select(slots) for chunk in self.chunks], self.order.select(slots))

    def _cut_slots(self) -> Iterator[slice]:
        """Yield slots whose rows have `GATHERED_BYTES` together, or one slot."""
        sizes, row_bytes = self.order.slot_sizes, self.chunks[0].row_bytes
        begin = 0
        while begin < len(sizes):
            end, rows = begin + 1, sizes[begin]
            while end < len(sizes) and (rows + sizes[end]) * row_bytes <= GATHERED_BYTES:
                rows += sizes[end]
                end += 1
            yield slice(begin, end)
            begin = end

    def write(self, totals: Sequence[Matrices], *, without: Collection[int] = ()) -> None:
        """Write to `totals`. `without`: slots that have no rows, and whose totals are left as they are."""
        for slots in self._cut_slots():
            some = self.select(slots)
            joined = type(self.chunks[0]).join(some.chunks, some.order)
            joined.write([total[slots] for total in totals], without=[s - slots.start for s in without])

    def fill(self, totals: Sequence[Tensor], without: Collection[int] = ()) -> list[Tensor]:
        """Return `totals`, written to."""
        self.write(totals, without=without)
        return list(totals)


def join_chunks(
    context: LayerContext, found: Mapping[bool, Sequence[ProductsOfRows]]
) -> dict[bool, ProductsOfRows | ChunkedProducts]:
    """Return what gradients wait as, of the home slots (False) and of the guests (True); `found`: chunk by chunk."""
    if context.tables.num_chunks == 1:
        return {of_guests: chunks[0] for of_guests, chunks in found.items()}
    return {
        of_guests: ChunkedProducts(chunks, SlotOrder.find(context, of_guests)) for of_guests, chunks in found.items()
    }


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
