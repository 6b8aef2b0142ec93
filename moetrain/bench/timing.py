"""How benchmarks take time, on one rank and on all ranks in turns, and how they sum it up."""

import time
from collections.abc import Callable

import numpy as np
import torch

from moetrain.distributed.comm import all_gather
from moetrain.distributed.mesh import ExpertGroup, Mesh

Timed = Callable[[], tuple[float, float]]  # returns seconds: until the forward is over, and in all


def read_clock(device: torch.device) -> float:
    """Return seconds of a monotonic clock, once the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def time_in_turns(passes: list[Timed], repeats: int, ep: ExpertGroup, device: torch.device) -> np.ndarray:
    """Time passes one after another, each after a barrier; all ranks of the group call it.

    Each turn begins with another pass: what comes after the bare GEMMs finds other caches than what comes after a
    layer. Returns [repeats, passes, 2] seconds (until the forward is over, in all) of the slowest rank.
    """
    times = []
    for turn in range(repeats):
        row = [(0.0, 0.0)] * len(passes)
        for i in range(len(passes)):
            at = (turn + i) % len(passes)
            wait_for_ranks(ep, device)
            row[at] = passes[at]()
        times.append(row)
    local = torch.tensor(times, dtype=torch.float64, device=device)
    return all_gather(local, ep.rows).amax(0).cpu().numpy()


def wait_for_ranks(ep: ExpertGroup, device: torch.device) -> None:
    """Return when all ranks of the group have called it."""
    all_gather(torch.zeros(1, device=device), ep.rows).cpu()


def gather_numbers(value: int, mesh: Mesh) -> list[int]:
    """Return the `value` of every rank of the expert group, in their order."""
    return all_gather(torch.tensor([value], device=mesh.device), mesh.ep.rows).flatten().tolist()


def find_quartiles(ratios: np.ndarray) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile of a ratio over the repetitions."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    return low, middle, high


def measure_spread(ratios: np.ndarray) -> float:
    """Return the distance of the quartiles of a ratio over the repetitions, in its unit."""
    low, _, high = find_quartiles(ratios)
    return high - low
