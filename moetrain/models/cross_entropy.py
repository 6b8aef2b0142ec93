"""Cross entropy of a linear head without ever holding many logits.

Logits of a chunk of tokens at a time, in forward and again in backward: memory is a chunk's, not tokens × vocabulary.
On a CPU they stay for the backward if they are few, and the softmax takes one pass over memory
(`moe.kernels.cpu_fused`).

T tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from moetrain.distributed.mesh import memory_of
from moetrain.models.linear import add_outer, times, times_transposed
from moetrain.moe.kernels.api import DEFAULT_KERNELS, KernelChoice

CHUNK_ELEMENTS, CHUNK_ROWS = 1 << 21, 128  # logits held at a time on a CPU; tokens, at least
KEPT_BYTES = 64 << 20  # of logits that stay for the backward on a CPU: their product is not done again
GPU_PARTS = 32, 8  # of a GPU's memory, one for a chunk's logits; and one at most, if that takes `GPU_ROWS`
GPU_ROWS = 1024  # tokens of a chunk, from which on its products fill a GPU
WIDE_BYTES = 12  # of a logit in the dtype of x, and twice in fp32, where kernels do not take it as it is


def linear_cross_entropy(
    x: Tensor, weight_VD: Tensor, target: Tensor, kernels: KernelChoice = DEFAULT_KERNELS
) -> Tensor:
    """Return fp32 nats, in the shape of `target` [...]: -log softmax(x W^T)[target]; x [..., D].

    Products in the dtype of x, sums and exponentials in fp32.
    """
    return _LinearCrossEntropy.apply(x.flatten(0, -2), weight_VD, target, kernels)


def linear_cross_entropy_at(
    position_P: Tensor | None, x: Tensor, weight_VD: Tensor, target: Tensor, kernels: KernelChoice = DEFAULT_KERNELS
) -> Tensor:
    """Return what `linear_cross_entropy` does, computed at some positions alone: elsewhere it is 0.

    `position_P` [P] int64: places in the flattened target, none twice; None: all of them.
    """
    if position_P is None:
        return linear_cross_entropy(x, weight_VD, target, kernels)
    x_PD, target_P = x.flatten(0, -2).index_select(0, position_P), target.flatten().index_select(0, position_P)
    return put_at(position_P, linear_cross_entropy(x_PD, weight_VD, target_P, kernels), target.shape)


def put_at(position_P: Tensor, value_P: Tensor, shape: torch.Size) -> Tensor:
    """Return zeros of this shape with the values at these places of it, flattened."""
    return value_P.new_zeros(shape).put(position_P, value_P)


def chunk_rows(vocabulary: int, device_bytes: int, logit_bytes: int) -> int:
    """Tokens whose logits are held at a time. `device_bytes`: memory of the GPU, whatever is free of it, so that
    every step sums up in the same order; 0: a CPU."""
    if not device_bytes:
        return max(CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary)
    usual, most = (device_bytes // part // (logit_bytes * vocabulary) for part in GPU_PARTS)
    rows = max(usual, min(GPU_ROWS, most), 1)
    return rows // 128 * 128 or rows


def peak_bytes(tokens: int, dim: int, vocabulary: int, itemsize: int, is_fused: bool, device_bytes: int) -> int:
    """Return the most bytes that forward and backward hold at a time, besides x and the weight.

    These are the logits of a chunk of tokens, or of all where they stay for the backward; their gradient, which takes
    their place on a GPU; nats and logsumexp of every token; the gradient of x; and that of the weight, in fp32.
    `itemsize`: bytes of an element of x; `is_fused`: whether the kernels take logits in their own dtype;
    `device_bytes`: memory of the GPU, 0 for a CPU.
    """
    all_logits = tokens * vocabulary * itemsize
    logit_bytes = itemsize if is_fused else WIDE_BYTES
    chunk = min(tokens, chunk_rows(vocabulary, device_bytes, logit_bytes)) * vocabulary
    logits = chunk * logit_bytes
    if not device_bytes:
        logits += chunk * itemsize if is_fused else 0
        logits += all_logits - chunk * itemsize if all_logits <= KEPT_BYTES else 0
    return logits + 8 * tokens + tokens * dim * itemsize + 4 * vocabulary * dim


def _chunks(x_TD: Tensor, weight_VD: Tensor, is_fused: bool) -> list[slice]:
    logit_bytes = x_TD.element_size() if is_fused else WIDE_BYTES
    size = chunk_rows(len(weight_VD), memory_of(x_TD.device), logit_bytes)
    return [slice(begin, begin + size) for begin in range(0, len(x_TD), size)]


def _keeps(x_TD: Tensor, weight_VD: Tensor) -> bool:
    return x_TD.device.type == "cpu" and len(x_TD) * len(weight_VD) * x_TD.element_size() <= KEPT_BYTES


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, target: Tensor, choice: KernelChoice) -> Tensor:
        kernels = choice.choose(x_TD.device, x_TD.dtype)
        ctx.kernels, ctx.choice = kernels, choice
        target_T = target.flatten()
        nats = x_TD.new_empty(target.shape, dtype=torch.float32)
        nats_T, lse_T = nats.view(-1), torch.empty_like(nats).view(-1)
        keeps, kept = any(ctx.needs_input_grad) and _keeps(x_TD, weight_VD), []
        for part in _chunks(x_TD, weight_VD, kernels.has_fused_cross_entropy):
            logits_TV = times_transposed(x_TD[part], weight_VD, choice)
            nats_T[part], lse_T[part] = kernels.cross_entropy(logits_TV, target_T[part])
            if keeps:
                kept.append(logits_TV)
            del logits_TV  # before those of the next chunk are made
        ctx.save_for_backward(x_TD, weight_VD, target_T, lse_T, *kept)
        return nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_T = grad.flatten().contiguous()  # a sum's gradient is one number, expanded
        x_TD, weight_VD, target_T, lse_T, *kept = ctx.saved_tensors
        grad_x_TD = torch.empty_like(x_TD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        kernels, choice = ctx.kernels, ctx.choice
        for number, part in enumerate(_chunks(x_TD, weight_VD, kernels.has_fused_cross_entropy)):
            logits_TV = kept[number] if kept else times_transposed(x_TD[part], weight_VD, choice)
            grad_TV = kernels.cross_entropy_backward(logits_TV, target_T[part], lse_T[part], grad_T[part])
            grad_x_TD[part] = times(grad_TV, weight_VD, choice)
            add_outer(grad_TV, x_TD[part], grad_weight_VD, choice)
            del logits_TV, grad_TV
        return grad_x_TD, grad_weight_VD.to(weight_VD.dtype), None, None
