"""Low-rank adapters of experts (LoRA, Hu et al. 2021, Eq. 3): x Wᵀ + s (x Aᵀ) Bᵀ, while W stays as it is.

The sum W + s B A is never made, and no gradient of W is computed: of a guest, weights and adapters travel to it and the
gradients of the adapters alone come home. An expert has a pair (A, B) for either of its two products, or for one, or
for none; or all experts of a layer share one.

M rows computed here, S slots here, r the rank of the adapters; a product maps a width I to a width O.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moetrain.moe.kernels.api import Backend
from moetrain.moe.kernels.reference import GroupedProducts, LoopedProducts, Matrices
from moetrain.moe.routing.base import Replicated

SUFFIXES = ("lora_A", "lora_B")
GROUPED_RANK = 8  # grouped products take rows of 16 bytes, in bf16
Weights = tuple[Matrices, ...]


def is_adapter(name: str) -> bool:
    """Tell whether a parameter of this name belongs to an adapter."""
    return name.endswith(SUFFIXES)


@dataclass
class AdapterSwitch:
    """Whether the adapters of a model take part in its forwards."""

    is_on: bool = True


class SharedAdapters(Replicated):
    """The pairs that all experts of a layer share, whole on every rank."""


@dataclass(frozen=True)
class LowRankUpdate:
    """What one pass through a layer adds to the two products of its experts.

    A pair stands among the tensors of an expert as A [S, r, I] and then B [S, O, r].
    """

    places: tuple[int | None, int | None] = (None, None)  # of A, for each product; None: it has no pair
    scaling: float = 0.0
    trains_base: bool = True  # whether gradients are those of all other tensors, and there are no pairs

    def select_trained(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return those of an expert's tensors that have a gradient."""
        if self.trains_base:
            return list(tensors)
        return [tensor for place in self.places if place is not None for tensor in tensors[place : place + 2]]

    def fill_in(self, grads: Sequence[Tensor], num_tensors: int) -> list[Tensor | None]:
        """Return a gradient or None for each of an expert's tensors; `grads`: of those that `select_trained` chose."""
        if self.trains_base:
            return list(grads)
        return [None] * (num_tensors - len(grads)) + list(grads)

    def add_product(
        self, kernels: Backend, product: int, rows_MI: Tensor, weights: Weights, sizes: list[int], out_MO: Tensor
    ) -> None:
        """Add s (x Aᵀ) Bᵀ to `out_MO`, of the rows of each slot."""
        place = self.places[product]
        if place is not None and self.scaling and len(weights[place]):
            low_Mr = self._multiply(kernels, rows_MI, weights[place], sizes, transpose=True)
            out_MO += self._multiply(kernels, low_Mr * self.scaling, weights[place + 1], sizes, transpose=True)

    def add_backward(
        self, kernels: Backend, product: int, grad_MO: Tensor, weights: Weights, sizes: list[int], back_MI: Tensor
    ) -> Tensor | None:
        """Add the gradient of the rows, s (g B) A, to `back_MI`. Returns s (g B) [M, r]; None for no pair."""
        place = self.places[product]
        if place is None:
            return None
        if not len(weights[place]):
            return grad_MO.new_empty(0, 0)
        low_Mr = self._multiply(kernels, grad_MO, weights[place + 1], sizes, transpose=False).mul_(self.scaling)
        back_MI += self._multiply(kernels, low_Mr, weights[place], sizes, transpose=False)
        return low_Mr

    def list_pairs(
        self,
        kernels: Backend,
        product: int,
        low_grad_Mr: Tensor | None,
        grad_MO: Tensor,
        rows_MI: Tensor,
        weights: Weights,
        sizes: list[int],
    ) -> list[tuple[Tensor, Tensor]]:
        """Return (left, right) of A and of B, whose gradients are Σ leftᵀ right over the rows of a slot.

        `low_grad_Mr`: what `add_backward` gave for these gradients.
        """
        place = self.places[product]
        if place is None or low_grad_Mr is None:
            return []
        if not len(weights[place]):
            return [(low_grad_Mr, rows_MI), (grad_MO, low_grad_Mr)]
        low_Mr = self._multiply(kernels, rows_MI, weights[place], sizes, transpose=True).mul_(self.scaling)
        return [(low_grad_Mr, rows_MI), (grad_MO, low_Mr)]

    def choose_kernels(self, kernels: Backend, rank: int) -> Backend:
        """Return the kernels for products of so small a width."""
        is_grouped = kernels.products is GroupedProducts and rank % GROUPED_RANK == 0
        return kernels if is_grouped else replace(kernels, products=LoopedProducts)

    def _multiply(
        self, kernels: Backend, rows: Tensor, matrices: Matrices, sizes: list[int], transpose: bool
    ) -> Tensor:
        first = matrices[0]
        out = rows.new_empty(len(rows), first.shape[0 if transpose else 1])
        self.choose_kernels(kernels, min(first.shape)).segment_mm(rows, matrices, sizes, out, transpose)
        return out


