"""Whole runs of `moetrain train` for `scripts/gpu_parts.py`: GPU against CPU, ranks that share a card against one."""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from moetrain import config
from moetrain.data import prepare
from moetrain.distributed.mesh import Mesh
from tests.conftest import TINY, write_text
from tests.pool import Pool
from tests.system import test_layouts as layouts

Part = tuple[str, Sequence[str], list[list[str]], str]  # title, columns, rows, legend
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
NEAR = {"fp32": 1e-4, "bf16": 1e-2}  # of a loss or a gradient norm, relative to that of the first run
COMMON = ["model=tiny", "train.seq_len=64", "train.global_batch=8", "eval.tokens_per_domain=256", "generate.tokens=4"]
RECOMPUTE = ("none", "selective", "full")
WEIGHTS_NEAR = 1e-3  # AdamW divides tiny gradients by their own size
FAILED: list[str] = []  # what is to be said at the end, with exit code 1


@dataclass(frozen=True)
class Run:
    """One run of `moetrain train`, and how near it has to come to the first one."""

    name: str
    overrides: list[str]
    near: float = NEAR["fp32"]
    environment: dict[str, str] = field(default_factory=dict)


def train_all(runs: list[Run]) -> dict[str, list[dict[str, float]]]:
    """Return the lines of metrics of every run that came to its end, by its name; all run at the same time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for domain in ("one", "two"):
            (folder / "text" / domain).mkdir(parents=True)
            for number in range(24):
                words = np.random.default_rng((domain == "one", number)).choice(WORDS, 400)
                (folder / "text" / domain / f"{number}.txt").write_text(" ".join(words))
        data = ["data=folder", f"data.path={folder}/text", f"data.dir={folder}/corpora", "data.vocab_size=400"]
        moetrain = [sys.executable, "-m", "moetrain"]
        subprocess.run([*moetrain, "data", *data], check=True)
        working = {}
        for run in runs:
            named = f"run.name={run.name.replace(' ', '_')}"
            command = [*moetrain, "train", *COMMON, *data, *run.overrides, f"run.dir={folder}/runs", named]
            with (folder / f"{run.name}.log").open("w") as log:
                environment = {**os.environ, **run.environment}
                working[run.name] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        found = {}
        for run_name, process in working.items():
            if code := process.wait():
                log_text = (folder / f"{run_name}.log").read_text()[-4000:]
                print(f"== {run_name} ended with {code}\n{log_text}", file=sys.stderr)
                FAILED.append(run_name)
                continue
            lines = (folder / "runs" / run_name.replace(" ", "_") / "metrics.jsonl").read_text().splitlines()
            found[run_name] = [row for row in map(json.loads, lines) if "train/lm_loss" in row]
    return found


def compare_to_first(runs: list[Run], found: dict[str, list[dict[str, float]]], key: str) -> dict[str, float]:
    """Return the largest relative difference of a metric from that of the first run; note who is off by too much."""
    off = {}
    for run in runs:
        if run.name in found:
            ours, first = ([row[key] for row in found.get(name, [])] for name in (run.name, runs[0].name))
            off[run.name] = max(abs(a / b - 1) for a, b in zip(ours, first or ours, strict=True))
            if off[run.name] > run.near:
                FAILED.append(f"{run.name}: {key} is off by {off[run.name]:.1e}")
    return off


def compare_devices(device: torch.device, tiny: bool) -> Part:
    """Run in fp32 and bf16 here, and in fp32 on the CPU, with the same seed."""
    common = ["train.steps=12", "parallel.nproc=1", "train.threads=2"]
    runs = [
        Run("cpu fp32", [*common, "train.dtype=fp32"], environment={"CUDA_VISIBLE_DEVICES": ""}),
        Run("fp32", [*common, "train.dtype=fp32"]),
        Run("bf16", [*common, "train.dtype=bf16"], NEAR["bf16"]),
    ]
    found = train_all(runs)
    off = compare_to_first(runs, found, "train/lm_loss")
    rows = []
    for run in (run for run in runs if run.name in found):
        first, last = (found[run.name][at]["train/lm_loss"] for at in (0, -1))
        rows.append([run.name, f"{first:.6f}", f"{last:.6f}", f"{off[run.name]:.1e}", f"{run.near:.0e}"])
    title = "`moetrain train model=tiny`, 12 steps, one rank, the same seed"
    columns = ("run", "first loss", "last loss", "largest relative difference from the CPU", "allowed")
    return title, columns, rows, "fp32 without TF32: the same up to the order of sums."


def find_steps(mesh: Mesh, overrides: list[str]) -> layouts.Found:
    """Return what a few optimizer steps on this rank come to, in host memory."""
    warnings.simplefilter("default")
    found = layouts.steps(mesh, overrides)
    on_host = [{name: x.cpu() for name, x in tensors.items()} for tensors in found[:3]]
    return layouts.Found(*on_host, *found[3:])


def compare_ranks(device: torch.device, tiny: bool) -> Part:
    """Three steps on 2 and 4 ranks that share the card, under skew and every recompute, against those of one rank."""
    rows, pool = [], Pool()
    with tempfile.TemporaryDirectory() as name:
        write_text(Path(name, "text"))
        data = ["data=folder", f"data.path={name}/text", f"data.dir={name}/corpora", "data.vocab_size=300"]
        prepare.ensure(config.load(data).data)
        for ranks, top_k in ((2, 2), (4, 1)):  # one hot expert has a guest on each of three ranks, which are relayed
            common = [*TINY, *data, "router.skew=6", f"router.top_k={top_k}"]
            first: layouts.Found | None = None
            for recompute in ("none", *(RECOMPUTE[-1:] if tiny else RECOMPUTE)):
                of_one = first is None
                layout = layouts.ONE if of_one else layouts.Layout(ranks, ranks, planner="llep")
                overrides = [*common, *layouts.overrides_of(layout, 1 if of_one else 3), "router.skew=6"]
                overrides.append(f"train.recompute={recompute}")
                began = time.monotonic()
                found = pool.run(find_steps, layout.ranks, overrides, ep=layout.ep)[0]
                first = first or found
                gradient, weight = layouts.differences(found, first)
                label = f"{layout.ranks} ranks, top-{top_k}, recompute {recompute}"
                if gradient > NEAR["fp32"] or weight > WEIGHTS_NEAR or (found.guests == 0) != of_one:
                    FAILED.append(f"{label}: {gradient:.1e}, {weight:.1e}, {found.guests} guests")
                rows.append([label, f"{gradient:.1e}", f"{weight:.1e}", str(found.guests)])
                print(*rows[-1], f"{time.monotonic() - began:.1f} s", sep=", ", flush=True)
    pool.stop()
    title = "Ranks that share one card: three steps of a tiny model in fp32 under skew, against one rank"
    columns = ("layout", "gradients of the first step", "weights after three", "guests")
    legend = (
        f"Differences of the worst parameter: gradients relative to the largest ({NEAR['fp32']:g} at most), weights to "
        f"what training changed ({WEIGHTS_NEAR:g}). Collectives through host memory (gloo): correctness only. With 4 "
        "ranks guests are relayed."
    )
    return title, columns, rows, legend
