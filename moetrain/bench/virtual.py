"""`moetrain bench layer --virtual-ranks R`: R ranks one after another on one device.

Measured: everything a rank does by itself, in the very code that trains: index tables, packing, GEMMs, sums, forward
and backward, over its own rows, with its guests. Modelled: the links (`cost.layer_time`). The announcements that index
tables are made of are delivered truly; rows and weights that would come from other ranks are noise of the same size,
written to the receiving buffer by this device.

R ranks, E experts.
"""

import contextlib
import dataclasses
from typing import Any, cast

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from moetrain.bench import cases
from moetrain.bench.cases import BALANCED, LayerShape
from moetrain.bench.cell import Cell, Gemms, Inputs, build_experts, describe_layer
from moetrain.bench.memory import measure_peak
from moetrain.bench.protocol import Grid
from moetrain.bench.tables import Records
from moetrain.bench.timing import read_clock
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
    """A transfer that has ended; `wait` raises where announcements were missing."""

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

    def fill_with_noise(self, flat: Tensor) -> None:
        """Write noise over a flat tensor, as a transfer writes what it brings."""
        noise, whole = self._noise[flat.dtype], len(flat) // NOISE * NOISE
        flat[:whole].view(-1, NOISE).copy_(noise)
        flat[whole:].copy_(noise[: len(flat) - whole])


class VirtualLinks:
    """In place of a process group: one rank's side of every all-to-all, with nobody at the other end."""

    def __init__(self, rank: int, size: int, traffic: SharedTraffic) -> None:
        self._rank, self._size, self._traffic = rank, size, traffic

    def size(self) -> int:
        """Return the number of ranks."""
        return self._size

    def all_to_all_single(self, out: Tensor, rows: Tensor, receive: list[int], send: list[int], _: Any) -> _Transfer:
        """Do what the collective of this name does: announcements are delivered, all else is noise."""
        if rows.is_floating_point():
            self._traffic.fill_with_noise(out.view(-1))
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


def measure_grid(mesh: Mesh, grid: Grid, num_ranks: int, backend: str | None = None) -> Records:
    """Return one record for every shape, scenario and planner."""
    found: Records = []
    with Progress(console=errors, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("")
        for shape in grid.shapes:
            torch.manual_seed(grid.seed)
            costs = measure_costs(mesh, shape, num_ranks, backend)
            gemm_s = _time_gemms(shape, num_ranks, mesh.device, grid.repeats)
            inputs = Inputs.draw(shape, mesh.device)
            weights = build_experts(shape, make_group(0, num_ranks, SharedTraffic(mesh.device)), mesh.device)
            kernels = KernelChoice(backend, frozenset(costs.by_torch))
            runner = Runner(shape, num_ranks, grid, inputs, weights, costs, kernels)
            names = cases.match_scenarios(grid.patterns, shape.experts)
            reference = runner.measure_cell(BALANCED, "home")
            for done, (scenario, planner) in enumerate((s, p) for s in names for p in grid.planners):
                progress.update(task, description=f"{shape}: {scenario}, {planner}", completed=done)
                progress.update(task, total=len(names) * len(grid.planners))
                progress.refresh()
                same = (scenario, planner) == (BALANCED, "home")
                record = reference if same else runner.measure_cell(scenario, planner)
                speed = 100 * reference["total_ms"] / record["total_ms"]
                memory = record["peak_memory_mib"] / reference["peak_memory_mib"]
                own_ms = record["forward_ms"] + record["backward_ms"]
                gemm = {"gemm_ms": 1e3 * gemm_s, "percent_of_gemm": 1e5 * gemm_s / record["total_ms"]}
                gemm["percent_of_gemm_without_links"] = 1e5 * gemm_s / own_ms
                found.append({**record, "percent_of_balanced": speed, "memory_ratio": memory, **gemm})
    return found


def _time_gemms(shape: LayerShape, num_ranks: int, device: torch.device, repeats: int) -> float:
    """Return the least seconds of a balanced rank's expert GEMMs alone, forward and backward."""
    gemms = Gemms(shape, num_ranks, device)
    return min(gemms.time_pass()[1] for _ in range(1 + repeats))


def measure_costs(mesh: Mesh, shape: LayerShape, num_ranks: int, backend: str | None = None) -> Costs:
    """Return costs of a cluster of such devices: computation as measured on this one, with the experts of one of
    `num_ranks`; links, and what a guest costs besides its bytes, of the reference machine; bytes of a row as among
    `num_ranks`."""
    links = default_costs()
    layer = describe_layer(shape, -(-shape.experts // num_ranks))
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

    shape: LayerShape
    num_ranks: int
    grid: Grid
    inputs: Inputs
    weights: Experts
    costs: Costs
    kernels: KernelChoice
    _warm: bool = False

    def measure_cell(self, scenario: str, planner: str) -> dict[str, Any]:
        """Return the record of one routing and planner, without what compares it with others."""
        shape, device = self.shape, self.inputs.x_TD.device
        counts_RE = cases.count_selections(scenario, self.num_ranks, shape, self.grid.seed)
        traffic = SharedTraffic(device)
        cells = [self.draw_rank(rank, scenario, planner, traffic) for rank in range(self.num_ranks)]
        plan = cells[0].plan(counts_RE)
        for cell in cells:
            with contextlib.suppress(AnnouncementsIncomplete):
                cell.build_tables(plan)
        for _ in range(0 if self._warm else self.grid.warmup):
            cells[0].time_pass(plan)
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

    def draw_rank(self, rank: int, scenario: str, planner: str, traffic: SharedTraffic) -> Cell:
        """Return the layer of one virtual rank."""
        with torch.device("meta"):
            experts = Experts(self.shape.dim, self.shape.hidden, self.shape.experts)
        experts.shard(make_group(rank, self.num_ranks, traffic), guest_slots=self.weights.residents.slots)
        experts.gate_up, experts.down = self.weights.gate_up, self.weights.down
        use_kernels(experts, self.kernels)
        return Cell.draw(scenario, planner, self.shape, experts, self.inputs, self.costs, self.grid.seed)

    def _measure(self, cell: Cell, plan: Plan) -> dict[str, Any]:
        """Return the least seconds of one rank's parts (nothing but noise adds to them here); its rows, bytes, peak."""
        device = self.inputs.x_TD.device
        peak = measure_peak(lambda: cell.keep_gradients(plan), device)
        times = []
        for _ in range(self.grid.repeats):
            began = read_clock(device)
            cell.plan(plan.counts)
            planned = read_clock(device)
            tables = cell.build_tables(plan)
            indexed = read_clock(device)
            times.append((planned - began, indexed - planned, *cell.time_pass(plan)))
        names = ("plan", "index", "forward", "total")
        found = dict(zip(names, np.array(times).min(0).tolist(), strict=True))
        return {**found, "rows": len(tables.row_A), "sent": cell.count_bytes(plan), "peak": peak}


def make_group(rank: int, num_ranks: int, traffic: SharedTraffic) -> ExpertGroup:
    """Return the expert group of one virtual rank."""
    links = cast(Any, VirtualLinks(rank, num_ranks, traffic))
    return ExpertGroup(rank, num_ranks, rows=links, lend=links)
