"""`moetrain bench layer --virtual-ranks R`: R ranks one after another on one device.

Measured: everything a rank does by itself, in the very code that trains: index tables, packing, GEMMs, sums, forward
and backward, over its own rows, with its guests. Modelled: the links (`cost.layer_time`). The announcements that index
tables are made of are delivered truly; rows and weights that would come from other ranks are noise of the same size,
written to the receiving buffer by this device.

R ranks, E experts.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from moetrain.bench import cases, layer_report
from moetrain.bench.cases import BALANCED, Shape
from moetrain.bench.cell import Cell, Gemms, Inputs, build, layer_of, now
from moetrain.bench.memory import peak_bytes
from moetrain.bench.options import Grid
from moetrain.bench.tables import Records, Results, Tabulated
from moetrain.common.console import errors
from moetrain.distributed.mesh import ExpertGroup, Mesh
from moetrain.engine.precision import DTYPES
from moetrain.moe import calibrate
from moetrain.moe.experts import Experts
from moetrain.moe.kernels.api import KernelChoice, use_kernels
from moetrain.moe.planning.cost import Costs, default_costs, layer_time
from moetrain.moe.planning.plan import Plan

Announcements = dict[tuple[int, int], Tensor]  # by (source, destination)
NOISE = 1 << 20


class AnnouncementsIncomplete(Exception):
    """Announcements of other ranks are missing; there is no more to be had from this rank yet."""


class _Transfer:
    def __init__(self, complete: bool) -> None:
        self._complete = complete

    def wait(self) -> None:
        if not self._complete:
            raise AnnouncementsIncomplete


class SharedTraffic:
    """What the virtual ranks share: the announcements of all of them, and noise for everything else."""

    def __init__(self, device: torch.device) -> None:
        self.announcements: Announcements = {}
        noise = torch.randn(NOISE, device=device).mul_(0.1)
        self._noise = {dtype: noise.to(dtype) for dtype in DTYPES.values()}

    def fill(self, flat: Tensor) -> None:
        noise, whole = self._noise[flat.dtype], len(flat) // NOISE * NOISE
        flat[:whole].view(-1, NOISE).copy_(noise)
        flat[whole:].copy_(noise[: len(flat) - whole])


class VirtualLinks:
    """In place of a process group: one rank's side of every all-to-all, with nobody at the other end."""

    def __init__(self, rank: int, size: int, traffic: SharedTraffic) -> None:
        self._rank, self._size, self._traffic = rank, size, traffic

    def size(self) -> int:
        return self._size

    def all_to_all_single(self, out: Tensor, rows: Tensor, receive: list[int], send: list[int], _: Any) -> _Transfer:
        if rows.is_floating_point():
            self._traffic.fill(out.view(-1))
            return _Transfer(complete=True)
        sent = self._traffic.announcements
        for to, part in enumerate(rows.split(send)):
            sent[self._rank, to] = part
        parts = [sent[source, self._rank] for source in range(self._size) if (source, self._rank) in sent]
        complete = len(parts) == self._size
        if complete:
            torch.cat(parts, out=out)
        return _Transfer(complete)

    alltoall_base = all_to_all_single  # its name in older versions of torch


