"""What one optimizer step amounts to, over all micro-steps, layers and ranks: one all-reduce and one transfer.

L passes through MoE layers, E experts of one, N of all, R ranks of the expert group, W ranks of the world, C domains,
P phases.
"""

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moetrain.common.arrays import Array, stack
from moetrain.config import RunSpec
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.exchange import SentBytes
from moetrain.distributed.mesh import Mesh
from moetrain.engine import precision
from moetrain.moe.clock import BACKWARD_PHASES, PHASES, WAITS, Clock
from moetrain.moe.layer import LayerStats
from moetrain.moe.planning.cost import Costs, compute_seconds
from moetrain.moe.planning.plan import Plan
from moetrain.moe.routing.balance import BalancedRouter, Losses
from moetrain.observe.collect import health
from moetrain.observe.metrics import (
    BYTES_BETWEEN,
    BYTES_INSIDE,
    CROSSING_BYTES,
    DEAD_EXPERTS,
    DEVICE_LOAD_HOME,
    DEVICE_LOAD_PLANNED,
    DOMAIN_LOSS,
    DPO,
    DROPPED_FRACTION,
    EXPERTS_PER_TOKEN,
    GUESTS,
    IMBALANCE_HOME,
    IMBALANCE_PLANNED,
    LAYER_BIAS_MAX,
    LAYER_DEAD_EXPERTS_WINDOW,
    LAYER_ENTROPY,
    LAYER_LOGIT_NORM,
    LAYER_MAX_VIO_MICRO,
    LAYER_MEANS,
    LAYER_STARVING_EXPERTS,
    LAYER_Z,
    LEND_BYTES,
    LM_LOSS,
    LOSS,
    MEMORY_GIB,
    PEAK_MEMORY_GIB,
    PHASE,
    REPLAYED_FRACTION,
    ROUTER_LOSS,
    ROWS_CROSSING_FRACTION,
    ROWS_MOVED,
    ROWS_MOVED_FRACTION,
    SAVED_SECONDS,
    STARVING_EXPERTS,
    TIME,
    for_domain,
    for_layer,
)

TIMES = ("data", "forward", "backward", "update")
ALL_PHASES = (*TIMES, *PHASES, *BACKWARD_PHASES)
FORWARDS = {"selective": 5 / 3, "full": 2.0}  # times that experts compute their products of the forward; else once
PLAN_FACTS = ("imbalance_home", "imbalance_planned", "guests", "rows_moved", "saved_seconds")


class BatchSize(NamedTuple):
    """Of the global batch."""

    tokens: int  # that go in, without padding
    targets: int  # that are to be predicted: the loss is the mean over them, whatever the layout
    pairs: int = 0  # of answers: under train.objective=dpo the loss is the mean over them


class MicroStep(NamedTuple):
    """What one micro-step contributes to the metrics."""

    nats: Tensor  # [B, L] per target token
    domain: Tensor  # [B, L] of the target tokens
    is_target: Tensor | None  # [B, L] bool: which of them are to be predicted, nats of the others are 0; None: all
    losses: Losses
    stats: list[LayerStats]  # light
    router: health.RouterSums
    replayed: Tensor | None = None  # int64 []: selections that are recorded ones; None: none are replayed
    preference: Tensor | None = None  # fp64 [8] under train.objective=dpo: sums over pairs, in the order of `DPO`


class StepRecord(NamedTuple):
    parts: list[MicroStep]  # one a micro-step
    counts: list[Tensor]  # int64 [E] of every layer: selections on all ranks, in all micro-steps
    norm: float  # of the gradient
    clock: Clock  # of the step's TIMES
    size: BatchSize


class Reading(NamedTuple):
    """What a step was, the same on every rank."""

    metrics: dict[str, Any]
    selected: list[Array]  # [E] of every layer: selections in the step
    quality: list[Array]  # [E] of every layer: mean router logits
    seconds: Array  # [W, P]
    waits: Array  # [..., W] of every exchange: seconds from a rank's arrival to its end
    memory: Array  # [W] GiB


