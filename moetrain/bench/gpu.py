"""`moetrain bench gpu`: the expert GEMMs of published models on one device, against its rate for large matrices.

No ranks: what one of RANKS has to compute when loads are even. This is the ceiling of the layer's own kernels;
`bench layer --virtual-ranks` measures those.
"""

import argparse
import json
from typing import Any

import numpy as np
import torch

from moetrain.bench.cases import PRESETS, LayerShape
from moetrain.bench.cell import Gemms
from moetrain.bench.tables import Records, Results, Tabulated
from moetrain.bench.timing import find_quartiles, read_clock

RANKS, TOKENS = 8, 8192  # of the cluster that the device stands for; of each rank
LARGE = {"cuda": 8192, "cpu": 1024}  # side of the square product that is the measure
PRODUCTS = 4  # of them between two looks at the clock
SETTLE = 3


def run_benchmark(options: argparse.Namespace) -> int:
    """Measure the shapes that were asked for, print and write what was found. Returns the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scale = options.scale or (1 if device.type == "cuda" else 16)
    found = [measure_gemms(name, scale_preset(name, scale), device, options.repeats) for name in options.shape]
    if options.json:
        print(json.dumps(found))
    tabulate(found).publish(options.out)
    return 0


def scale_preset(name: str, scale: int) -> LayerShape:
    """Return a published layer with its widths and tokens divided by `scale`; widths stay multiples of 8, as a grouped
    GEMM wants them."""
    dim, hidden, experts, top_k = PRESETS[name]
    tokens, dim, hidden = max(1, TOKENS // scale), *(max(8, size // scale // 8 * 8) for size in (dim, hidden))
    return LayerShape(tokens, dim, hidden, experts, top_k, "bf16")


def measure_gemms(name: str, shape: LayerShape, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the record of one layer: medians of milliseconds, of rates in TFLOP/s, and of shares of the large
    product's rate in %."""
    torch.manual_seed(0)
    gemms, side = Gemms(shape, RANKS, device), LARGE[device.type]
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    times = []
    for _ in range(SETTLE + repeats):
        began = read_clock(device)
        for _ in range(PRODUCTS):
            torch.mm(left, right, out=out)
        large = read_clock(device) - began
        forward, total = gemms.time_pass()
        times.append((large, forward, total - forward, total))
    flops = 2 * shape.tokens * shape.top_k * shape.weights  # of the forward; the backward takes twice as many
    work = np.array([PRODUCTS * 2 * side**3, flops, 2 * flops, 3 * flops])
    rates = work / np.array(times[SETTLE:])
    shares = 100 * rates / rates[:, :1]
    found: dict[str, Any] = {
        "model": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **vars(shape),
        "experts_here": shape.experts // RANKS,
        "rows_here": shape.tokens * shape.top_k,
        "repeats": repeats,
        "large_side": side,
    }
    for part, label in enumerate(("large", "forward", "backward", "total")):
        found[f"{label}_ms"] = 1e3 * float(np.median(np.array(times[SETTLE:])[:, part]))
        found[f"{label}_tflops"] = float(np.median(rates[:, part])) / 1e12
        if part:
            low, middle, high = find_quartiles(shares[:, part])
            found |= {f"{label}_percent": middle, f"{label}_quartiles": [low, high]}
    return found


COLUMNS = ("model", "D × H", "experts", "rows", "large", "forward", "backward", "both")
LEGEND = "D × H: width × hidden width. experts, rows: of this device. large: TFLOP/s of the large product."


def tabulate(found: Records) -> Results:
    """Return the results as a table; shares of a rate in per cent, times in milliseconds."""
    first = found[0]
    title = (
        f"bf16 grouped GEMMs of one of {RANKS} ranks on {first['device']}, torch {first['torch']}, "
        f"{first['repeats']} repeats: % of the rate of {first['large_side']}³ products"
    )
    rows = [
        [
            r["model"],
            f"{r['dim']} × {r['hidden']}",
            f"{r['experts_here']}",
            f"{r['rows_here']:,}",
            f"{r['large_tflops']:,.3g}",
            *(f"{r[f'{part}_percent']:.1f} % ({r[f'{part}_ms']:,.1f} ms)" for part in ("forward", "backward", "total")),
        ]
        for r in found
    ]
    return Results("gpu", "Grouped GEMMs", found, [Tabulated(title, COLUMNS, rows)], [LEGEND])
