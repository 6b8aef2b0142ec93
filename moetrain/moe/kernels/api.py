"""The arithmetic around the grouped GEMMs, in plain torch: what every device can do.

All sums run in fp32 and in a fixed order. `cpu_fused` has the sums and the SwiGLU for the CPU in one pass over
memory, `triton_fused` for GPUs.

M rows, D width, H expert hidden width, S slots, B bags.
"""

import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.kernels import cpu_fused, cpu_gemm

Matrices = Tensor | Sequence[Tensor]  # [S] of them
BACKENDS = ("torch", "numba", "triton")  # of the sums and the SwiGLU
PARTS = ("sums", "swiglu", "products")  # for which there are kernels of our own beside torch's
_backend: str | None = None  # of `using`; not one of a thread: a backward has its own
_by_torch: frozenset[str] = frozenset()  # of `leave_to_torch`


@contextmanager
def using(backend: str | None) -> Iterator[None]:
    """Sums and SwiGLU by one of BACKENDS, for tests and benchmarks; None: the fastest that the device has."""
    global _backend
    before, _backend = _backend, backend
    try:
        yield
    finally:
        _backend = before


def leave_to_torch(parts: Collection[str]) -> None:
    """From now on torch computes these of PARTS in this process, and kernels of our own the others, where they fit."""
    global _by_torch
    _by_torch = frozenset(parts)


def has_own(part: str, *tensors: Tensor) -> bool:
    """Whether a kernel of our own would compute with these tensors, were the part not left to torch."""
    return cpu_gemm.fits(*tensors) if part == "products" else _module(*tensors) is not None


def _fused(part: str, *tensors: Tensor) -> ModuleType | None:
    """What computes with these tensors in one pass over memory; None: plain torch."""
    return None if _backend is None and part in _by_torch else _module(*tensors)


def own_products(*tensors: Matrices) -> bool:
    """Whether `cpu_gemm` multiplies them."""
    return "products" not in _by_torch and cpu_gemm.fits(*tensors)


def _module(*tensors: Tensor) -> ModuleType | None:
    backend = _backend or {"cpu": "numba", "cuda": "triton"}.get(tensors[0].device.type, "torch")
    module: ModuleType | None = None
    if backend == "numba":
        module = cpu_fused
    elif backend == "triton":
        module = _triton() if _backend is None else _import_triton()
    return module if module is not None and module.fits(*tensors) else None


def _import_triton() -> ModuleType:
    from moetrain.moe.kernels import triton_fused

    return triton_fused


@cache
def _triton() -> ModuleType | None:
    """The Triton kernels, if they can be compiled and run on this host's GPU."""
    try:
        module = _import_triton()
        module.swiglu(torch.zeros(1, 2, device="cuda"))
    except Exception as error:  # no Triton, no C compiler, a GPU that it does not know: whatever it is, torch can do it
        warnings.warn(f"no Triton kernels, plain torch is slower: {type(error).__name__}: {error}", stacklevel=2)
        return None
    return module


@dataclass(frozen=True)
class Bags:
    """Which rows belong to which of B bags: `row_M[begin_B[b] : begin_B[b + 1]]`, in their order."""

    row_M: Tensor
    begin_B: Tensor  # [B + 1]
    most: int  # no bag has more rows

    @classmethod
    def of(cls, bag_M: Tensor, num_bags: int, most: int) -> "Bags":
        """Rows of the bag `num_bags` belong to none."""
        sorted_M, row_M = bag_M.sort(stable=True)
        begin_B = torch.searchsorted(sorted_M, torch.arange(num_bags + 1, device=bag_M.device))
        return cls(row_M, begin_B, most)


def row_step(dtype: torch.dtype, device: torch.device) -> int:
    """Rows of a segment are padded to a multiple of this. On a CPU, torch's bf16 products compile a kernel for every
    new number of rows, which takes longer than the product; routing brings new numbers all the time."""
    own = cpu_gemm.able(dtype) and "products" not in _by_torch
    return 16 if device.type == "cpu" and dtype == torch.bfloat16 and not own else 1


def stable_argsort(key_M: Tensor) -> Tensor:
    return key_M.argsort(stable=True)


def positions(mask: Tensor, count: int) -> Tensor:
    """Where a mask is true, when it is known how often: no host sync."""
    return torch.nonzero_static(mask, size=count).view(-1)


