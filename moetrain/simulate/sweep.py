"""Which layout is best: every sensible one is predicted, the ten fastest that fit are shown, and why others are not."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from moetrain.common.errors import ConfigError
from moetrain.moe.planning import find_slices
from moetrain.simulate.layer import PlannerChoice
from moetrain.simulate.layout import Layout, StepWork
from moetrain.simulate.predict import Prediction, predict
from moetrain.simulate.step import Job
from moetrain.simulate.traffic import Natural

RECOMPUTE = ("none", "selective", "full")
MICRO_BATCHES = (1, 2, 4)
MOST_SLICES = 4  # of an expert, where a group has more ranks than a layer has experts
SHOWN = 10


@dataclass(frozen=True)
class Candidate:
    """A layout and what is said of it."""

    prediction: Prediction
    reason: str


def layouts(job: Job, with_formulas: bool) -> Iterator[tuple[Layout, StepWork]]:
    """Expert-parallel sizes and replicas that divide, the job's own among them; with pipeline stages and tensor ranks
    where asked for."""
    world, shape = job.layout.world, job.shape
    most = min(world, MOST_SLICES * shape.experts)
    sizes = sorted({job.layout.ep, *(2**n for n in range(world.bit_length()) if 2**n <= most)})
    stages = [n for n in (1, 2, 4, 8, 16) if with_formulas or n == 1]
    tensor = [n for n in (1, 2, 4) if with_formulas or n == 1]
    replicas = sorted({job.layout.dp_replicate, *(n for n in (1, 2, 4, 8, 16, 32) if n <= max(1, world // 8))})
    batches = sorted({job.work.micro_batch, *MICRO_BATCHES})
    options = itertools.product(sizes, stages, tensor, replicas, batches, RECOMPUTE, (False, True))
    for ep, pp, tp, replicate, micro_batch, recompute, reshard in options:
        r = job.layout.r if ep == job.layout.ep else find_slices(shape.experts, shape.expert_hidden, ep) or 1
        layout = replace(job.layout, ep=ep, r=r, pp=pp, tp=tp, dp_replicate=replicate, virtual=1, reshard=reshard)
        work = replace(job.work, micro_batch=micro_batch, recompute=recompute)
        try:
            layout.check(shape)
            work.micro_steps(layout)
        except ConfigError:
            continue
        yield layout, work


def sweep(
    job: Job,
    routing: str,
    planner: PlannerChoice,
    seed: int,
    natural: Natural | None = None,
    with_formulas: bool = False,
    allows: Callable[[Layout, StepWork], bool] = lambda layout, work: True,
) -> tuple[list[Candidate], dict[str, int], int]:
    """(the best that fit, the fastest first; how many layouts were left out, by reason; how many fit).

    `allows`: which layouts are looked at.
    """
    found: list[Prediction] = []
    left_out: dict[str, int] = {}
    for layout, work in layouts(job, with_formulas):
        if not allows(layout, work):
            continue
        try:
            prediction = predict(replace(job, layout=layout, work=work), routing, planner, seed, 2, natural)
        except ConfigError:
            continue
        if prediction.fits:
            found.append(prediction)
        else:
            largest = max(prediction.memory.parts.items(), key=lambda item: item[1])[0]
            left_out[f"out of memory, most of it {largest}"] = (
                left_out.get(f"out of memory, most of it {largest}", 0) + 1
            )
    found.sort(key=lambda prediction: prediction.time.total)
    return [Candidate(prediction, explain(prediction)) for prediction in found[:SHOWN]], left_out, len(found)


def explain(prediction: Prediction) -> str:
    """What most of a step's time goes to besides computing."""
    parts, total = prediction.time.parts, prediction.time.total
    exchange = parts["dispatch"] + parts["combine"]
    group = prediction.job.layout.ep
    where = "between nodes" if group > prediction.job.cluster.domain else "inside a node"
    costs = {
        f"exchange {where}": exchange,
        "pipeline bubble": parts["bubble"],
        "gathers and reductions": parts["shards"],
        "waiting for the host": parts["host"],
        "recomputing": 0.0
        if prediction.job.work.recompute == "none"
        else 0.25 * (parts["attention"] + parts["experts"]),
        "lending": parts["lend"],
        "tensor parallelism": parts["tensor"],
        "the update": parts["update"],
    }
    name, seconds = max(costs.items(), key=lambda item: item[1])
    return f"{name} {100 * seconds / total:.0f} %" if seconds > 0.03 * total else "computing"
