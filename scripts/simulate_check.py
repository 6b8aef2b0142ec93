"""Predicted beside measured step times and peak memory on this machine: needs it quiet.

  python scripts/simulate_check.py --dir build/simulate                # all layouts, three repeats in turns
  python scripts/simulate_check.py --dir build/simulate --only 2 --repeats 2      # a rehearsal

Every layout is a short `moetrain train` in a process of its own; repeats go round all layouts, so that what drifts
drifts for all. A run's figure is the median of its steps after the first few, a layout's the median of its repeats; the
noise floor is the median distance of a repeat from its layout's median. Four figures of `cluster=here` (the rates of
dense products and of attention, memory's bandwidth, the host's time of an operation) and two of memory are fit to every
other layout, and errors are reported on the rest. Routing is each run's own load trace.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from moetrain.simulate import request
from moetrain.simulate.memory import predict_memory
from moetrain.simulate.step import predict_step
from moetrain.simulate.traffic import RoutingSource, find_routing

COMMON = ["data=local", "track.wandb=false", "track.trace_every=2", "eval.tokens_per_domain=512", "generate.tokens=2"]
LAYOUTS: dict[str, list[str]] = {
    "small, 2 ranks, ep 2": ["model=small", "parallel.nproc=2", "parallel.ep=2"],
    "small, 2 ranks, ep 2, skew": ["model=small", "parallel.nproc=2", "parallel.ep=2", "router.skew=3"],
    "small, 2 ranks, ep 2, skew, home": [
        *("model=small", "parallel.nproc=2", "parallel.ep=2", "router.skew=3", "planner=home"),
    ],
    "small, 2 ranks, ep 1": ["model=small", "parallel.nproc=2", "parallel.ep=1"],
    "small, 2 ranks, recompute": ["model=small", "parallel.nproc=2", "parallel.ep=2", "train.recompute=full"],
    "small, 2 ranks, two micro-steps": ["model=small", "parallel.nproc=2", "parallel.ep=2", "train.micro_batch=4"],
    "small, 4 ranks, ep 4": ["model=small", "parallel.nproc=4", "parallel.ep=4"],
    "small, 4 ranks, ep 2, skew": ["model=small", "parallel.nproc=4", "parallel.ep=2", "router.skew=3"],
    "tiny, 2 ranks, ep 2": ["model=tiny", "parallel.nproc=2", "parallel.ep=2"],
    "tiny, 2 ranks, ep 2, skew, llep": [
        *("model=tiny", "parallel.nproc=2", "parallel.ep=2", "router.skew=3", "planner=llep"),
    ],
    "tiny, 4 ranks, ep 4": ["model=tiny", "parallel.nproc=4", "parallel.ep=4"],
    "tiny, 4 ranks, ep 2, recompute": ["model=tiny", "parallel.nproc=4", "parallel.ep=2", "train.recompute=full"],
    "tiny, 2 ranks, selective, long": [
        *("model=tiny", "parallel.nproc=2", "parallel.ep=2", "train.recompute=selective", "train.seq_len=512"),
    ],
    "small, 2 ranks, more experts": ["model=small", "parallel.nproc=2", "parallel.ep=2", "model.num_experts=16"],
}
NO_SIMULATION = ("parallel.nproc=", "router.skew=")
GRID = [2.0 ** (n / 8) for n in range(-16, 17)]


@dataclass(frozen=True)
class Figures:
    """What is fit: factors on figures of `cluster=here`, and two terms of memory."""

    dense: float = 1.0
    attention: float = 1.0
    memory: float = 1.0
    host: float = 1.0
    turn: float = 1.0


@dataclass(frozen=True)
class Run:
    """One run of a layout."""

    name: str
    seconds: float
    bytes: float


def measure(name: str, number: int, folder: Path, options: argparse.Namespace) -> Run:
    """Train a few steps of the layout; what it took."""
    run = f"{number:02d}-{''.join(c if c.isalnum() else '-' for c in name)}"
    command = [sys.executable, "-m", "moetrain", "train", *LAYOUTS[name], *COMMON, f"train.steps={options.steps}"]
    command += [f"run.dir={folder}", f"run.name={run}", f"train.dtype={options.dtype}", "train.global_batch=16"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "perf/step_seconds" in row][options.skip :]
    seconds = statistics.median(row["perf/step_seconds"] for row in steps)
    return Run(run, seconds, max(row["perf/peak_memory_gib"] for row in steps) * 2**30)


@cache
def prepare(name: str, run: Path, dtype: str) -> tuple[request.Request, RoutingSource]:
    """What the simulator is asked for a layout, with the costs and the load trace of one of its runs."""
    words = [word for word in LAYOUTS[name] if not word.startswith(NO_SIMULATION)]
    world = next(word.partition("=")[2] for word in LAYOUTS[name] if word.startswith("parallel.nproc="))
    words += [] if any(word.startswith("train.seq_len=") for word in words) else ["train.seq_len=256"]
    words += [f"cluster=herex{world}", f"cluster.costs={run / 'costs.json'}", "train.global_batch=16"]
    words += [f"train.dtype={dtype}"]
    asked = request.read(words)
    return asked, find_routing(str(run), asked.job.group, asked.natural)


def predicted(name: str, run: Path, figures: Figures, options: argparse.Namespace) -> tuple[float, float]:
    """(seconds of a step, bytes of the fullest rank) of a layout."""
    asked, routing = prepare(name, run, options.dtype)
    cluster = asked.job.cluster
    cluster = cluster.model_copy(
        update={
            "peak": {key: value * figures.dense for key, value in cluster.peak.items()},
            "gemm": cluster.gemm.model_copy(update={"attention": cluster.gemm.attention * figures.attention}),
            "memory": cluster.memory.model_copy(update={"bandwidth": cluster.memory.bandwidth * figures.memory}),
            "host": cluster.host.model_copy(
                update={"launch": cluster.host.launch * figures.host, "turn": cluster.host.turn * figures.turn}
            ),
        }
    )
    job = replace(asked.job, cluster=cluster)
    time = predict_step(job, routing, asked.planner)
    return float(time.total), predict_memory(job, time.layers, routing.is_drawn).total


def fit(names: Sequence[str], found: dict[str, list[Run]], folder: Path, options: argparse.Namespace) -> Figures:
    """The factors with the least squared relative error on these layouts, on a grid, one after the other."""
    best, least = Figures(), math.inf
    for _ in range(3):
        for field in ("dense", "attention", "memory", "host", "turn"):
            for factor in GRID:
                trial = replace(best, **{field: factor})
                total = 0.0
                for name in names:
                    seconds, _ = predicted(name, folder / found[name][0].name, trial, options)
                    total += math.log(seconds / statistics.median(r.seconds for r in found[name])) ** 2
                if total < least - 1e-12:
                    best, least = trial, total
    return best


def fit_memory(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(bytes besides, factor) by least squares of (predicted, measured); factor 1 for one pair."""
    if len(pairs) == 1:
        return pairs[0][1] - pairs[0][0], 1.0
    mean_p, mean_m = (statistics.mean(pair[side] for pair in pairs) for side in (0, 1))
    spread = sum((p - mean_p) ** 2 for p, _ in pairs)
    factor = sum((p - mean_p) * (m - mean_m) for p, m in pairs) / spread if spread else 1.0
    return mean_m - factor * mean_p, factor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, metavar="FOLDER", help="where the runs go")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--skip", type=int, default=4, help="steps of a run that are not timed")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--only", type=int, help="the first so many layouts")
    options = parser.parse_args()
    names = list(LAYOUTS)[: options.only]
    found: dict[str, list[Run]] = {name: [] for name in names}
    options.dir.mkdir(parents=True, exist_ok=True)
    for repeat, (number, name) in itertools.product(range(options.repeats), enumerate(names)):
        found[name].append(measure(name, repeat * len(names) + number, options.dir, options))
    fitted, held = names[::2], names[1::2]
    figures = fit(fitted, found, options.dir, options)
    results = {name: predicted(name, options.dir / found[name][0].name, figures, options) for name in names}
    peaks = {name: statistics.median(r.bytes for r in found[name]) for name in names}
    besides, factor = fit_memory([(results[name][1], peaks[name]) for name in fitted])

    noise = []
    errors: dict[str, list[float]] = {"time": [], "memory": []}
    print("| layout | use | measured ms | repeats | predicted ms | error | measured GiB | predicted GiB | error |")
    print("|" + " --- |" * 9)
    for name in names:
        times = [r.seconds for r in found[name]]
        middle = statistics.median(times)
        noise += [abs(t / middle - 1) for t in times]
        seconds, memory = results[name][0], besides + factor * results[name][1]
        time_error, memory_error = seconds / middle - 1, memory / peaks[name] - 1
        if name in held:
            errors["time"].append(abs(time_error))
            errors["memory"].append(abs(memory_error))
        repeats = " ".join(f"{1e3 * t:.0f}" for t in times)
        cells = [name, "held out" if name in held else "fit", f"{1e3 * middle:.0f}", repeats, f"{1e3 * seconds:.0f}"]
        cells += [f"{100 * time_error:+.0f} %", f"{peaks[name] / 2**30:.2f}", f"{memory / 2**30:.2f}"]
        print(f"| {' | '.join(cells)} | {100 * memory_error:+.0f} % |")
    off, most = 100 * statistics.median(noise), 100 * max(noise)
    print(f"\nnoise floor: a repeat is {off:.1f} % off its layout's median, at most {most:.1f} %")
    for what, values in errors.items():
        print(
            f"{what}, held out: median error {100 * statistics.median(values):.1f} %, worst {100 * max(values):.1f} %"
        )
    print(f"fit to {len(fitted)} layouts: {figures}; memory: {besides / 2**30:.2f} GiB + {factor:.2f} × predicted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