def sum_rows(rows_MD: Tensor, weight_M: Tensor | None, bags: Bags, dtype: torch.dtype) -> Tensor:
    """[B, D]: the sum of each bag's rows, weighted, one after another in fp32."""
    fused = _fused("sums", rows_MD)
    if fused is not None and dtype == rows_MD.dtype:
        return fused.sum_rows(rows_MD, weight_M, bags.row_M, bags.begin_B, None)
    total = rows_MD.new_zeros(len(bags.begin_B) - 1, rows_MD.shape[1], dtype=torch.float32)
    return _accumulate(total, rows_MD, weight_M, bags).to(dtype)


def add_rows(own_BD: Tensor, rows_MD: Tensor, bags: Bags) -> Tensor:
    """[B, D]: each bag's own row plus the sum of its rows."""
    fused = _fused("sums", rows_MD, own_BD)
    if fused is not None:
        return fused.sum_rows(rows_MD, None, bags.row_M, bags.begin_B, own_BD)
    return _accumulate(own_BD.float().clone(), rows_MD, None, bags).to(own_BD.dtype)


def _accumulate(total_BD: Tensor, rows_MD: Tensor, weight_M: Tensor | None, bags: Bags) -> Tensor:
    """Adds the first rows of all bags, then the second ones, and so on."""
    last = len(rows_MD) - 1
    size_B = bags.begin_B.diff()
    for place in range(bags.most if last >= 0 else 0):
        row_B = bags.row_M[(bags.begin_B[:-1] + place).clamp(max=last)]
        part_BD = rows_MD.index_select(0, row_B).float()
        if weight_M is not None:
            part_BD *= weight_M[row_B, None]
        total_BD += torch.where((size_B > place)[:, None], part_BD, 0.0)
    return total_BD


def segment_mm(rows_MA: Tensor, weights: Matrices, sizes: list[int], out_MB: Tensor, transpose: bool) -> None:
    """out = rows @ weight of the row's segment (or its transpose). weights: [S] matrices."""
    if own_products(rows_MA, weights, out_MB):
        cpu_gemm.segment_mm(rows_MA, weights, sizes, out_MB, transpose)
    elif not _grouped(rows_MA):
        begin = 0
        for weight, size in zip(weights, sizes, strict=True):
            end = begin + size
            torch.mm(rows_MA[begin:end], weight.t() if transpose else weight, out=out_MB[begin:end])
            begin = end
    elif len(rows_MA):  # torch's grouped product writes nowhere but to memory of its own
        stacked = weights if isinstance(weights, Tensor) else torch.stack(list(weights))
        ends = _ends(sizes, rows_MA.device)
        out_MB.copy_(F.grouped_mm(rows_MA, stacked.mT if transpose else stacked, offs=ends))


def segment_outer(left_MA: Tensor, right_MB: Tensor, sizes: list[int], out_SAB: Matrices, add: bool) -> Matrices:
    """out[s] (+)= leftᵀ @ right over the rows of segment s: weight gradients. Returns `out_SAB`, or in its place, if
    that is one tensor and is not added to, another that spared a copy."""
    if own_products(left_MA, right_MB, out_SAB):
        cpu_gemm.segment_outer(left_MA, right_MB, sizes, out_SAB, add)
        return out_SAB
    if not _grouped(left_MA):
        begin = 0
        for out_AB, size in zip(out_SAB, sizes, strict=True):
            end = begin + size
            if add:
                out_AB.addmm_(left_MA[begin:end].t(), right_MB[begin:end])
            else:
                torch.mm(left_MA[begin:end].t(), right_MB[begin:end], out=out_AB)
            begin = end
        return out_SAB
    filled = [s for s, size in enumerate(sizes) if size]  # what a product over no rows is differs between GPUs
    if not filled:
        return out_SAB if add else _zeroed(out_SAB, range(len(sizes)))
    if len(filled) == len(sizes) and isinstance(out_SAB, Tensor) and not add:
        return F.grouped_mm(left_MA.t(), right_MB, offs=_ends(sizes, left_MA.device))
    found_SAB = F.grouped_mm(left_MA.t(), right_MB, offs=_ends([sizes[s] for s in filled], left_MA.device))
    put = torch._foreach_add_ if add else torch._foreach_copy_
    put([out_SAB[s] for s in filled], list(found_SAB))
    return out_SAB if add else _zeroed(out_SAB, set(range(len(sizes))) - set(filled))


