"""`moetrain bench hosts`: a layer over a real slow wire. `cli.bench.HOSTS` says what is compared."""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from moetrain.bench.cases import HOST_EXPERTS, LayerShape
from moetrain.bench.cell import Cell, Setup, describe_layer
from moetrain.bench.namespaces import Hosts, count_sent_bytes
from moetrain.bench.tables import Records, Results, Tabulated
from moetrain.bench.timing import Timed, gather_numbers, measure_spread, time_in_turns
from moetrain.common.console import console
from moetrain.distributed.comm import all_gather, waiting_at_once
from moetrain.distributed.exchange import AskedExchange, ExchangeWay
from moetrain.distributed.mesh import Mesh
from moetrain.engine import precision
from moetrain.engine.exchange import choose_exchange, expect_bytes
from moetrain.launch import local
from moetrain.moe.calibrate import measure_between
from moetrain.moe.options import CHUNKS, Chunks
from moetrain.moe.planning import count_chunks
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
    exchange: AskedExchange = "flat"
    chunks: Chunks = 1


OURS = Way("makespan", "makespan")
WAYS = (
    OURS,
    Way("home", "home"),
    Way("llep", "llep"),
    Way("makespan, order of ranks", "makespan", nearest_first=False),
    Way("makespan, no overlap", "makespan", overlap=False),
    *(Way(f"makespan, {n} chunks", "makespan", chunks=n) for n in CHUNKS[1:]),
)
WAYS_OVER_NODES = (
    Way("makespan, two_level", "makespan", exchange="two_level"),
    Way("home, two_level", "home", exchange="two_level"),
    Way("makespan, auto", "makespan", exchange="auto"),
)
COLUMNS = ("link", "routing", "way", "ms", "time, makespan = 100", "spread", "rows between hosts", "MB between hosts")
LEGEND = (
    "time: median of ratios to makespan in the same turn; spread: between their quartiles; MB: counted by the link. "
    "Workers that share a core flatter home: who has few rows leaves it to who has many. auto: the exchange that the "
    "measured links say is faster."
)


def run_benchmark(options: argparse.Namespace) -> int:
    """Be a worker on a host; else make the hosts and start the workers on them. Returns the exit code."""
    place = local.from_env()
    if place is not None:
        task = lambda mesh: _measure_and_write(options, mesh)  # noqa: E731
        return run_on_rank(task, place, threads=1, exchange="auto", flow_splits=options.flow_splits)
    found: Records = []
    with tempfile.TemporaryDirectory() as folder, Hosts() as hosts:
        os.environ.setdefault("GLIBC_TUNABLES", local.MALLOC)
        for rate in options.rate:
            hosts.limit(rate)
            path = Path(folder, f"{rate}.json")
            console.print(f"two hosts, {options.per_host} workers each, {rate}: about a minute")
            workers = hosts.start_ranks([*options.given, "--records", str(path)], options.per_host)
            if code := _wait_for_workers(workers):
                return code
            found += [{"rate": rate, **record} for record in json.loads(path.read_text())]
    if options.json:
        print(json.dumps(found))
    tabulate(found).publish(options.out)
    return 0


def _wait_for_workers(workers: list[subprocess.Popen]) -> int:
    """Return the first exit code that is not 0, as soon as there is one; 0 when all have ended well."""
    while (codes := [worker.poll() for worker in workers]).count(0) < len(codes):
        if bad := [code for code in codes if code]:
            return int(bad[0])
        time.sleep(0.1)
    return 0


def _measure_and_write(options: argparse.Namespace, mesh: Mesh) -> None:
    """Measure at one rate, on all ranks; the first writes the records where the launching process reads them."""
    dtype = precision.agree_on_dtype(options.dtype, mesh)
    shape = LayerShape(options.tokens, DIM, HIDDEN, HOST_EXPERTS, TOP_K, dtype)
    found = measure_ways(mesh, shape, options.scenario, options.per_host, options.repeats)
    if mesh.is_main:
        splits = {"flow_splits": options.flow_splits}
        options.records.write_text(json.dumps([{**record, **splits} for record in found]))


