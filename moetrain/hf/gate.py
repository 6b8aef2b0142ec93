"""What is between the two products of an expert: the family's own code by autograd, or one pass over memory.

gpt-oss and those after it clamp: h = g σ(α g) (u + β) with g = min(gate, L) and u = clip(up, -L, L). Gate and up
alternate (gpt-oss) or stand side by side. On the CPU, in fp32 and bf16, that and its gradient are kernels of ours; for
other gates, devices and dtypes the family's code runs.

M rows, H hidden width, W = 2H.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.moe.compiled import njit
from moetrain.moe.kernels.cpu_fused import array, narrow, power_of_two, share, supports, wide

LOG2_E = np.float32(1.4426950408889634)
CLAMPED = {  # family -> the names of α and L in its experts module, and β
    "gpt_oss": ("alpha", "limit", 1.0),
    "openai_privacy_filter": ("alpha", "limit", 1.0),
    "minimax_m3_vl": ("swiglu_alpha", "swiglu_limit", 1.0),
    "glm5_next": (None, "swiglu_limit", 0.0),
    "hy_v4": (None, "swiglu_limit", 0.0),
}


@dataclass(frozen=True)
class ClampedGate:
    """The numbers of a clamped gate."""

    alpha: float
    limit: float
    beta: float
    interleaved: bool


def find_clamped_gate(module: Any) -> ClampedGate | None:
    """Return the clamped gate of an experts module; None where its gate is another one."""
    family = type(module)._apply_gate.__module__.split(".")[-2] if module.has_gate else ""
    if family not in CLAMPED:
        return None
    alpha, limit, beta = CLAMPED[family]
    found = 1.0 if alpha is None else float(getattr(module, alpha))
    return ClampedGate(found, float(getattr(module, limit)), beta, not module.is_concatenated)


def run_gate(gate: ClampedGate | None, apply: Callable[[Tensor], Tensor], first_MW: Tensor) -> Tensor:
    """Return [M, H] for the rows of the first product, without a graph. `apply`: the family's own code."""
    if gate is None or not supports(first_MW.device, first_MW.dtype):
        return apply(first_MW).contiguous()
    out_MH = first_MW.new_empty(len(first_MW), first_MW.shape[1] // 2)
    ends = array(first_MW), array(out_MH), *_numbers(gate)
    share(len(out_MH), 64, lambda begin, end: _run(begin, end, *ends))
    return out_MH


def run_gate_for_backward(
    gate: ClampedGate | None, apply: Callable[[Tensor], Tensor], first_MW: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return [M, H], and what makes of its gradient that of the first product [M, W]."""
    if gate is None or not supports(first_MW.device, first_MW.dtype):
        with torch.enable_grad():
            first_MW = first_MW.detach().requires_grad_()
            hidden_MH = apply(first_MW)
        return hidden_MH.detach().contiguous(), lambda grad_MH: torch.autograd.grad(hidden_MH, first_MW, grad_MH)[0]
    known = gate

    def backward(grad_MH: Tensor) -> Tensor:
        out_MW = torch.empty_like(first_MW)
        ends = array(first_MW), array(grad_MH.contiguous()), array(out_MW), *_numbers(known)
        share(len(out_MW), 64, lambda begin, end: _run_backward(begin, end, *ends))
        return out_MW

    return run_gate(gate, apply, first_MW), backward


def _numbers(gate: ClampedGate) -> tuple[Any, ...]:
    return np.float32(gate.alpha), np.float32(gate.limit), np.float32(gate.beta), gate.interleaved


_compiled = partial(njit, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "arcp", "nsz"})


@_compiled()
def _value(gate, up, alpha, limit, beta):  # type: ignore[no-untyped-def]
    g = limit if gate > limit else gate
    u = limit if up > limit else (-limit if up < -limit else up)
    return g / (np.float32(1.0) + power_of_two(-alpha * g * LOG2_E)) * (u + beta)


@_compiled()
def _slopes(gate, up, alpha, limit, beta):  # type: ignore[no-untyped-def]
    """What the gradient is multiplied by for the gate, and for the up."""
    g = limit if gate > limit else gate
    u = limit if up > limit else (-limit if up < -limit else up)
    sigmoid = np.float32(1.0) / (np.float32(1.0) + power_of_two(-alpha * g * LOG2_E))
    slope = (u + beta) * (sigmoid + alpha * g * sigmoid * (np.float32(1.0) - sigmoid))
    return np.float32(0.0) if gate > limit else slope, g * sigmoid if up == u else np.float32(0.0)


@_compiled()
def _run(begin, end, rows, out, alpha, limit, beta, interleaved):  # type: ignore[no-untyped-def]
    width = out.shape[1]
    for m in range(begin, end):
        if interleaved:  # a loop of its own for each: with strides that it knows the compiler makes vectors of it
            for j in range(width):
                found = _value(wide(rows[m, 2 * j]), wide(rows[m, 2 * j + 1]), alpha, limit, beta)
                out[m, j] = narrow(found, out[m, j])
        else:
            for j in range(width):
                found = _value(wide(rows[m, j]), wide(rows[m, width + j]), alpha, limit, beta)
                out[m, j] = narrow(found, out[m, j])


@_compiled()
def _run_backward(begin, end, rows, grad, out, alpha, limit, beta, interleaved):  # type: ignore[no-untyped-def]
    width = grad.shape[1]
    for m in range(begin, end):
        if interleaved:
            for j in range(width):
                d, gate, up = wide(grad[m, j]), wide(rows[m, 2 * j]), wide(rows[m, 2 * j + 1])
                of_gate, of_up = _slopes(gate, up, alpha, limit, beta)
                out[m, 2 * j] = narrow(d * of_gate, out[m, j])
                out[m, 2 * j + 1] = narrow(d * of_up, out[m, j])
        else:
            for j in range(width):
                d, gate, up = wide(grad[m, j]), wide(rows[m, j]), wide(rows[m, width + j])
                of_gate, of_up = _slopes(gate, up, alpha, limit, beta)
                out[m, j] = narrow(d * of_gate, out[m, j])
                out[m, width + j] = narrow(d * of_up, out[m, j])