class Meter:
    """Follows every step (`add`), and reads some of them (`read`): reading is what costs."""

    def __init__(self, config: RunSpec, mesh: Mesh, domains: Sequence[str], costs: Costs) -> None:
        self._config, self._mesh, self._domains, self._costs = config, mesh, domains, costs
        self._forwards = FORWARDS.get(config.train.recompute, 1.0)
        self._window = health.Window(config.track.window)
        self._peak = 0.0
        self._exchanged = SentBytes(0, 0)  # in the step last added

    def begin(self) -> None:
        """Begin a step: what an evaluation before it has sent is none of it."""
        self._mesh.exchange.take_sent()

    def add(self, step: StepRecord) -> None:
        self._window.add(torch.cat(step.counts))
        self._exchanged = self._mesh.exchange.take_sent()

    @torch.no_grad()
    def read(self, step: StepRecord, routers: Sequence[BalancedRouter]) -> Reading:
        """Return the reading of the step last added. All ranks call it: it enters one collective."""
        biased = [router.bias for router in routers if router.bias is not None]
        assert self._window.counts_N is not None, "add() comes first"
        found = summed(
            self._on_device(step.parts),
            self._on_host(step),
            {
                "counts": torch.cat(step.counts),
                "window": self._window.counts_N,
                "bias": torch.stack([bias.abs().max() for bias in biased]) if biased else torch.zeros(0),
            },
        )
        sizes = np.cumsum([len(counts_E) for counts_E in step.counts])[:-1]
        tokens = step.size.tokens
        selected, window, logits = (np.split(found[name], sizes) for name in ("counts", "window", "logits"))
        quality = [sums / tokens for sums in logits]
        metrics = self._losses(found, step.parts[0].losses, step.size.pairs) | self._plans(found, len(step.parts))
        metrics |= self._resources(found)
        metrics[EXPERTS_PER_TOKEN] = float(found["counts"].sum() / tokens / len(step.counts))
        metrics[DROPPED_FRACTION] = float(1 - found["kept"].sum() / max(found["counts"].sum(), 1))
        if len(found["replayed"]):
            metrics[REPLAYED_FRACTION] = float(found["replayed"][0] / max(found["counts"].sum(), 1))
        layers = [health.layer_metrics(*each) for each in zip(selected, window, quality, strict=True)]
        scale = [np.log(len(counts_E)) if len(counts_E) > 1 else np.inf for counts_E in selected]
        for index, layer in enumerate(layers):
            layer[LAYER_ENTROPY] = float(found["entropy"][index] / tokens / scale[index])
            layer[LAYER_MAX_VIO_MICRO] = float(found["micro_vio"][index] / len(step.parts) / self._mesh.world)
            layer[LAYER_LOGIT_NORM] = float(found["norm"][index] / tokens)
            layer[LAYER_Z] = float(found["z"][index] / tokens)
            if biased:
                layer[LAYER_BIAS_MAX] = float(found["bias"][index])
        for name, layer in zip(self._config.model.pass_names, layers, strict=True):
            metrics |= {for_layer(metric, name): value for metric, value in layer.items()}
        for metric, mean in LAYER_MEANS.items():
            metrics[mean] = _mean([layer[metric] for layer in layers])
        metrics[DEAD_EXPERTS] = sum(layer[LAYER_DEAD_EXPERTS_WINDOW] for layer in layers)
        metrics[STARVING_EXPERTS] = sum(layer[LAYER_STARVING_EXPERTS] for layer in layers)
        return Reading(metrics, selected, quality, found["seconds"], found["waits"], found["memory"])

    def _on_device(self, parts: Sequence[MicroStep]) -> dict[str, Tensor]:
        """Of this rank, summed over micro-steps."""
        domains = len(self._domains)
        nats_C = parts[0].nats.new_zeros(domains, dtype=torch.float64)
        tokens_C = torch.zeros_like(nats_C)
        for part in parts:
            flat = part.domain.flatten()
            nats_C.index_add_(0, flat, part.nats.flatten().double())
            ones = torch.ones_like(flat) if part.is_target is None else part.is_target.flatten()
            tokens_C.index_add_(0, flat, ones.double())
        total = lambda tensors: torch.stack(list(tensors)).double().sum(0)  # noqa: E731
        replayed = [part.replayed for part in parts if part.replayed is not None]
        judged = [part.preference for part in parts if part.preference is not None]
        return {
            "preference": total(judged) if judged else nats_C.new_zeros(0),
            "nats": nats_C,
            "tokens": tokens_C,
            "weighted": total(part.losses.weighted for part in parts)[None],
            "shares": total(torch.stack([*part.losses.shares.values()]) for part in parts),
            "entropy": total(part.losses.entropy_L for part in parts),
            "kept": torch.stack([s.kept_E.sum() for part in parts for s in part.stats]).double().sum()[None],
            "replayed": total(replayed)[None] if replayed else nats_C[:0],
            "logits": total(part.router.logits_N for part in parts),
            "norm": total(part.router.norm_L for part in parts),
            "z": total(part.losses.z_L for part in parts),
        }

    def _on_host(self, step: StepRecord) -> dict[str, Array]:
        """Of this rank: what plans and clocks say."""
        rank, world, me = self._mesh.rank, self._mesh.world, self._mesh.ep.rank
        stats = [s for part in step.parts for s in part.stats]
        loads, seconds = np.zeros((2, world)), np.zeros((world, len(ALL_PHASES)))
        waits, memory, peak = np.zeros((len(stats) * len(WAITS), world)), np.zeros(world), np.zeros(world)
        plans = Plans.collect([s.plan for s in stats])
        loads[:, rank] = plans.home_SR[:, me].sum(), plans.planned_SR[:, me].sum()
        clocks = [s.clock.seconds() for s in stats]
        times = step.clock.seconds()
        seconds[rank, : len(TIMES)] = [times.get(name, 0.0) for name in TIMES]
        for at, name in enumerate(ALL_PHASES[len(TIMES) :], len(TIMES)):
            seconds[rank, at] = sum(clock.get(name, 0.0) for clock in clocks)
        waits[:, rank] = [clock.get(name, 0.0) for clock in clocks for name in WAITS]
        peak[rank] = peak_memory(self._mesh.device)
        memory[rank] = memory_now(self._mesh.device)
        weight = 3 * self._config.model.dim * self._config.model.expert_hidden // self._config.r
        width = precision.get_dtype(self._config).itemsize
        return {
            "plans": np.array([*plans.facts(), plans.saved_seconds(self._costs, self._forwards)]),
            "loads": loads,
            "seconds": seconds,
            "waits": waits,
            "memory": memory / 2**30,
            "peak": peak / 2**30,
            "micro_vio": plans.max_vio_S(me).reshape(len(step.parts), -1).sum(0),
            "rows": np.array([plans.planned_SR.sum()]),
            "crossing": np.array([sum(_leaving(s.plan, me) for s in stats)]),
            "lent": np.array([sum(weight * width * s.num_lent for s in stats)]),
            "sent": np.array([sum(s.clock.sent_bytes for s in stats)]),
            "exchanged": np.array(self._exchanged),
        }

    def _losses(self, found: Mapping[str, Array], first: Losses, num_pairs: int) -> dict[str, Any]:
        nats, tokens, layers = found["nats"], found["tokens"], len(found["entropy"])
        lm_loss = float(nats.sum() / tokens.sum())
        pairs = dict(zip(DPO.values(), (found["preference"] / max(num_pairs, 1)).tolist(), strict=False))
        out = {LOSS: pairs.get(DPO["loss"], lm_loss) + float(found["weighted"][0]), LM_LOSS: lm_loss, **pairs}
        out |= {ROUTER_LOSS[name]: float(x) / layers for name, x in zip(first.shares, found["shares"], strict=True)}
        for name, spent, count in zip(self._domains, nats.tolist(), tokens.tolist(), strict=True):
            if count:
                out[for_domain(DOMAIN_LOSS, name)] = spent / count
        return out

    def _plans(self, found: Mapping[str, Array], micro_steps: int) -> dict[str, Any]:
        facts = dict(zip(PLAN_FACTS, found["plans"].tolist(), strict=True))
        ep, rows = self._mesh.ep.size, max(float(found["rows"][0]), 1.0)
        num_plans = micro_steps * len(found["entropy"]) * self._mesh.world
        return {
            IMBALANCE_HOME: facts["imbalance_home"] / num_plans,
            IMBALANCE_PLANNED: facts["imbalance_planned"] / num_plans,
            GUESTS: facts["guests"] / ep,
            ROWS_MOVED: facts["rows_moved"] / ep,
            ROWS_MOVED_FRACTION: facts["rows_moved"] / rows,
            ROWS_CROSSING_FRACTION: ep * float(found["crossing"][0]) / rows,
            LEND_BYTES: float(found["lent"][0]) / ep,
            CROSSING_BYTES: float(found["sent"][0]),
            BYTES_INSIDE: float(found["exchanged"][0]),
            BYTES_BETWEEN: float(found["exchanged"][1]),
            SAVED_SECONDS: facts["saved_seconds"] / self._mesh.world,
            DEVICE_LOAD_HOME: found["loads"][0].tolist(),
            DEVICE_LOAD_PLANNED: found["loads"][1].tolist(),
        }

    def _resources(self, found: Mapping[str, Array]) -> dict[str, Any]:
        self._peak = max(self._peak, float(found["peak"].max()))
        out: dict[str, Any] = {PEAK_MEMORY_GIB: self._peak, MEMORY_GIB: found["memory"].tolist()}
        for name, value in zip(ALL_PHASES, found["seconds"].mean(0).tolist(), strict=True):
            out[TIME[name] if name in TIMES else PHASE[name]] = value
        return out


