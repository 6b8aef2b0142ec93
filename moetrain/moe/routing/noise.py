"""Normal noise that depends on what it is for and on nothing else: equal on every layout, in any order of work.

A counter-based generator: every number is a hash of its key and place (SplitMix64; Steele et al., OOPSLA 2014), turned
into a normal one by Box and Muller.
"""

import hashlib
import math

import torch
from torch import Tensor


def normal(key: tuple[int, ...], sample_B: Tensor, length: int, width: int) -> Tensor:
    """[B · length, width] fp32: numbers of each sequence, by its global number; `key`: seed, step, layer."""
    device = sample_B.device
    place_T = (sample_B[:, None] * length + torch.arange(length, device=device)).flatten()
    counter_TW = place_T[:, None] * width + torch.arange(width, device=device)
    digest = hashlib.sha256(repr(key).encode()).digest()
    bits_TW = _mix(_mix(counter_TW + int.from_bytes(digest[:8], "little", signed=True)))
    first, second = ((_right(bits_TW, shift) & 0xFFFFFF).float().add(0.5) / (1 << 24) for shift in (40, 8))
    return torch.sqrt(-2 * first.log()) * torch.cos(2 * math.pi * second)


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _right(x, 31)


def _right(x: Tensor, shift: int) -> Tensor:
    """int64 as unsigned, shifted to the right."""
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
