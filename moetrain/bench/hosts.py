"""`moetrain bench hosts`: a layer over a real slow wire. `cli.bench.HOSTS` says what is compared."""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moetrain.bench.cases import HOST_EXPERTS, Shape
from moetrain.bench.cell import Cell, Setup, interleave
from moetrain.bench.namespaces import Hosts, sent_bytes
from moetrain.bench.tables import Records, Results, Tabulated
from moetrain.common.console import console
from moetrain.distributed.comm import all_gather, waiting_at_once
from moetrain.distributed.mesh import Mesh
from moetrain.engine import precision
from moetrain.launch import local
from moetrain.moe.planning.plan import ANYWHERE, Plan
from moetrain.training.ranks import run_on_rank

DIM, HIDDEN, TOP_K = 512, 1024, 2
SETTLE = 2  # runs before anything is timed


class Way(NamedTuple):
    """How a layer is run."""

    name: str
    planner: str
    nearest_first: bool = True
    overlap: bool = True


OURS = Way("makespan", "makespan")
WAYS = (
    OURS,
    Way("home", "home"),
    Way("llep", "llep"),
    Way("makespan, order of ranks", "makespan", nearest_first=False),
    Way("makespan, no overlap", "makespan", overlap=False),
)
COLUMNS = ("link", "routing", "way", "ms", "time, makespan = 100", "spread", "rows between hosts", "MB between hosts")
LEGEND = (
    "time: median of ratios to makespan in the same turn; spread: between their quartiles; MB: counted by the link. "
    "Workers that share a core flatter home: who has few rows leaves it to who has many."
)


def run_benchmark(options: argparse.Namespace) -> int:
    """Be a worker on a host; else make the hosts and start the workers on them."""
    place = local.from_env()
    if place is not None:
        return run_on_rank(lambda mesh: _measure_and_write(options, mesh), place, threads=1)
    found: Records = []
    with tempfile.TemporaryDirectory() as folder, Hosts() as hosts:
        os.environ.setdefault("GLIBC_TUNABLES", local.MALLOC)
        for rate in options.rate:
            hosts.limit(rate)
            path = Path(folder, f"{rate}.json")
            console.print(f"two hosts, {options.per_host} workers each, {rate}: about a minute")
            workers = hosts.start_ranks([*options.given, "--records", str(path)], options.per_host)
            if code := _wait(workers):
                return code
            found += [{"rate": rate, **record} for record in json.loads(path.read_text())]
    if options.json:
        print(json.dumps(found))
    tabulate(found).publish(options.out)
    return 0


def _wait(workers: list) -> int:
    """The first exit code that is not 0, as soon as there is one."""
    while (codes := [worker.poll() for worker in workers]).count(0) < len(codes):
        if bad := [code for code in codes if code]:
            return int(bad[0])
        time.sleep(0.1)
    return 0


def _measure_and_write(options: argparse.Namespace, mesh: Mesh) -> None:
    dtype = precision.agree_on_dtype(options.dtype, mesh)
    shape = Shape(options.tokens, DIM, HIDDEN, HOST_EXPERTS, TOP_K, dtype)
    found = records(mesh, shape, options.scenario, options.per_host, options.repeats)
    if mesh.is_main:
        options.records.write_text(json.dumps(found))


def records(mesh: Mesh, shape: Shape, scenarios: Sequence[str], per_host: int, repeats: int) -> Records:
    """One record for every scenario and way, the same on every rank."""
    setup = Setup.make(mesh, shape, seed=0)
    found: Records = []
    for scenario in scenarios:
        cells = [setup.cell(scenario, way.planner) for way in WAYS]
        runs = [_timed(cell, way) for cell, way in zip(cells, WAYS, strict=True)]
        for once in runs:
            for _ in range(SETTLE):
                once()
        times = interleave(runs, repeats, mesh.ep, mesh.device)[:, :, 1]
        for number, (cell, way) in enumerate(zip(cells, WAYS, strict=True)):
            ratios = times[:, number] / times[:, 0]
            found.append(
                {
                    "scenario": scenario,
                    "way": way.name,
                    "ranks": mesh.ep.size,
                    "per_host": per_host,
                    **vars(shape),
                    "repeats": repeats,
                    "total_ms": 1e3 * float(np.median(times[:, number])),
                    "percent_of_makespan_time": 100 * float(np.median(ratios)),
                    "spread": 100 * float(np.subtract(*np.quantile(ratios, (0.75, 0.25)))),
                    "rows_between_hosts": _between(_plan(cell, way), per_host),
                    "bytes_between_hosts": _on_the_wire(runs[number], mesh),
                }
            )
    return found


def _plan(cell: Cell, way: Way) -> Plan:
    plan = cell.decide()
    return plan if way.nearest_first else replace(plan, near=ANYWHERE)


def _timed(cell: Cell, way: Way) -> Callable[[], tuple[float, float]]:
    def once() -> tuple[float, float]:
        with nullcontext() if way.overlap else waiting_at_once():
            began = time.perf_counter()
            plan = _plan(cell, way)
            planned = time.perf_counter() - began
            forward, both = cell.run(plan)
        return planned + forward, planned + both

    return once


def _between(plan: Plan, per_host: int) -> int:
    """Rows computed on another host than the one they come from."""
    host_R = np.arange(plan.num_ranks) // per_host
    return sum(int(plan.rows(source)[:, host_R != host_R[source]].sum()) for source in range(plan.num_ranks))


def _on_the_wire(once: Callable[[], Any], mesh: Mesh) -> int:
    """Bytes that one run puts on the link, in both directions, counted by the first rank of each host."""
    before = sent_bytes()
    once()
    all_gather(torch.zeros(1), mesh.ep.rows)  # all have sent theirs
    sent_R = all_gather(torch.tensor([sent_bytes() - before]), mesh.ep.rows).flatten().tolist()
    return sent_R[0] + sent_R[-1]


def tabulate(found: Records) -> Results:
    """Return the results as a table; times in milliseconds and as percentages of makespan's."""
    first = found[0]
    shape = Shape(**{name: first[name] for name in Shape.__annotations__})
    title = f"Two hosts, {first['per_host']} workers each; {shape}; forward and backward, {first['repeats']} turns"
    rows = [
        [
            r["rate"],
            r["scenario"],
            r["way"],
            f"{r['total_ms']:.1f}",
            f"{r['percent_of_makespan_time']:.0f}",
            f"{r['spread']:.0f}",
            f"{r['rows_between_hosts']:,}",
            f"{r['bytes_between_hosts'] / 1e6:.1f}",
        ]
        for r in found
    ]
    return Results("hosts", "A layer over a slow link", found, [Tabulated(title, COLUMNS, rows, 3)], [LEGEND])
