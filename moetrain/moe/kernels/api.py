"""The arithmetic of the experts: which kernels compute it, chosen once for a device, a dtype and a layer's matrices.

`KernelChoice` says which kernels may be used, as calibration found them (`Costs.kernels`); `choose` makes a `Backend`
of it. The sums, the SwiGLU and the cross entropy come from one of three modules, in one pass over memory each where it
is not torch (`cpu_fused`, `triton_fused`, `reference`); the grouped products from `cpu_gemm`, `triton_products` or
torch.

All sums run in fp32 and in a fixed order.

M rows, D width, H expert hidden width, S slots, B bags, T tokens, V vocabulary.
"""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from moetrain.moe.kernels import cpu_fused, cpu_gemm, reference
from moetrain.moe.kernels.bags import Bags
from moetrain.moe.kernels.fp8 import Fp8Products
from moetrain.moe.kernels.reference import GroupedProducts, LoopedProducts, Matrices, ProductKernels, has_grouped_mm
from moetrain.moe.kernels.tables import IndexTables, TorchTables, Travel

BACKENDS = ("torch", "numba", "triton")  # of the sums, the SwiGLU and the cross entropy
PARTS = ("sums", "swiglu", "products")  # for which there are kernels of our own beside torch's
PADDED_ROWS = 16


