"""The sums, the SwiGLU and the cross entropy for the CPU: one pass over memory, compiled by numba; fp32 and bf16.

bf16 comes as its bits (uint16), is widened to fp32 and rounded back. Work is split over torch's threads by rows, so
results do not depend on their number.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from moetrain.moe.compiled import njit
from moetrain.moe.kernels.bags import Bags

Array = NDArray[Any]
LOG2_E = np.float32(1.4426950408889634)
_compiled = partial(njit, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "arcp", "nsz"})


def wide(x: Any) -> Any:
    """Return an element as fp32."""


def narrow(x: Any, like: Any) -> Any:
    """Return fp32 as an element: bf16 rounded to the nearest even, not-a-number staying one."""


@overload(wide, inline="always")
def _(x):  # type: ignore[no-untyped-def]
    if x == types.uint16:
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@overload(narrow)
def _(x, like):  # type: ignore[no-untyped-def]
    if like != types.uint16:
        return lambda x, like: x

    def narrow_bf16(x, like):  # type: ignore[no-untyped-def]
        bits = np.float32(x).view(np.uint32)
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd)
        return np.uint16(np.uint32(rounded >> np.uint32(16))) if x == x else np.uint16(0x7FC0)

    return narrow_bf16


@_compiled()
def power_of_two(t):  # type: ignore[no-untyped-def]
    """Return 2^t, zero for -127 and less: its whole part as an exponent's bits, the rest by a polynomial (2e-7)."""
    t = np.float32(-127.0) if t < np.float32(-127.0) else t  # in this order not-a-number stays one
    t = np.float32(126.0) if t > np.float32(126.0) else t
    whole = np.int32(np.int32(t + np.float32(127.5)) - np.int32(127))  # t + 127.5 is positive: to the nearest
    f = t - np.float32(whole)
    p = np.float32(1.5403530393381609e-4)
    p = p * f + np.float32(1.3333558146428443e-3)
    p = p * f + np.float32(9.6181291076284770e-3)
    p = p * f + np.float32(5.5504108664821580e-2)
    p = p * f + np.float32(2.4022650695910072e-1)
    p = p * f + np.float32(6.9314718055994530e-1)
    p = p * f + np.float32(1.0)
    return p * np.uint32(np.uint32(np.int32(whole + np.int32(127))) << np.uint32(23)).view(np.float32)


@_compiled()
def _sigmoid(x):  # type: ignore[no-untyped-def]
    """Return 1 / (1 + e^-x)."""
    return np.float32(1.0) / (np.float32(1.0) + power_of_two(-x * LOG2_E))


@_compiled()
def _swiglu(begin, end, gate_up, out):  # type: ignore[no-untyped-def]
    width = out.shape[1]
    for m in range(begin, end):
        for j in range(width):
            gate, up = wide(gate_up[m, j]), wide(gate_up[m, width + j])
            out[m, j] = narrow(gate * _sigmoid(gate) * up, out[m, j])


@_compiled()
def _swiglu_backward(begin, end, gate_up, grad, weight, grad_weight):  # type: ignore[no-untyped-def]
    width = grad.shape[1]
    for m in range(begin, end):
        w, total = weight[m], np.float32(0.0)
        for j in range(width):
            gate, up, g = wide(gate_up[m, j]), wide(gate_up[m, width + j]), wide(grad[m, j])
            sigmoid = _sigmoid(gate)
            silu = gate * sigmoid
            hidden = silu * up
            total += g * hidden
            slope = sigmoid + silu * (np.float32(1.0) - sigmoid)
            gate_up[m, j] = narrow(w * g * up * slope, gate_up[m, j])
            gate_up[m, width + j] = narrow(w * g * silu, gate_up[m, j])
            grad[m, j] = narrow(w * hidden, grad[m, j])
        grad_weight[m] = total


@_compiled()
def _sum_rows(begin, end, rows, weight, row_of, begin_of, own, out):  # type: ignore[no-untyped-def]
    """weight [M], or [0] for none; own [B, D], or [0, D] for none."""
    width = rows.shape[1]
    total = np.empty(width, np.float32)
    for b in range(begin, end):
        first, last = begin_of[b], begin_of[b + 1]
        if len(own):
            for j in range(width):
                total[j] = wide(own[b, j])
        else:
            total[:] = np.float32(0.0)
        for at in range(first, last):
            row = row_of[at]
            w = weight[row] if len(weight) else np.float32(1.0)
            for j in range(width):
                total[j] += w * wide(rows[row, j])
        for j in range(width):
            out[b, j] = narrow(total[j], out[b, j])


