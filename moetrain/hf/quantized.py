"""Block-quantised tensors of a folder, as the plain tensors that they stand for: MXFP4 of gpt-oss, FP8 of DeepSeek-V3.

Each is dequantised a few rows at a time, to fp32: a value times the scale of its block.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moetrain.hf.folder import Folder, Lazy, Rows, Stored, find_runs

BLOCKS, SCALES, INVERSE = "_blocks", "_scales", "_scale_inv"
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # e2m1 without its sign
FP4_BLOCK = 32  # values that share a scale (OCP Microscaling Formats, MXFP4)
METHODS = ("mxfp4", "fp8")


@dataclass(frozen=True)
class MXFP4:
    """Experts [E, in, out] in fp32, which is exact.

    `blocks` [E, out, groups, 16] uint8 has two values a byte, the lower half first; `scales` [E, out, groups] uint8 the
    exponents of two, 127 more than they are.
    """

    blocks: Stored = field(repr=False)
    scales: Stored = field(repr=False)
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        experts, width_out, groups, _ = self.blocks.shape
        return experts, groups * FP4_BLOCK, width_out

    def read(self, rows: Rows = None) -> Tensor:
        """Return these experts, or all; see `folder.Lazy`."""
        wanted = [row for a, b in find_runs(rows, self.shape[0]) for row in range(a, b)]
        out = torch.empty(len(wanted), *self.shape[1:])
        for place, expert in enumerate(wanted):  # one at a time: what is in between is larger than the result
            out[place] = decode_mxfp4(self.blocks.read([expert]), self.scales.read([expert]))[0]
        return out


@dataclass(frozen=True)
class FP8:
    """A matrix [N, K] in fp32, of `values` [N, K] e4m3 and `scales`, one for each block of `block` rows and columns."""

    values: Stored = field(repr=False)
    scales: Stored = field(repr=False)
    block: tuple[int, int]
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def read(self, rows: Rows = None) -> Tensor:
        """Return these rows, or all; see `folder.Lazy`."""
        scales = self.scales.read().float().reshape(-1, math.ceil(self.shape[1] / self.block[1]))
        columns = torch.arange(self.shape[1]) // self.block[1]
        parts = []
        for begin, end in find_runs(rows, self.shape[0]):
            scale = scales[torch.arange(begin, end) // self.block[0]]
            parts.append(self.values.read(slice(begin, end)).float().mul_(scale[:, columns]))
        return torch.cat(parts)


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return [E, in, out] fp32 of [E, out, groups, 16] and [E, out, groups] uint8; the values are exact."""
    table = torch.tensor([*FP4, *(-value for value in FP4)])
    pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], -1)
    values = torch.ldexp(pairs.flatten(-2), scales.int()[..., None] - 127)
    return values.flatten(-2).transpose(1, 2).contiguous()


def dequantise(folder: Folder) -> dict[str, Lazy]:
    """Return what a folder holds, by key, with quantised tensors under the key of the plain one.

    Raises `ConfigError` for another quantisation, for scales that are missing or that do not fit.
    """
    about: Any = folder.config.get("quantization_config") or {}
    method = about.get("quant_method") if isinstance(about, dict) else None
    if about and method not in METHODS:
        raise folder.bad(f"quantization_config.quant_method={method}: must be one of {', '.join(METHODS)}")
    block = _find_block(folder, about)
    tensors: dict[str, Lazy] = {}
    for key, stored in folder.tensors.items():
        if key.endswith(BLOCKS) and stored.dtype == torch.uint8:
            scales = _find_scales(folder, stored, key.removesuffix(BLOCKS) + SCALES)
            _check_mxfp4(folder, stored, scales)
            tensors[key.removesuffix(BLOCKS)] = MXFP4(stored, scales)
        elif stored.dtype == torch.float8_e4m3fn:
            scales = _find_scales(folder, stored, key + INVERSE)
            tensors[key] = _make_fp8(folder, stored, scales, block)
        elif not _is_scale(folder.tensors, key):
            tensors[key] = stored
    return tensors


def _find_block(folder: Folder, about: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None: all of a matrix."""
    block = about.get("weight_block_size", [128, 128])
    match block:
        case None:
            return None
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise folder.bad(f"quantization_config.weight_block_size={block}: must be two sizes or null")


def _find_scales(folder: Folder, stored: Stored, key: str) -> Stored:
    if key not in folder.tensors:
        raise folder.bad(f"{stored.key} is quantised, and its {key} is missing")
    return folder.tensors[key]


def _is_scale(tensors: Mapping[str, Stored], key: str) -> bool:
    if key.endswith(INVERSE):
        values = tensors.get(key.removesuffix(INVERSE))
        return values is not None and values.dtype == torch.float8_e4m3fn
    return key.endswith(SCALES) and key.removesuffix(SCALES) + BLOCKS in tensors


def _check_mxfp4(folder: Folder, blocks: Stored, scales: Stored) -> None:
    if len(blocks.shape) != 4 or blocks.shape[3] != FP4_BLOCK // 2:
        raise folder.bad(f"{blocks.key} has shape {list(blocks.shape)}; must be [experts, out, groups, 16]")
    if scales.shape != blocks.shape[:3] or scales.dtype != torch.uint8:
        raise folder.bad(f"{scales.key} has shape {list(scales.shape)}; {blocks.key} needs {list(blocks.shape[:3])}")


def _make_fp8(folder: Folder, values: Stored, scales: Stored, block: tuple[int, int] | None) -> FP8:
    if len(values.shape) != 2 or not scales.dtype.is_floating_point:
        raise folder.bad(f"{values.key} has shape {list(values.shape)}; must be a matrix with scales in floating point")
    used = block or values.shape
    wanted = tuple(math.ceil(size / part) for size, part in zip(values.shape, used, strict=True))
    if scales.shape != wanted and not (block is None and math.prod(scales.shape) == 1):
        rule = f"{values.key} needs {list(wanted)} in blocks of {list(used)}"
        raise folder.bad(f"{scales.key} has shape {list(scales.shape)}; {rule}")
    return FP8(values, scales, (used[0], used[1]))
