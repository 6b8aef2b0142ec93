"""What `moetrain bench layer` measures, from its command line. No torch."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from moetrain.bench.cases import PRESETS, QUICK, Shape, chosen
from moetrain.common.errors import ConfigError
from moetrain.config.schema import Dtype

DTYPES = get_args(Dtype)
PLANNERS = ["home", "llep", "makespan"]
KERNELS = ["fastest", "torch", "triton"]  # the first: what the device uses by itself


@dataclass(frozen=True)
class Grid:
    """Everything that is to be measured."""

    shapes: list[Shape]
    patterns: list[str] | None  # of scenarios
    planners: list[str]
    repeats: int
    warmup: int
    seed: int
    kernels: Sequence[str] = tuple(KERNELS[:1])

    @classmethod
    def from_options(cls, options: argparse.Namespace, num_ranks: int) -> "Grid":
        from moetrain.moe import planning  # compiled code: not for every command line

        for name in options.planner:
            if name not in planning.PLANNERS:
                raise ConfigError(f"--planner {name}: must be one of {', '.join(planning.PLANNERS)}")
        dim, hidden, experts, top_k = PRESETS.get(options.shape, (512, 1024, None, 2))
        shapes = [
            Shape(options.tokens, options.dim or dim, options.hidden or hidden, number, options.top_k or top_k, dtype)
            for dtype in options.dtype
            for number in options.experts or ([experts] if experts else [16, 64])
        ]
        for shape in shapes:
            if shape.experts % num_ranks:
                raise ConfigError(f"--experts {shape.experts}: must be a multiple of the {num_ranks} ranks")
            if shape.dim % 8 or shape.hidden % 8:  # rows of a grouped GEMM begin at multiples of 16 bytes
                raise ConfigError(f"--dim {shape.dim} --hidden {shape.hidden}: must be multiples of 8")
        patterns = options.scenario or (list(QUICK) if options.quick else None)
        for shape in shapes:
            chosen(patterns, shape.experts)
        repeats = options.repeats or (3 if options.virtual_ranks else 5 if options.quick else 15)
        warmup = options.warmup or (5 if options.virtual_ranks else 40)
        return cls(shapes, patterns, options.planner, repeats, warmup, options.seed, options.kernels)
