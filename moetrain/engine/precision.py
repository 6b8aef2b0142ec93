"""What is computed in, bf16 or fp32: `auto` takes whichever this device is faster at.

CPUs differ by a factor of a hundred: a bf16 product takes a quarter of the time of an fp32 one with AVX512-BF16, and
forty times as long with AVX2 alone.
"""

import time
from collections.abc import Callable

import torch

from moetrain.common.console import errors
from moetrain.common.errors import ConfigError, short
from moetrain.config import Config, RunSpec
from moetrain.config.spec import AUTO
from moetrain.distributed.comm import broadcast_text, gather_texts
from moetrain.distributed.mesh import Mesh
from moetrain.moe.kernels import fp8

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLEARLY = 1.25  # bf16 has to be so much faster: it gives up 16 bits, and near a tie every run is to decide alike
SIZE = 256  # of the square matrices that are multiplied
SECONDS, REPEATS = 0.03, 7  # of repeated products, whatever is over first; once at least


def speed_of_bf16(device: torch.device) -> float:
    """The speed of bf16 products as a multiple of that of fp32 ones, measured in about a tenth of a second at most.

    By one thread and its own clock: other processes, which take turns with it, do not change the ratio. A GPU is not
    measured: infinity where its hardware has bf16, else 0.
    """
    if device.type == "cuda":
        return float("inf") if torch.cuda.is_bf16_supported(including_emulation=False) else 0.0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _product_seconds(torch.float32) / _product_seconds(torch.bfloat16)
    finally:
        torch.set_num_threads(threads)


def _product_seconds(dtype: torch.dtype) -> float:
    """The least of several, after one that prepares what the others use."""
    matrix = torch.randn(SIZE, SIZE).to(dtype)
    torch.mm(matrix, matrix)
    times: list[float] = []
    end = time.thread_time() + SECONDS
    while not times or (len(times) < REPEATS and time.thread_time() < end):
        began = time.thread_time()
        torch.mm(matrix, matrix)
        times.append(time.thread_time() - began)
    return min(times)


def chosen(speed: float) -> str:
    """What `auto` takes where bf16 has this speed as a multiple of fp32's."""
    return "bf16" if speed >= CLEARLY else "fp32"


def describe(speed: float) -> str:
    """Return `speed` in words."""
    if speed in (0.0, float("inf")):
        return f"this GPU has {'' if speed else 'no '}bf16"
    if speed < 1:
        return f"bf16 products take {1 / speed:.3g} times as long as fp32 ones here"
    return f"bf16 products run at {speed:.2g} times the speed of fp32 ones here"


def get_dtype(config: RunSpec) -> torch.dtype:
    """Return what the run computes in."""
    return DTYPES[config.train.dtype]


def check_experts_dtype(config: Config, device: torch.device) -> str | None:
    """Return `train.experts_dtype`. Raises `ConfigError` where this device cannot compute in it."""
    asked = config.train.experts_dtype
    if asked == "fp8" and not fp8.is_supported(device):
        raise ConfigError("train.experts_dtype=fp8: needs a Hopper GPU (compute capability 9.0); must be null here")
    return asked


def _say(note: str) -> None:
    errors.print(note)


def find_dtype(config: Config, mesh: Mesh, kept: str = "", say: Callable[[str], None] = _say) -> str:
    """Return the dtype that all ranks compute in, as `agree_on_dtype` finds it. All ranks call it.

    `kept`: what the run has computed in so far, if anything, as rank 0 knows it; `auto` stays with it.
    """
    kept = broadcast_text(kept, mesh.device)
    asked = config.train.dtype
    return agree_on_dtype(kept or AUTO if asked == AUTO else asked, mesh, say)


def agree_on_dtype(asked: str, mesh: Mesh, say: Callable[[str], None] = _say) -> str:
    """Return `asked`, or for `auto` what every rank does well. All ranks call it and get the same.

    Where bf16 is slow, rank 0 says so in one line.
    """
    if asked not in (*DTYPES, AUTO):
        raise ConfigError(f"train.dtype={short(asked)}: must be one of {', '.join((AUTO, *DTYPES))}")
    if asked == "fp32":
        return asked
    speed = min(float(text) for text in gather_texts(repr(speed_of_bf16(mesh.device)), mesh.saving))
    if asked == AUTO and chosen(speed) == "fp32":
        dtype, note = "fp32", f"computes in fp32: {describe(speed)}"
    else:
        dtype, note = "bf16", f"computes in bf16: {describe(speed)}; fp32 would be faster"
    if mesh.is_main and speed * CLEARLY < 1:
        say(note)
    return dtype