def measure_ways(mesh: Mesh, shape: LayerShape, scenarios: Sequence[str], per_host: int, repeats: int) -> Records:
    """Return one record for every scenario and way, the same on every rank."""
    setup = Setup.prepare(mesh, shape, seed=0)
    chosen: ExchangeWay = "flat"
    ways: tuple[Way, ...] = WAYS
    if mesh.exchange.is_two_level_possible:
        ways += WAYS_OVER_NODES
        with mesh.exchange.using("two_level"):
            link = measure_between(mesh, describe_layer(shape), mesh.exchange.nodes)
        costs = replace(setup.costs, two_level=link)
        chosen = choose_exchange(costs, expect_bytes(costs, shape.tokens * shape.top_k))
    found: Records = []
    for scenario in scenarios:
        cells = [replace(setup.draw_cell(scenario, way.planner), chunks=way.chunks) for way in ways]
        exchanges: list[ExchangeWay] = [chosen if way.exchange == "auto" else way.exchange for way in ways]
        passes = [_make_pass(*each, mesh) for each in zip(cells, ways, exchanges, strict=True)]
        for time_pass in passes:
            for _ in range(SETTLE):
                time_pass()
        times = time_in_turns(passes, repeats, mesh.ep, mesh.device)[:, :, 1]
        for number, (cell, way) in enumerate(zip(cells, ways, strict=True)):
            ratios = times[:, number] / times[:, 0]
            found.append(
                {
                    "scenario": scenario,
                    "way": way.name,
                    "exchange": exchanges[number],
                    "ranks": mesh.ep.size,
                    "per_host": per_host,
                    **vars(shape),
                    "repeats": repeats,
                    "total_ms": 1e3 * float(np.median(times[:, number])),
                    "percent_of_makespan_time": 100 * float(np.median(ratios)),
                    "spread": 100 * measure_spread(ratios),
                    "rows_between_hosts": _count_rows_between(_plan_way(cell, way), per_host),
                    "bytes_between_hosts": _count_bytes_between(passes[number], mesh),
                    "chunks": count_chunks(way.chunks, _plan_way(cell, way), cell.costs),
                }
            )
    return found


def _plan_way(cell: Cell, way: Way) -> Plan:
    """Return the plan of a way; all ranks call it."""
    plan = cell.decide()
    return plan if way.nearest_first else replace(plan, near=ANYWHERE)


def _make_pass(cell: Cell, way: Way, exchange: ExchangeWay, mesh: Mesh) -> Timed:
    """Return the function that runs a layer once in that way, and returns its seconds, planning included."""

    def time_pass() -> tuple[float, float]:
        with mesh.exchange.using(exchange), nullcontext() if way.overlap else waiting_at_once():
            began = time.perf_counter()
            plan = _plan_way(cell, way)
            planned = time.perf_counter() - began
            forward, both = cell.time_pass(plan)
        return planned + forward, planned + both

    return time_pass


def _count_rows_between(plan: Plan, per_host: int) -> int:
    """Return the rows computed on another host than the one they come from."""
    host_R = np.arange(plan.num_ranks) // per_host
    return sum(int(plan.rows(source)[:, host_R != host_R[source]].sum()) for source in range(plan.num_ranks))


def _count_bytes_between(time_pass: Timed, mesh: Mesh) -> int:
    """Return the bytes that one pass puts on the link, in both directions; the first rank of each host counts them."""
    before = count_sent_bytes()
    time_pass()
    all_gather(torch.zeros(1), mesh.ep.rows)  # all have sent theirs
    sent_R = gather_numbers(count_sent_bytes() - before, mesh)
    return sent_R[0] + sent_R[-1]


def _name_way(record: Mapping[str, Any]) -> str:
    """Return how a layer was run, with what was chosen where that was left open."""
    name: str = record["way"]
    if name.endswith("auto chunks"):
        return f"{name}: {record['chunks']}"
    return f"{name}: {record['exchange']}" if name.endswith("auto") else name


def tabulate(found: Records) -> Results:
    """Return the results as a table; times in milliseconds and as percentages of makespan's."""
    first = found[0]
    shape = LayerShape(**{name: first[name] for name in LayerShape.__annotations__})
    title = f"Two hosts, {first['per_host']} workers each; {shape}; forward and backward, {first['repeats']} turns"
    rows = [
        [
            r["rate"],
            r["scenario"],
            _name_way(r),
            f"{r['total_ms']:.1f}",
            f"{r['percent_of_makespan_time']:.0f}",
            f"{r['spread']:.0f}",
            f"{r['rows_between_hosts']:,}",
            f"{r['bytes_between_hosts'] / 1e6:.1f}",
        ]
        for r in found
    ]
    return Results("hosts", "A layer over a slow link", found, [Tabulated(title, COLUMNS, rows, 3)], [LEGEND])
