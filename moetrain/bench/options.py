"""The command line of `moetrain bench layer`. No torch."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from moetrain.bench.cases import PRESETS, QUICK, Shape, chosen
from moetrain.common.errors import ConfigError
from moetrain.config.schema import Dtype

DTYPES = get_args(Dtype)
PLANNERS = ["home", "llep", "makespan"]
KERNELS = ["fastest", "torch", "triton"]  # the first: what the device uses by itself
LAYER = """Speed and memory of one MoE layer, forward and backward, under many routings and planners.

Every figure is a ratio within this run: each repetition times the bare expert GEMMs, our layer under balanced routing
and the cell in question, one after another on all ranks.

examples:
  moetrain bench layer --quick                              four routings, five repeats, two workers
  moetrain bench layer --out results/layer                  the whole grid; writes layer.json, layer.md, layer.png
  moetrain bench layer --dtype bf16 --scenario '95 %*' --planner home makespan
  moetrain bench layer --virtual-ranks 8 --shape gpt-oss-120b --quick
                                                            8 ranks one after another on one device, links modelled
  moetrain bench layer --virtual-ranks 8 --shape deepseek-v3 --quick --kernels torch triton
                                                            plain torch and Triton: sums and SwiGLU, one after the other
"""


def add_to(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES[:1], help="default: auto, the faster one here")
    add("--experts", nargs="+", type=positive, metavar="E", help="default: 16 and 64")
    add("--planner", nargs="+", metavar="NAME", default=PLANNERS, help=f"default: {', '.join(PLANNERS)}")
    add("--scenario", nargs="+", metavar="PATTERN", help="routings by name, * stands for anything; default: all")
    add("--tokens", type=positive, default=4096, help="of a rank; default: %(default)s")
    add("--dim", type=positive, help="width; default: 512")
    add("--hidden", type=positive, help="an expert's hidden width; default: 1024")
    add("--top-k", type=positive, help="selections of a token; default: 2")
    add("--shape", choices=list(PRESETS), help="width, hidden width, experts and top-k of a published model")
    add("--kernels", nargs="+", choices=KERNELS, default=KERNELS[:1], help="of sums and SwiGLU; default: %(default)s")
    add("--repeats", type=positive, help="default: 15; quick 5; virtual ranks 3")
    add("--warmup", type=positive, help="balanced layers before anything is timed; default: 40; virtual ranks 5")
    add("--quick", action="store_true", help="four routings and five repeats")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--nproc", type=positive, metavar="N", help="workers on this machine; default: one a GPU, else two")
    add("--virtual-ranks", type=positive, metavar="R", help="the parts of R ranks one after another on one device")
    add("--peers", action="store_true", help="also DeepSpeed's and Hugging Face's layers, where they are installed")
    add("--out", type=Path, metavar="FOLDER", help="write layer.json, layer.md and layer.png")
    add("--json", action="store_true", help="one JSON list")


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


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
    def of(cls, options: argparse.Namespace, num_ranks: int) -> "Grid":
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
