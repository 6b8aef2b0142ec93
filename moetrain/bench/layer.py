"""`moetrain bench layer`: one MoE layer on real ranks, every routing and planner of a grid.

For every cell each repetition runs the bare GEMMs, our layer under balanced routing, and the cell; the slowest rank's
time counts. Percentages are medians of the ratios of such neighbours.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moetrain.bench import layer_peers, layer_report, virtual
from moetrain.bench.cases import LayerShape
from moetrain.bench.cell import Cell, Setup
from moetrain.bench.memory import measure_peak
from moetrain.bench.protocol import KERNELS, Grid
from moetrain.bench.tables import Records
from moetrain.bench.timing import Timed, gather_numbers, measure_spread, time_in_turns
from moetrain.common.console import errors
from moetrain.config import ConfigError
from moetrain.distributed.mesh import Mesh
from moetrain.engine import precision
from moetrain.launch import local
from moetrain.training.ranks import run_on_rank

SETTLE = 2  # runs of a cell before it is timed


def run_benchmark(options: argparse.Namespace) -> int:
    """Be a worker where a launcher made us one; else start the workers, with the same arguments.

    Returns the exit code. Raises `ConfigError` before any worker starts.
    """
    place = local.from_env()
    workers = place[1] if place else 1 if options.virtual_ranks else options.nproc or local.auto_nproc()
    grid = Grid.from_options(options, options.virtual_ranks or workers)
    if "triton" in grid.kernels and not torch.cuda.is_available():
        raise ConfigError("--kernels triton: needs a GPU")
    if options.out:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {options.out}: {error.strerror}") from None
    if place is None:
        return local.launch(options.given, workers)
    # One thread for a virtual rank: on a busy machine several wait for each other longer than they compute.
    return run_on_rank(lambda mesh: _measure_all(options, grid, mesh), place, threads=options.virtual_ranks and 1)


def _measure_all(options: argparse.Namespace, grid: Grid, mesh: Mesh) -> None:
    """Measure what was asked for on all ranks, and publish it on the first."""
    dtypes = {asked: precision.agree_on_dtype(asked, mesh) for asked in dict.fromkeys(s.dtype for s in grid.shapes)}
    grid = replace(grid, shapes=[replace(s, dtype=dtypes[s.dtype]) for s in grid.shapes])
    if options.virtual_ranks:
        found = _measure_kernels(grid, lambda backend: virtual.measure_grid(mesh, grid, options.virtual_ranks, backend))
    else:
        found = _measure_kernels(grid, lambda backend: measure_grid(mesh, grid, backend))
    others = layer_peers.measure_peers(mesh, grid) if options.peers else []
    if not mesh.is_main:
        return
    if options.json:
        print(json.dumps(found + others))
    publish = layer_report.publish_virtual if options.virtual_ranks else layer_report.publish
    for name in grid.kernels:
        publish([r for r in found if r["kernels"] == name], _make_folder(options.out, name, grid))
    layer_peers.publish(others, options.out)


def _measure_kernels(grid: Grid, measure: Callable[[str | None], Records]) -> Records:
    """Return the records with each backend of the kernels, which have its name."""
    found: Records = []
    for name in grid.kernels:
        backend = None if name == KERNELS[0] else name
        found += [{**record, "kernels": name} for record in measure(backend)]
    return found


def _make_folder(out: Path | None, name: str, grid: Grid) -> Path | None:
    """Make and return the folder where the results with one backend of the kernels go."""
    if out is None or len(grid.kernels) == 1:
        return out
    (out / name).mkdir(exist_ok=True)
    return out / name


def measure_grid(mesh: Mesh, grid: Grid, backend: str | None = None) -> Records:
    """Return one record for every shape, scenario and planner, the same on every rank; all ranks call it."""
    names = [(shape, grid.list_scenarios(shape)) for shape in grid.shapes]
    total = sum(len(scenarios) for _, scenarios in names) * len(grid.planners)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    found: Records = []
    with Progress(
        *columns, console=errors, transient=True, auto_refresh=False, disable=not mesh.is_main
    ) as progress:  # no thread of its own: it would share a core with a rank
        task = progress.add_task("", total=total)

        def show_progress(what: str, done: int) -> None:
            progress.update(task, description=what, advance=done)
            progress.refresh()

        for shape, scenarios in names:
            found += _measure_shape(mesh, shape, scenarios, grid, backend, show_progress)
    return found


def time_cells(cells: list[Cell]) -> tuple[float, float]:
    """Run every step of a workload; return mean seconds until the forward is over, and in all."""
    forward, total = zip(*(cell.time_pass() for cell in cells), strict=True)
    return statistics.mean(forward), statistics.mean(total)


def _measure_shape(
    mesh: Mesh,
    shape: LayerShape,
    scenarios: list[str],
    grid: Grid,
    backend: str | None,
    show_progress: Callable[[str, int], None],
) -> Records:
    """Return the records of one shape. `show_progress` takes what is measured, and how many cells were."""
    ep, device = mesh.ep, mesh.device
    show_progress(f"{shape}: warming up", 0)
    setup = Setup.prepare(mesh, shape, grid.seed, backend)
    gemms, reference = setup.gemms, setup.reference
    for _ in range(grid.warmup):  # until the heap has its size
        gemms.time_pass()
        reference.time_pass()
    balanced_peak = max(gather_numbers(measure_peak(reference.keep_gradients, device), mesh))
    found: Records = []
    for scenario in scenarios:
        for planner in grid.planners:
            show_progress(f"{shape}: {scenario}, {planner}", 0)
            if scenario in grid.workloads:
                cells, ideal = setup.draw_workload(scenario, planner)
            else:
                cells, ideal = [setup.draw_cell(scenario, planner)], [reference]
            for _ in range(SETTLE):
                time_cells(cells)
            passes: list[Timed] = [gemms.time_pass, partial(time_cells, ideal), partial(time_cells, cells)]
            times = time_in_turns(passes, grid.repeats, ep, device)
            gemm, balanced, this = times[:, :, 1].T
            plans = [cell.decide() for cell in cells]
            sent = [gather_numbers(cell.count_bytes(plan), mesh) for cell, plan in zip(cells, plans, strict=True)]
            time_cells(cells)
            peak = max(max(gather_numbers(measure_peak(cell.keep_gradients, device), mesh)) for cell in cells)
            share = statistics.mean(plan.loads().sum() for plan in plans) / (ep.size * shape.tokens * shape.top_k)
            found.append(
                {
                    "scenario": scenario,
                    "planner": planner,
                    "ranks": ep.size,
                    "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                    **vars(shape),
                    "repeats": grid.repeats,
                    "forward_ms": 1e3 * float(np.median(times[:, 2, 0])),
                    "total_ms": 1e3 * float(np.median(this)),
                    "percent_of_balanced": 100 * float(np.median(balanced / this)),
                    "spread": 100 * measure_spread(balanced / this),
                    "percent_of_gemm": 100 * float(np.median(share * gemm / this)),
                    "gemm_spread": 100 * measure_spread(share * gemm / this),
                    "max_over_mean": statistics.mean(float(p.loads().max() / p.loads().mean()) for p in plans),
                    "rows_crossing": round(statistics.mean(plan.crossing() for plan in plans)),
                    "bytes_crossing": round(statistics.mean(map(sum, sent))),
                    "guests": round(statistics.mean(len(plan.guests()) for plan in plans)),
                    "peak_memory_mib": peak / 2**20,
                    "memory_ratio": peak / balanced_peak,
                }
            )
            show_progress(f"{shape}: {scenario}, {planner}", 1)
    return found