@_compiled()
def _cross_entropy(begin, end, logits, target, lse, nats):  # type: ignore[no-untyped-def]
    width, wide_part = logits.shape[1], logits.shape[1] // 64 * 64
    most = np.empty(64, np.float32)
    for t in range(begin, end):
        row = logits[t]
        largest = np.float32(-np.inf)
        most[:] = largest
        for j in range(0, wide_part, 64):
            for i in range(64):
                x = wide(row[j + i])
                most[i] = x if x > most[i] else most[i]
        for i in range(64):
            largest = most[i] if most[i] > largest else largest
        for j in range(wide_part, width):
            largest = wide(row[j]) if wide(row[j]) > largest else largest
        total = np.float32(0.0)
        for j in range(width):
            total += power_of_two((wide(row[j]) - largest) * LOG2_E)
        lse[t] = np.log(total) + largest
        nats[t] = lse[t] - wide(row[target[t]])


@_compiled()
def _cross_entropy_backward(begin, end, logits, target, lse, grad, out):  # type: ignore[no-untyped-def]
    for t in range(begin, end):
        row, own, g = logits[t], target[t], grad[t]
        for j in range(logits.shape[1]):
            out[t, j] = narrow(g * power_of_two((wide(row[j]) - lse[t]) * LOG2_E), out[t, j])
        probability = power_of_two((wide(row[own]) - lse[t]) * LOG2_E)
        out[t, own] = narrow(g * (probability - np.float32(1.0)), out[t, own])


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether these kernels compute with such tensors: on the CPU, in bf16 or fp32."""
    return device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def swiglu(gate_up_MH2: Tensor) -> Tensor:
    """As `Backend.swiglu`."""
    out = gate_up_MH2.new_empty(len(gate_up_MH2), gate_up_MH2.shape[1] // 2)
    _by_rows(len(out), _swiglu, array(gate_up_MH2), array(out))
    return out


def swiglu_backward(gate_up_MH2: Tensor, grad_MH: Tensor, weight_M: Tensor) -> Tensor:
    """As `Backend.swiglu_backward`, in place."""
    out = torch.empty_like(weight_M)
    arrays = array(gate_up_MH2), array(grad_MH), array(weight_M), array(out)
    _by_rows(len(out), _swiglu_backward, *arrays)
    return out


def sum_rows(rows_MD: Tensor, weight_M: Tensor | None, bags: Bags, own_BD: Tensor | None = None) -> Tensor:
    """As `Backend.sum_rows`."""
    out = rows_MD.new_empty(len(bags.begin_B) - 1, rows_MD.shape[1])
    weight = torch.empty(0) if weight_M is None else weight_M
    own = rows_MD.new_empty(0, rows_MD.shape[1]) if own_BD is None else own_BD
    arrays = [array(t) for t in (rows_MD, weight, bags.row_M, bags.begin_B, own, out)]
    _by_rows(len(out), _sum_rows, *arrays)
    return out


def cross_entropy(logits_TV: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """As `Backend.cross_entropy`."""
    nats_T, lse_T = (torch.empty(len(logits_TV)) for _ in range(2))
    _by_rows(len(logits_TV), _cross_entropy, *(array(t) for t in (logits_TV, target_T, lse_T, nats_T)))
    return nats_T, lse_T


def cross_entropy_backward(logits_TV: Tensor, target_T: Tensor, lse_T: Tensor, grad_T: Tensor) -> Tensor:
    """As `Backend.cross_entropy_backward`; the logits stay."""
    out_TV = torch.empty_like(logits_TV)
    arrays = (array(t) for t in (logits_TV, target_T, lse_T, grad_T, out_TV))
    _by_rows(len(logits_TV), _cross_entropy_backward, *arrays)
    return out_TV


def array(tensor: Tensor) -> Array:
    """Return the tensor's memory as an array; bf16 as uint16."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _by_rows(count: int, kernel: Callable[..., None], *arguments: Any) -> None:
    share(count, 64, lambda begin, end: kernel(begin, end, *arguments))


def share(count: int, least: int, work: Callable[[int, int], None]) -> None:
    """Call `work(begin, end)` for parts of `count`, one for each of torch's threads if they get `least` each."""
    threads = torch.get_num_threads()
    if threads == 1 or count < least * threads:
        work(0, count)
        return
    cuts = [count * i // threads for i in range(threads + 1)]
    list(_pool(threads).map(work, cuts[:-1], cuts[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "moetrain-kernels")