class Plans(NamedTuple):
    """The plans of S layers and micro-steps, side by side; layers with fewer experts than others are padded."""

    counts_SRE: Array
    placed_SRE: Array
    at_home_SRE: Array  # bool: whether the rank owns the expert
    home_SR: Array  # rows of own experts
    planned_SR: Array  # rows computed

    @classmethod
    def collect(cls, plans: Sequence[Plan]) -> "Plans":
        counts_SRE, placed_SRE = stack([p.counts for p in plans]), stack([p.placed() for p in plans])
        at_home_SRE = stack([p.home for p in plans], -1)[:, None, :] == np.arange(plans[0].num_ranks)[:, None]
        home_SR = (counts_SRE.sum(1)[:, None, :] * at_home_SRE).sum(2)
        return cls(counts_SRE, placed_SRE, at_home_SRE, home_SR, placed_SRE.sum(2))

    def facts(self) -> list[float]:
        """Return sums over the plans: imbalance at home and planned, guests, rows moved."""
        away_SRE = self.placed_SRE * ~self.at_home_SRE
        return [_uneven(self.home_SR), _uneven(self.planned_SR), float((away_SRE > 0).sum()), float(away_SRE.sum())]

    def saved_seconds(self, costs: Costs, forwards: float) -> float:
        """Return the seconds of expert computation that the plans take off the slowest rank, by the machine's measured
        curve."""
        segments_SR = ((self.counts_SRE.sum(1)[:, None, :] > 0) & self.at_home_SRE).sum(2)
        at_home = compute_seconds(self.home_SR, segments_SR, costs, forwards)
        planned = compute_seconds(self.planned_SR, (self.placed_SRE > 0).sum(2), costs, forwards)
        return float((at_home - planned).sum())

    def max_vio_S(self, rank: int) -> Array:
        """Return [S] `health.max_vio` of one source rank's rows."""
        mine_SE, num_experts_S = self.counts_SRE[:, rank], self.at_home_SRE.any(1).sum(1)
        total_S = mine_SE.sum(1)
        return np.where(total_S > 0, mine_SE.max(1) * num_experts_S / np.maximum(total_S, 1) - 1, 0.0)