def records(mesh: Mesh, grid: Grid, num_ranks: int, backend: str | None = None) -> Records:
    """One record for every shape, scenario and planner."""
    found: Records = []
    with Progress(console=errors, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("")
        for shape in grid.shapes:
            torch.manual_seed(grid.seed)
            costs = measure_costs(mesh, shape, num_ranks, backend)
            gemm_s = gemm_seconds(shape, num_ranks, mesh.device, grid.repeats)
            inputs = Inputs.draw(shape, mesh.device)
            weights = build(shape, make_group(0, num_ranks, SharedTraffic(mesh.device)), mesh.device)
            kernels = KernelChoice(backend, frozenset(costs.by_torch))
            runner = Runner(shape, num_ranks, grid, inputs, weights, costs, kernels)
            names = cases.chosen(grid.patterns, shape.experts)
            reference = runner.cell(BALANCED, "home")
            for done, (scenario, planner) in enumerate((s, p) for s in names for p in grid.planners):
                progress.update(task, description=f"{shape}: {scenario}, {planner}", completed=done)
                progress.update(task, total=len(names) * len(grid.planners))
                progress.refresh()
                same = (scenario, planner) == (BALANCED, "home")
                record = reference if same else runner.cell(scenario, planner)
                speed = 100 * reference["total_ms"] / record["total_ms"]
                memory = record["peak_memory_mib"] / reference["peak_memory_mib"]
                own_ms = record["forward_ms"] + record["backward_ms"]
                gemm = {"gemm_ms": 1e3 * gemm_s, "percent_of_gemm": 1e5 * gemm_s / record["total_ms"]}
                gemm["percent_of_gemm_without_links"] = 1e5 * gemm_s / own_ms
                found.append({**record, "percent_of_balanced": speed, "memory_ratio": memory, **gemm})
    return found


def gemm_seconds(shape: Shape, num_ranks: int, device: torch.device, repeats: int) -> float:
    """Least seconds of a balanced rank's expert GEMMs alone, forward and backward."""
    gemms = Gemms(shape, num_ranks, device)
    return min(gemms.run()[1] for _ in range(1 + repeats))


def measure_costs(mesh: Mesh, shape: Shape, num_ranks: int, backend: str | None = None) -> Costs:
    """Computation as measured on this device, with the experts of one of `num_ranks`; links, and what a guest costs
    besides its bytes, of the reference machine; the weight of a row as among `num_ranks`."""
    links = default_costs()
    layer = layer_of(shape, -(-shape.experts // num_ranks))
    return dataclasses.replace(
        calibrate.measure(mesh, layer, backend),
        row_bytes=layer.row_bytes(num_ranks),
        inside=links.inside,
        between=links.between,
        overlap=links.overlap,
        handling=links.handling,
        nodes=links.nodes,
    )


@dataclasses.dataclass
class Runner:
    """All virtual ranks of one shape. They share one rank's weights and tokens: only the selections differ."""

    shape: Shape
    num_ranks: int
    grid: Grid
    inputs: Inputs
    weights: Experts
    costs: Costs
    kernels: KernelChoice
    _warm: bool = False

    def cell(self, scenario: str, planner: str) -> dict[str, Any]:
        shape, device = self.shape, self.inputs.x_TD.device
        counts_RE = cases.counts(scenario, self.num_ranks, shape, self.grid.seed)
        traffic = SharedTraffic(device)
        cells = [self._rank(rank, scenario, planner, traffic) for rank in range(self.num_ranks)]
        plan = cells[0].plan(counts_RE)
        for cell in cells:
            with contextlib.suppress(AnnouncementsIncomplete):
                cell.build_tables(plan)
        for _ in range(0 if self._warm else self.grid.warmup):
            cells[0].run(plan)
        self._warm = True
        parts = [self._measure(cell, plan) for cell in cells]
        modelled = layer_time(plan, counts_RE, self.weights.home, self.costs)
        slowest = max(parts, key=lambda part: part["total"])
        links = modelled.dispatch + modelled.lend + modelled.combine
        plan_s = max(part["plan"] for part in parts)
        return {
            "scenario": scenario,
            "planner": planner,
            "ranks": self.num_ranks,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            **vars(shape),
            "repeats": self.grid.repeats,
            "rows": [part["rows"] for part in parts],
            "max_over_mean": float(plan.loads().max() / plan.loads().mean()),
            "plan_ms": 1e3 * plan_s,
            "index_ms": 1e3 * max(part["index"] for part in parts),
            "forward_ms": 1e3 * slowest["forward"],
            "backward_ms": 1e3 * (slowest["total"] - slowest["forward"]),
            "dispatch_ms": 1e3 * modelled.dispatch,
            "lend_ms": 1e3 * modelled.lend,
            "combine_ms": 1e3 * modelled.combine,
            "total_ms": 1e3 * (plan_s + slowest["total"] + links),
            "rows_crossing": plan.crossing(),
            "bytes_crossing": sum(part["sent"] for part in parts),
            "guests": len(plan.guests()),
            "peak_memory_mib": max(part["peak"] for part in parts) / 2**20,
        }

    def _rank(self, rank: int, scenario: str, planner: str, traffic: SharedTraffic) -> Cell:
        with torch.device("meta"):
            experts = Experts(self.shape.dim, self.shape.hidden, self.shape.experts)
        experts.shard(make_group(rank, self.num_ranks, traffic), guest_slots=self.weights.residents.slots)
        experts.gate_up, experts.down = self.weights.gate_up, self.weights.down
        use_kernels(experts, self.kernels)
        return Cell.draw(scenario, planner, self.shape, experts, self.inputs, self.costs, self.grid.seed)

    def _measure(self, cell: Cell, plan: Plan) -> dict[str, Any]:
        """Least seconds of one rank's parts (nothing but noise adds to them here); its rows, bytes to send, peak."""
        device = self.inputs.x_TD.device
        peak = peak_bytes(lambda: cell.hold(plan), device)
        times = []
        for _ in range(self.grid.repeats):
            began = now(device)
            cell.plan(plan.counts)
            planned = now(device)
            tables = cell.build_tables(plan)
            indexed = now(device)
            times.append((planned - began, indexed - planned, *cell.run(plan)))
        names = ("plan", "index", "forward", "total")
        found = dict(zip(names, np.array(times).min(0).tolist(), strict=True))
        return {**found, "rows": len(tables.row_A), "sent": cell.bytes_sent(plan), "peak": peak}


def make_group(rank: int, num_ranks: int, traffic: SharedTraffic) -> ExpertGroup:
    links = cast(Any, VirtualLinks(rank, num_ranks, traffic))
    return ExpertGroup(rank, num_ranks, rows=links, lend=links)


LINKS = "links: nodes of 8 with NVLink at 300 GB/s, 33 GB/s between nodes (cost.layer_time)"
MEASURED = ("plan", "index", "forward", "backward")  # index is part of forward
MODELLED = ("dispatch", "lend", "combine")


def publish(records: Records, out: Path | None) -> None:
    """Print the tables and the summary; with a folder, write layer.json, layer.md and layer.png."""
    tables = [table for group in layer_report.group_by_shape(records) for table in _tabulate(group)]
    results = Results(
        "layer", "One MoE layer, virtual ranks", records, tables, [LINKS, *layer_report.summarize(records)]
    )
    results.publish(out, partial(layer_report.draw, records))


def _tabulate(group: Records) -> list[Tabulated]:
    """Return a table of what was measured, and one of what was modelled with it."""
    title = (
        f"{layer_report.describe_shape(group)}\nmeasured, one rank after another: ms of the slowest rank (index "
        f"is part of forward); GEMMs alone: {group[0]['gemm_ms']:,.2f} ms for a balanced rank, as % of forward and "
        "backward"
    )
    measured, modelled = [], []
    for r in group:
        cell = [r["scenario"], r["planner"]]
        shares = (f"{r['percent_of_gemm_without_links']:.1f}", f"{r['max_over_mean']:.2f}", f"{r['memory_ratio']:.2f}")
        measured.append([*cell, *_milliseconds(r, MEASURED), *shares])
        total = (f"{r['total_ms']:,.2f}", f"{r['percent_of_balanced']:.1f}")
        modelled.append([*cell, *_milliseconds(r, MODELLED), f"{r['rows_crossing']:,}", str(r["guests"]), *total])
    left = ("routing", "planner")
    columns = (*left, *MODELLED, "rows crossing", "guests", "predicted ms", "% of balanced")
    return [
        Tabulated(title, (*left, *MEASURED, "GEMMs alone", "max/mean", "memory × balanced"), measured, num_left=2),
        Tabulated("modelled: ms; predicted: plan + forward + backward + links", columns, modelled, num_left=2),
    ]


def _milliseconds(record: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{record[f'{name}_ms']:,.2f}" for name in names]