class FusedKernels(Protocol):
    """The sums and what is computed element by element; the modules of BACKENDS have these functions."""

    def sum_rows(self, rows_MD: Tensor, weight_M: Tensor | None, bags: Bags, own_BD: Tensor | None) -> Tensor: ...

    def swiglu(self, gate_up_MH2: Tensor) -> Tensor: ...

    def swiglu_backward(self, gate_up_MH2: Tensor, grad_MH: Tensor, weight_M: Tensor) -> Tensor: ...

    def cross_entropy(self, logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]: ...

    def cross_entropy_backward(self, logits_TV: Tensor, target_T: Tensor, lse_T: Tensor, grad_T: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Backend:
    """The kernels of one layer. Tensors have the device and the dtype that it was chosen for, rows side by side."""

    sums: FusedKernels
    pointwise: FusedKernels  # the SwiGLU and the cross entropy
    products: ProductKernels
    tables: Callable[[Travel, torch.device], IndexTables]  # makes those of a dispatch
    row_step: int  # rows of a segment are padded to a multiple of this

    def has_own(self, part: str) -> bool:
        """Tell whether kernels of our own compute this one of PARTS."""
        if part == "products":
            return self.products not in (LoopedProducts, GroupedProducts)
        return (self.sums if part == "sums" else self.pointwise) is not reference

    @property
    def has_fused_cross_entropy(self) -> bool:
        """Whether it takes logits in their own dtype as they are, so that no fp32 copies of them are made."""
        return self.pointwise is not reference

    def sum_rows(self, rows_MD: Tensor, weight_M: Tensor | None, bags: Bags, own_BD: Tensor | None = None) -> Tensor:
        """Return [B, D] in the dtype of the rows: each bag's own row, if there are any, plus the sum of its rows.

        The rows of a bag are multiplied by `weight_M` (fp32) and added one after another in fp32.
        """
        return self.sums.sum_rows(rows_MD, weight_M, bags, own_BD)

    def swiglu(self, gate_up_MH2: Tensor) -> Tensor:
        """Return [M, H]: silu(gate) · up."""
        return self.pointwise.swiglu(gate_up_MH2)

    def swiglu_backward(self, gate_up_MH2: Tensor, grad_MH: Tensor, weight_M: Tensor) -> Tensor:
        """Compute the backward of rows that are weighted later, in place.

        With h = silu(gate) · up and `grad_MH` the gradient of h for weight one: returns [M] fp32 Σ grad · h, the
        gradient of the weights; `gate_up_MH2` becomes its own gradient, and `grad_MH` becomes weight · h.
        """
        return self.pointwise.swiglu_backward(gate_up_MH2, grad_MH, weight_M)

    def cross_entropy(self, logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
        """Return fp32 nats [T], -log softmax(logits)[target], and log Σ exp(logits) [T]."""
        return self.pointwise.cross_entropy(logits_TV, target_T)

    def cross_entropy_backward(self, logits_TV: Tensor, target_T: Tensor, lse_T: Tensor, grad_T: Tensor) -> Tensor:
        """Return [T, V], the gradient of the logits in their dtype; on a GPU it may take their place.

        `lse_T`: log Σ exp(logits), as `cross_entropy` gave it; `grad_T`: the gradient of the nats.
        """
        return self.pointwise.cross_entropy_backward(logits_TV, target_T, lse_T, grad_T)

    def segment_mm(self, rows_MA: Tensor, weights: Matrices, sizes: list[int], out_MB: Tensor, transpose: bool) -> None:
        """Write to `out_MB` the rows of each segment times its weight, [A, B], or [B, A] if `transpose`."""
        self.products.segment_mm(rows_MA, weights, sizes, out_MB, transpose)

    def segment_outer(
        self, left_MA: Tensor, right_MB: Tensor, sizes: list[int], out_SAB: Matrices, add: bool
    ) -> Matrices:
        """Write, or add, leftᵀ · right over the rows of each segment to `out_SAB`: weight gradients.

        Returns `out_SAB`, or in its place, if that is one tensor and is not added to, another that spared a copy.
        """
        return self.products.segment_outer(left_MA, right_MB, sizes, out_SAB, add)


@dataclass(frozen=True)
class KernelChoice:
    """Which kernels may compute."""

    backend: str | None = None  # one of BACKENDS; None: the fastest that the device has, but for what is left to torch
    left_to_torch: frozenset[str] = field(default_factory=frozenset)  # those of PARTS that torch computes faster
    is_fp8: bool = False  # whether experts' products are in FP8 (`fp8`)

    def choose(self, device: torch.device, dtype: torch.dtype, matrices: Iterable[Matrices] = ()) -> Backend:
        """Return the kernels for tensors of this device and dtype; `matrices`: those that are multiplied with."""
        fused = self._find_fused(device, dtype)
        left = self.left_to_torch if self.backend is None else frozenset()
        products: ProductKernels = LoopedProducts
        if self.has_own_products(*matrices):
            products = cpu_gemm
        elif self._may_use_triton(*matrices) and (triton := find_products(device, dtype)) is not None:
            products = triton
        elif use_grouped_mm(device, dtype):
            products = GroupedProducts
        if self.is_fp8:
            products = Fp8Products(products)
        return Backend(
            sums=reference if "sums" in left else fused,
            pointwise=reference if "swiglu" in left else fused,
            products=products,
            tables=TorchTables if fused in (reference, cpu_fused) else import_triton_tables(),
            row_step=self._find_row_step(device, dtype),
        )

    def has_own_products(self, *matrices: Matrices) -> bool:
        """Tell whether `cpu_gemm` multiplies these."""
        return bool(matrices) and "products" not in self.left_to_torch and cpu_gemm.fits(*matrices)

    def _may_use_triton(self, *matrices: Matrices) -> bool:
        is_dense = all(isinstance(one, Tensor) and one.is_contiguous() for one in matrices)
        return self.backend in (None, "triton") and "products" not in self.left_to_torch and bool(matrices) and is_dense

    def _find_row_step(self, device: torch.device, dtype: torch.dtype) -> int:
        """Return what the rows of a segment are padded to.

        On a CPU, torch's bf16 products compile a kernel for every new number of rows, which takes longer than the
        product; routing brings new numbers all the time.
        """
        own = cpu_gemm.able(dtype) and "products" not in self.left_to_torch
        return PADDED_ROWS if device.type == "cpu" and dtype == torch.bfloat16 and not own else 1

    def _find_fused(self, device: torch.device, dtype: torch.dtype) -> FusedKernels:
        name = self.backend or {"cpu": "numba", "cuda": "triton"}.get(device.type, "torch")
        if name == "numba" and cpu_fused.supports(device, dtype):
            return cpu_fused
        if name == "triton":
            triton = find_triton() if self.backend is None else import_triton()
            if triton is not None and dtype in TRITON_DTYPES:
                return triton
        return reference


TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


DEFAULT_KERNELS = KernelChoice()


class KernelUser:
    """A module that computes with kernels chosen from its own `kernel_choice`; `use_kernels` sets it."""

    kernel_choice = DEFAULT_KERNELS


def use_kernels(model: nn.Module, choice: KernelChoice) -> None:
    """Have every `KernelUser` in the model choose its kernels from `choice` from now on."""
    for module in model.modules():
        if isinstance(module, KernelUser):
            module.kernel_choice = choice


def use_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether torch multiplies all segments in one grouped product."""
    return device.type != "cpu" and dtype == torch.bfloat16 and has_grouped_mm()


def import_triton() -> FusedKernels:
    """Return the Triton kernels; raises `ImportError` where there is no Triton."""
    from moetrain.moe.kernels import triton_fused

    return triton_fused


def find_products(device: torch.device, dtype: torch.dtype) -> ProductKernels | None:
    """Return the products in Triton, if this device has instructions for them."""
    if device.type != "cuda" or dtype == torch.float32 or find_triton() is None:
        return None
    from moetrain.moe.kernels import triton_products

    return triton_products if triton_products.supports(device, dtype) else None


def import_triton_tables() -> Callable[[Travel, torch.device], IndexTables]:
    """Return the index tables in Triton; raises `ImportError` where there is no Triton."""
    from moetrain.moe.kernels.triton_tables import TritonTables

    return TritonTables


@cache
def find_triton() -> FusedKernels | None:
    """Return the Triton kernels, if they can be compiled and run on this host's GPU."""
    try:
        module = import_triton()
        module.swiglu(torch.zeros(1, 2, device="cuda"))
    except Exception as error:  # no Triton, no C compiler, a GPU that it does not know: whatever it is, torch can do it
        warnings.warn(f"no Triton kernels, plain torch is slower: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return module