def _uneven(loads_SR: Array) -> float:
    """Σ_S of the largest over the mean load (1 where there is none)."""
    total_S = loads_SR.sum(1)
    return float(np.where(total_S > 0, loads_SR.max(1) * loads_SR.shape[1] / np.maximum(total_S, 1), 1.0).sum())


def _leaving(plan: Plan, rank: int) -> int:
    """Rows that a source sends to other ranks."""
    sent_ER = plan.rows(rank)
    return int(sent_ER.sum() - sent_ER[:, rank].sum())


def waited(waits: Array, ep: int) -> Array:
    """Return [W, W] seconds that each rank waited for each other one. waits [..., W]: of exchanges, each among the
    ranks of an expert group, `ep` neighbours; whoever is there last waits least, and what others wait longer is for
    it."""
    world = waits.shape[-1]
    out = np.zeros((world, world))
    for first in range(0, world, ep):
        spent = waits.reshape(-1, world)[:, first : first + ep]
        last = spent.argmin(1)
        for rank in range(ep):
            more = spent[:, rank] - spent[np.arange(len(spent)), last]
            out[first + rank, first : first + ep] += np.bincount(last, more, minlength=ep)
    return out


def summed(
    on_device: Mapping[str, Tensor], on_host: Mapping[str, Array], known: Mapping[str, Tensor]
) -> dict[str, Array]:
    """Return fp64 arrays on the host: the sums over all ranks of the first two, and `known` as it is on each of
    them."""
    host = np.concatenate([x.astype(np.float64).ravel() for x in on_host.values()])
    device = [x.double().flatten() for x in on_device.values()]
    total = all_reduce_sum(torch.cat([*device, torch.from_numpy(host).to(device[0].device)]))
    everything = torch.cat([total, *(x.double().flatten().to(total.device) for x in known.values())]).cpu().numpy()
    shapes = {name: tuple(x.shape) for part in (on_device, on_host, known) for name, x in part.items()}
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    parts = zip(shapes.items(), np.split(everything, ends), strict=True)
    return {name: flat.reshape(shape) for (name, shape), flat in parts}


def memory_now(device: torch.device) -> int:
    """Return bytes: the most allocated on the GPU since this was last asked, or resident now."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Return bytes: the most that was allocated on the GPU since `memory_now`, or that this process ever had
    resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _mean(values: Sequence[float]) -> float:
    """Of those that are finite; NaN where none is."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
