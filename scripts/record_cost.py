"""What recording costs: whole steps with and without it in turn, in one process a rank, under torchrun.

    torchrun --nproc-per-node 2 -m scripts.record_cost train.threads=1 run.name=cost

Overrides as for `moetrain train`. Every other pair of steps records: sums over router logits, a row of metrics to all
sinks, samples of the load trace. The time of a step is the processor's on this rank (`cpu`: other programs do not
disturb it) and the clock's; a ratio is that of two neighbouring steps.
"""

import os
import statistics
import sys
import time
from collections.abc import Sequence

from moetrain import config, runs
from moetrain.config import Config
from moetrain.data.opening import open_data
from moetrain.distributed.comm import barrier
from moetrain.distributed.mesh import Mesh
from moetrain.engine import build_engine, precision, saved_costs
from moetrain.launch import local
from moetrain.moe.clock import Clock
from moetrain.moe.layer import LayerStats
from moetrain.observe.collect.health import RouterSums
from moetrain.observe.recorder import Recorder
from moetrain.training import step as step_module
from moetrain.training.ranks import run_on_rank
from moetrain.training.step import build, micro_batches, optimizer_step

PAIRS = int(os.environ.get("PAIRS", "30"))
WARMUP = 8  # steps


class Switch:
    """Stands in for `RouterSums` in the training step: what it says is worked out, or that of the step before."""

    def __init__(self) -> None:
        self.on = True
        self.last: RouterSums | None = None

    def of(self, stats: Sequence[LayerStats]) -> RouterSums:
        if self.on or self.last is None:
            self.last = RouterSums.collect(stats)
        return self.last


def measure(settings: Config, joined: Mesh) -> dict[str, list[float]]:
    """Ratios of neighbouring steps, with over without."""
    corpus, loader = open_data(settings)
    spec = config.resolve(settings, joined.world, corpus.vocab_size, precision.find_dtype(settings, joined))
    folder, switch = runs.folder_of(spec), Switch()
    step_module.RouterSums = switch  # type: ignore[assignment, misc]
    if joined.is_main:
        runs.create(spec)
    barrier()
    engine = build_engine(build(spec), joined, spec)
    engine.plan_with(saved_costs.obtain(joined, saved_costs.layer_of(spec), folder))
    times: dict[str, dict[bool, list[float]]] = {way: {True: [], False: []} for way in ("cpu", "clock")}
    batch = spec.train.global_batch
    with Recorder(spec, joined, folder, 0, corpus.domains, engine.model) as recorder:
        for step in range(1, WARMUP + 2 * PAIRS + 1):
            switch.on = step <= WARMUP or step % 4 in (1, 2)
            shares = list(micro_batches(spec, joined, loader, (step - 1) * batch))
            barrier()
            cpu, clock = time.process_time(), time.perf_counter()
            done = optimizer_step(engine, spec, shares, 1e-4, Clock(joined.device))
            if switch.on:
                metrics = recorder.read(step, done, always=True)
                metrics |= {"train/grad_norm": done.norm, "perf/step_seconds": 1.0, "perf/tokens_per_second": 1.0}
                recorder.log(step, metrics)
            cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
            barrier()
            if step > WARMUP:
                times["cpu"][switch.on].append(cpu)
                times["clock"][switch.on].append(clock)
    return {way: [a / b for a, b in zip(both[True], both[False], strict=True)] for way, both in times.items()}


def main() -> None:
    settings = config.load(sys.argv[1:])
    place = local.from_env()
    if place is None:
        raise SystemExit("error: start it with torchrun")
    ep, replicas = config.find_ep(settings, place.world), settings.parallel.dp_replicate

    def measure_and_print(mesh: Mesh) -> None:
        for way, ratios in measure(settings, mesh).items():
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"rank {mesh.rank} {way:5} with/without {middle:.4f} ({low:.4f} to {high:.4f}), {len(ratios)} pairs")

    threads = settings.train.threads or 1
    sys.exit(run_on_rank(measure_and_print, place, ep=ep, dp_replicate=replicas, threads=threads))


if __name__ == "__main__":
    main()
