"""`moetrain bench step`: whole training steps, natural routing against perfect balance.

One engine, one model, one set of process groups. A variant is a router's choice and a planner; both are put into the
layers between two steps. The slowest rank's time counts.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moetrain import checkpoint, config
from moetrain.bench.protocol import StepOptions
from moetrain.bench.step_peer import Peer
from moetrain.bench.tables import Records, Results, Tabulated
from moetrain.bench.timing import find_quartiles, read_clock
from moetrain.bench.workloads import STEPS, ForcedRouting
from moetrain.config import Config, RunSpec, resolve, vary
from moetrain.config.core_options import balance_options
from moetrain.data.loader import Corpus, Loader, Samples, Sequences
from moetrain.data.opening import open_data
from moetrain.distributed.comm import all_reduce_sum, barrier
from moetrain.distributed.mesh import Mesh
from moetrain.engine import Engine, build_engine, precision, saved_costs
from moetrain.engine.exchange import settle_exchange
from moetrain.engine.optim import learning_rate
from moetrain.moe.clock import PHASES
from moetrain.moe.layer import MoE
from moetrain.moe.options import BalanceOptions
from moetrain.moe.planning import PLANNERS
from moetrain.moe.planning.plan import imbalance
from moetrain.moe.routing import ROUTERS
from moetrain.moe.routing.balance import BalancedRouter, BalanceLoss
from moetrain.observe.collect.meter import MicroStep
from moetrain.training.step import build, micro_batches, optimizer_step

IDEAL, IDEAL_NAME = "round_robin", "round robin"
SETTLE = 2  # steps of every variant before any is timed
SYNC_REPEATS = 101


@dataclass(frozen=True)
class Variant:
    """A router's choices and a planner, for all layers of a model."""

    router: str
    planner: config.Planner
    forced: ForcedRouting | None = None  # what routers choose whatever their scores

    def install(self, layers: Sequence[MoE], repeat: int) -> None:
        """Have the layers choose and plan this way from now on, in the step of this number."""
        for number, moe in enumerate(layers):
            moe.planner = partial(PLANNERS[self.planner.name], **self.planner.options)
            for router in moe.routers:
                if self.forced is None:
                    router.choose = partial(ROUTERS[self.router].choose, router)  # type: ignore[method-assign]
                else:
                    self.forced.step = repeat
                    router.choose = self.forced.replace_choice(router, number)  # type: ignore


