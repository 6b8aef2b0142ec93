"""The command line of `moetrain bench gpu`. No torch."""

import argparse
from pathlib import Path

from moetrain.bench.cases import PRESETS
from moetrain.bench.options import positive

GPU = """Grouped GEMMs of published models' expert layers, as a share of this device's rate for large matrices.

The rows and experts of one of 8 ranks with 8,192 tokens each, perfectly balanced; forward, and forward and backward.
A repetition times the large product and the grouped ones one after another; shares are medians of their ratios.

examples:
  moetrain bench gpu --out results/gpu                      bf16, all shapes; writes gpu.json and gpu.md
  moetrain bench gpu --scale 16 --shape gpt-oss-120b        width, hidden width and tokens sixteen times smaller: a CPU
"""


def add_to(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--shape", nargs="+", choices=list(PRESETS), default=list(PRESETS), help="default: all")
    add("--scale", type=positive, help="divides widths and tokens; default: 1, without a GPU 16")
    add("--repeats", type=positive, default=15, help="default: %(default)s")
    add("--out", type=Path, metavar="FOLDER", help="write gpu.json and gpu.md")
    add("--json", action="store_true", help="one JSON list")