def _zeroed(out_SAB: Matrices, slots: Iterable[int]) -> Matrices:
    for s in slots:
        out_SAB[s].zero_()
    return out_SAB


def _ends(sizes: list[int], device: torch.device) -> Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32).to(device, non_blocking=True)


def _grouped(rows_MA: Tensor) -> bool:
    """Whether the segments are one grouped product. torch has it on GPUs for bf16, from Hopper on; elsewhere it would
    loop and wait for the device each time. cuBLAS takes 0.15 ms for a product of a size that is new to it, ten times
    that of one that it knows (H100), and routing brings new sizes in every step."""
    return rows_MA.device.type != "cpu" and rows_MA.dtype == torch.bfloat16 and has_grouped_mm()


@cache
def has_grouped_mm() -> bool:
    """Whether torch has grouped products for this host's GPUs: from Hopper on, in bf16."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def cross_entropy(logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """[T, V], [T] -> fp32 nats [T], -log softmax(logits)[target], and log Σ exp(logits) [T]."""
    if (fused := _module(logits_TV)) is not None:
        return fused.cross_entropy(logits_TV, target_T)
    logits_TV = logits_TV.float()
    nats_T = F.cross_entropy(logits_TV, target_T, reduction="none")
    return nats_T, nats_T + logits_TV.gather(1, target_T[:, None])[:, 0]


def cross_entropy_backward(logits_TV: Tensor, target_T: Tensor, lse_T: Tensor, grad_T: Tensor) -> Tensor:
    """[T, V] gradient of the logits, in their dtype, for that of the nats, `grad_T`; on a GPU it may take their place.

    `lse_T`: log Σ exp(logits), as `cross_entropy` gave it.
    """
    if (fused := _module(logits_TV)) is not None:
        return fused.cross_entropy_backward(logits_TV, target_T, lse_T, grad_T)
    grad_TV = logits_TV.softmax(1, dtype=torch.float32).mul_(grad_T[:, None])
    return grad_TV.scatter_add_(1, target_T[:, None], -grad_T[:, None]).to(logits_TV.dtype)


def has_fused_cross_entropy(x: Tensor) -> bool:
    """Whether it takes logits in the dtype of `x` as they are, so that no fp32 copies of them are made."""
    return _module(x) is not None


def swiglu(gate_up_MH2: Tensor) -> Tensor:
    """[M, 2H] -> [M, H]: silu(gate) * up."""
    fused = _fused("swiglu", gate_up_MH2)
    if fused is not None:
        return fused.swiglu(gate_up_MH2)
    gate_MH, up_MH = gate_up_MH2.chunk(2, dim=1)
    return F.silu(gate_MH).mul_(up_MH)


def swiglu_backward(gate_up_MH2: Tensor, grad_MH: Tensor, weight_M: Tensor) -> Tensor:
    """Backward of rows that are weighted later. In place: gate_up becomes its gradient, `grad_MH` the weighted hidden.

    With h = silu(gate) · up and `grad_MH` the gradient of h for weight one: returns [M] fp32 Σ grad · h, the
    gradient of the weights; writes weight · h to `grad_MH`.
    """
    fused = _fused("swiglu", gate_up_MH2, grad_MH)
    if fused is not None:
        return fused.swiglu_backward(gate_up_MH2, grad_MH, weight_M)
    gate_MH, up_MH = gate_up_MH2.chunk(2, dim=1)
    weight_M1 = weight_M[:, None]  # fp32: what is weighted is rounded once
    silu_MH = F.silu(gate_MH)
    hidden_MH = silu_MH * up_MH
    grad_weight_M = torch.linalg.vecdot(grad_MH.float(), hidden_MH.float())
    weighted_MH = torch.mul(grad_MH, weight_M1, out=torch.empty_like(grad_MH))
    grad_gate_MH = torch.ops.aten.silu_backward(weighted_MH * up_MH, gate_MH)
    gate_up_MH2[:, gate_MH.shape[1] :] = weighted_MH.mul_(silu_MH)
    gate_up_MH2[:, : gate_MH.shape[1]] = grad_gate_MH
    torch.mul(hidden_MH, weight_M1, out=grad_MH)
    return grad_weight_M