@dataclass(frozen=True)
class Bench:
    """A model in training whose next steps are measured."""

    config: RunSpec
    mesh: Mesh
    engine: Engine
    loader: Samples
    position: int  # first global sample of the next step

    @classmethod
    def build(cls, settings: Config, mesh: Mesh, options: StepOptions) -> "Bench":
        """Build a model and warm it up: ordinary steps from scratch; from a checkpoint, steps that change nothing."""
        corpus, loader = open_data(settings)
        saved = checkpoint.find_named(settings)
        dtype = precision.find_dtype(settings, mesh, checkpoint.known_dtype(None, saved))
        spec = resolve(settings, mesh.world, corpus.vocab_size, dtype)
        engine = build_engine(build(spec), mesh, spec)
        if saved is not None:
            checkpoint.load(saved, engine)
        with tempfile.TemporaryDirectory() as folder:
            costs = saved_costs.obtain(mesh, saved_costs.layer_of(spec), Path(folder), saved)
        engine.plan_with(costs)
        settle_exchange(mesh, spec, costs)
        _, position = checkpoint.progress(saved)
        for step in range(options.warmup):
            lr = learning_rate(spec.optim, step, spec.train.steps) if saved is None else 0.0
            optimizer_step(engine, spec, list(micro_batches(spec, mesh, loader, position)), lr)
            position += spec.train.global_batch
        if options.by_domain:
            domain = choose_domain(corpus, spec.train.seq_len, mesh.rank)
            loader = Loader(corpus, spec.train.seq_len, spec.train.seed, domain)
        return cls(vary(spec, {"balance.bias_rate": 0.0}), mesh, engine, loader, position)

    def shares(self, turn: int) -> list[Sequences]:
        """Return this rank's micro-batches of a step to come."""
        first = self.position + turn * self.config.train.global_batch
        return list(micro_batches(self.config, self.mesh, self.loader, first))

    def measure(
        self, variants: list[Variant], repeats: int, peer: Peer | None = None
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """Time steps of all variants in turns; all ranks call it.

        Returns [repeats, variants] seconds of the slowest rank, the peer's behind the variants'; [variants, facts]
        means of what the plans did; and the milliseconds that a step spends on synchronizing the balance frequencies.
        """
        layers = [m for m in self.engine.model.modules() if isinstance(m, MoE)]
        device, world = self.mesh.device, self.mesh.world
        num_turns = len(variants) + (peer is not None)
        seconds = torch.zeros(world, repeats, num_turns, dtype=torch.float64, device=device)
        facts = torch.zeros(len(variants), len(FACTS), dtype=torch.float64, device=device)
        for repeat in range(-SETTLE, repeats):
            shares = self.shares(repeat + SETTLE)
            for turn in range(num_turns):
                number = (turn + repeat) % num_turns
                own = number < len(variants)
                if own:
                    variants[number].install(layers, repeat)
                barrier()
                began = read_clock(device)
                if own:
                    parts = optimizer_step(self.engine, self.config, shares, lr=0.0).parts
                elif peer is not None:
                    peer.step(shares, lr=0.0)
                ended = read_clock(device)
                barrier()
                if repeat >= 0:
                    seconds[self.mesh.rank, repeat, number] = ended - began
                if repeat >= 0 and own:
                    facts[number] += torch.tensor(describe_plans(parts), device=device) / (repeats * world)
        synchronising = time_synchronization(
            self.mesh, balance_options(self.config.balance), self.engine.model.routers, parts
        )
        return all_reduce_sum(seconds).amax(0).cpu().numpy(), all_reduce_sum(facts).cpu().numpy(), synchronising


FACTS = ("imbalance_home", "imbalance_planned", "guests", "rows_crossing_fraction", *(f"{name}_ms" for name in PHASES))


def describe_plans(parts: Sequence[MicroStep]) -> list[float]:
    """Return FACTS of one step on one rank: loads and rows as means over layers and micro-steps, guests and phases in
    all."""
    stats = [s for part in parts for s in part.stats]
    plans = [s.plan for s in stats]
    loads = [[imbalance(p.home_loads()), imbalance(p.loads()), p.crossing() / p.counts.sum()] for p in plans]
    home, planned, crossing = np.mean(loads, axis=0).tolist()
    phases = [1e3 * sum(s.clock.seconds().get(name, 0.0) for s in stats) for name in PHASES]
    return [home, planned, sum(len(p.guests()) for p in plans), crossing, *phases]


def time_synchronization(
    mesh: Mesh, options: BalanceOptions, routers: Sequence[BalancedRouter], parts: Sequence[MicroStep]
) -> float:
    """Return the median milliseconds that the slowest rank takes to have the balance frequencies of the global batch,
    all-reduces and arithmetic, for all micro-steps of a step whose `parts` are given.

    Every repetition begins right after a barrier: what a rank waits in a step for slower ones is imbalance, not this.
    """
    seconds = torch.zeros(mesh.world, SYNC_REPEATS, dtype=torch.float64, device=mesh.device)
    for repeat in range(SYNC_REPEATS):
        balance = BalanceLoss(options, routers, tokens_in_batch=1, length=1)
        barrier()
        began = read_clock(mesh.device)
        for part in parts[1:] if balance.looks_ahead else []:
            balance.foresee(part.stats)
        for part in parts:
            balance.synchronise(part.stats)
        seconds[mesh.rank, repeat] = read_clock(mesh.device) - began
    return 1e3 * float(all_reduce_sum(seconds).amax(0).median())


def choose_domain(corpus: Corpus, seq_len: int, rank: int) -> int:
    """Return the domain that a rank reads by itself: one after another, those too small for a sequence left out."""
    tokens = corpus.manifest["splits"]["train"]["tokens_per_domain"]
    filled = [number for number, name in enumerate(corpus.domains) if tokens[name] > seq_len + 1]
    return filled[rank % len(filled)]


def measure_variants(bench: Bench, options: StepOptions) -> Records:
    """Return one record for the ideal and for every planner, of every workload if any are named, the same on every
    rank. The weights stay as they were."""
    if not options.workloads:
        return _measure_routing(bench, options, None)
    return [record for name in options.workloads for record in _measure_routing(bench, options, name)]


def _list_variants(bench: Bench, options: StepOptions, workload: str | None) -> list[Variant]:
    """Return the ideal and what is compared with it; of a workload, as many rows spread evenly."""
    settings, ep = bench.config, bench.mesh.ep
    presets = {name: config.load([f"planner={name}"]).planner for name in ("home", *options.planners)}
    presets[settings.planner.name] = settings.planner
    routed = forced = None
    if workload is not None:
        seed = settings.train.seed
        routed, forced = (ForcedRouting(workload, ep.rank, ep.size, seed, is_even) for is_even in (True, False))
    ideal = Variant(IDEAL, presets["home"], routed)
    return [ideal, *(Variant(settings.router.name, presets[name], forced) for name in options.planners)]


def _measure_routing(bench: Bench, options: StepOptions, workload: str | None) -> Records:
    """Return the records of one routing: the routers' own, or a workload, whose steps are measured together."""
    settings, mesh = bench.config, bench.mesh
    variants = _list_variants(bench, options, workload)
    peer = Peer(settings, mesh, bench.shares(0)) if options.peers else None
    repeats = options.repeats if workload is None else STEPS * -(-options.repeats // STEPS)
    times, facts, synchronising = bench.measure(variants, repeats, peer)
    if workload is not None:
        times = times.reshape(-1, STEPS, times.shape[1]).mean(1)
    tokens = settings.tokens_per_step
    found: Records = []
    for number in range(times.shape[1]):
        step_ms = 1e3 * float(np.median(times[:, number]))
        low, middle, high = find_quartiles(100 * times[:, 0] / times[:, number])
        record: dict[str, Any] = {
            "routing": (IDEAL_NAME if number == 0 else "natural") if workload is None else Path(workload).name,
            "is_ideal": number == 0,
            "planner": None,
            "peer": None,
            "ranks": mesh.world,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu",
            "dtype": settings.train.dtype,
            "model": settings.model.model_dump(),
            "top_k": settings.router.top_k,
            "skew": settings.router.skew,
            "tokens_per_step": tokens,
            "micro_steps": settings.micro_steps,
            "by_domain": options.by_domain,
            "start": settings.checkpoint.resume if checkpoint.find_named(settings) else None,
            "seed": settings.train.seed,
            "warmup": options.warmup,
            "repeats": repeats,
            "step_ms": step_ms,
            "tokens_per_second": 1e3 * tokens / step_ms,
            "percent_of_ideal": middle,
            "quartiles": [low, high],
        }
        if number < len(variants):
            record["planner"] = variants[number].planner.name
            record |= {"sync_ms": synchronising, "sync_percent": 100 * synchronising / step_ms}
            record |= dict(zip(FACTS, facts[number].tolist(), strict=True))
        elif peer is not None:
            record |= {"peer": peer.name, "peer_experts": peer.experts}
        if peer is not None:
            low, middle, high = find_quartiles(times[:, -1] / times[:, number])
            record |= {"times_peer": middle, "times_peer_quartiles": [low, high]}
        found.append(record)
    return found


def run_benchmark(settings: Config, mesh: Mesh, given: argparse.Namespace) -> None:
    """Measure and publish, as one of the workers."""
    options = StepOptions.from_arguments(given)
    found = measure_variants(Bench.build(settings, mesh, options), options)
    if not mesh.is_main:
        return
    if given.json:
        print(json.dumps(found))
    tabulate(found).publish(given.out)


COLUMNS = ("routing", "planner", "step ms", "tokens/s", "% of ideal", "imbalance", "guests", "rows crossing", "sync")
LEGEND = (
    "% of ideal: round robin's time divided by this one's, median over repetitions (and quartiles); of a workload, the "
    "time of as many rows spread evenly, over its four steps. "
    "imbalance: largest device load over the mean, at home → planned, mean of the layers. guests: temporary replicas, "
    "in a whole step. "
    "sync: time to synchronize the balance frequencies over the global batch, as a share of the step."
)


def _explain_columns(found: Records) -> str:
    """Explain the columns; where there is a peer, also what it is and how fast ours is beside it."""
    if not (theirs := found[-1]["peer"]):
        return LEGEND
    dtype = "autocast over fp32 weights" if found[0]["dtype"] == "bf16" else "fp32"
    speeds = [(r["planner"], r["times_peer"], *r["times_peer_quartiles"]) for r in found[1:-1]]
    ours = ", ".join(f"{name} {middle:.2f} ({low:.2f} to {high:.2f})" for name, middle, low, high in speeds)
    return (
        f"{LEGEND} {theirs}: Qwen3MoeForCausalLM of the same shape with its balance loss, experts by "
        f"{found[-1]['peer_experts']} (the faster here of grouped_mm and eager), {dtype}, fused AdamW, clipping; every "
        f"rank holds all experts. Our speed over its speed, each repetition by itself: {ours}."
    )


def tabulate(found: Records) -> Results:
    """Return the results as a table; times in milliseconds."""
    rows = [
        [
            f"{r['routing']}, even" if r["is_ideal"] and r["routing"] != IDEAL_NAME else r["routing"],
            r["planner"] or r["peer"],
            f"{r['step_ms']:,.1f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['percent_of_ideal']:.1f} ({r['quartiles'][0]:.1f} to {r['quartiles'][1]:.1f})",
            *(_plan_cells(r) if r["planner"] else [""] * 4),
        ]
        for r in found
    ]
    table = Tabulated(_describe_setting(found), COLUMNS, rows, num_left=2)
    return Results("step", "Whole training steps", found, [table], [_explain_columns(found)])


def _plan_cells(r: dict[str, Any]) -> list[str]:
    return [
        f"{r['imbalance_home']:.3f} → {r['imbalance_planned']:.3f}",
        f"{r['guests']:.1f}",
        f"{r['rows_crossing_fraction']:.1%}",
        f"{r['sync_percent']:.2f}%",
    ]


def _describe_setting(found: Records) -> str:
    r = found[0]
    start = f"from {r['start']}, " if r["start"] else ""
    return (
        f"{r['dtype']}, {r['model']['num_layers']} layers, width {r['model']['dim']}, {r['model']['num_experts']} "
        f"experts, top-{r['top_k']}, {r['tokens_per_step']:,} tokens a step in {r['micro_steps']} micro-step(s), "
        f"{r['ranks']} ranks × {r['threads']} thread(s) on {r['device']}\n"
        f"{start}{r['warmup']} steps of warm-up, {r['repeats']} repeats, skew {r['skew']:g}, seed {r['seed']}, "
        f"{'every rank reads its own domain' if r['by_domain'] else 'mixed data'}"
    )