TRAIN_ALL = LowRankUpdate()


@dataclass(frozen=True)
class ExpertAdapters:
    """The adapters of one layer of experts: parameters NAME_lora_A and NAME_lora_B for a matrix NAME.

    They belong to `owner`: to the module of the experts, [E, r, I] and [E, O, r], with one entry an expert; or to one
    of `SharedAdapters`, [r, I] and [O, r], for all experts.
    """

    owner: nn.Module
    matrices: tuple[str, str]  # the names of the experts' two matrices
    num_base: int  # tensors of an expert without adapters
    scaling: float
    switch: AdapterSwitch

    @classmethod
    def add(
        cls,
        owner: nn.Module,
        base: Sequence[str],
        experts: nn.Module,
        transposed: bool,
        adapted: Sequence[str],
        rank: int,
        scaling: float,
        switch: AdapterSwitch,
    ) -> "ExpertAdapters":
        """Give `owner` the parameters for the matrices `adapted`.

        Arguments:
            base: names of all tensors of an expert in the module `experts`, the two matrices first.
            transposed: whether matrices are [E, I, O], not [E, O, I].
        """
        for name in adapted:
            matrix = experts.get_parameter(name)
            num_experts, wide_out, wide_in = matrix.shape
            if transposed:
                wide_out, wide_in = wide_in, wide_out
            for suffix, shape in zip(SUFFIXES, ((rank, wide_in), (wide_out, rank)), strict=True):
                whole = shape if isinstance(owner, SharedAdapters) else (num_experts, *shape)
                owner.register_parameter(f"{name}_{suffix}", nn.Parameter(matrix.new_empty(whole)))
        return cls(owner, (base[0], base[1]), len(base), scaling, switch)

    @property
    def names(self) -> list[str]:
        """The parameters in their order among the tensors of an expert."""
        there = [name for name in self.matrices if hasattr(self.owner, f"{name}_{SUFFIXES[0]}")]
        return [f"{name}_{suffix}" for name in there for suffix in SUFFIXES]

    @property
    def own_names(self) -> list[str]:
        """Those with one entry an expert."""
        return [] if isinstance(self.owner, SharedAdapters) else self.names

    @property
    def update(self) -> LowRankUpdate:
        """What the next forward adds."""
        names, places = self.names, []
        for matrix in self.matrices:
            first = f"{matrix}_{SUFFIXES[0]}"
            places.append(self.num_base + names.index(first) if first in names else None)
        return LowRankUpdate((places[0], places[1]), self.scaling if self.switch.is_on else 0.0, trains_base=False)

    def list_tensors(self, num_slots: int, dtype: torch.dtype) -> list[Tensor]:
        """Return the pairs of each slot; of shared ones copies, whose gradients add up."""
        found = [getattr(self.owner, name).to(dtype) for name in self.names]
        if isinstance(self.owner, SharedAdapters):
            return [tensor.expand(num_slots, *tensor.shape).contiguous() for tensor in found]
        return found
