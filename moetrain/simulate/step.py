"""A whole optimizer step: seconds of its parts on the slowest rank, and bytes on the links.

Dense layers follow from products, attention and memory traffic, the experts' part is planned and predicted layer by
layer (`layer`), parameters are gathered and gradients reduced once a step or a micro-step, and a pipeline of p stages
with v chunks each idles for (p - 1) / (v m) of m micro-steps. Transfers between stages are taken to be hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moetrain.moe.planning.cost import Costs
from moetrain.simulate.cluster import BYTES, Cluster
from moetrain.simulate.layer import LayerResult, Machine, PlannerChoice, run_layers
from moetrain.simulate.layout import Layout, StepWork
from moetrain.simulate.links import gather_seconds
from moetrain.simulate.shape import Shape
from moetrain.simulate.stack import Stack
from moetrain.simulate.traffic import Natural, RoutedGroup, RoutingSource, find_routing

PARTS = (
    "attention",
    "mlp",
    "experts",
    "head",
    "dispatch",
    "combine",
    "lend",
    "host",
    "tensor",
    "shards",
    "update",
    "bubble",
)
RESAMPLES = 200  # of the layers that were drawn, for the spread between models and between stages


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step."""

    parts: dict[str, float]  # those of PARTS
    low: float  # 10th percentile of the step over routings of that kind, the error of drawing included
    high: float  # 90th
    error: float  # standard error of the total for having drawn some layers only
    layers: list[LayerResult]  # those that were drawn
    link_bytes: dict[str, float]  # that a rank sends in a step, by what for and over what

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Job:
    """Everything that a step's time depends on but the routing and the planner."""

    cluster: Cluster
    shape: Shape
    layout: Layout
    work: StepWork
    stack: Stack
    measured: Costs | None = None  # of the experts' layer and the links on this very machine

    @property
    def tokens(self) -> int:
        return self.work.tokens(self.layout)

    @property
    def group(self) -> RoutedGroup:
        return RoutedGroup(self.layout.ep, self.shape.experts, self.tokens, self.shape.top_k)

    @property
    def machine(self) -> Machine:
        return Machine(
            self.cluster,
            self.shape,
            self.group,
            self.stack,
            self.work.dtype,
            self.work.recompute,
            measured=self.measured,
            slices=self.layout.r,
            chunks=self.layout.chunks,
        )

    @property
    def again(self) -> float:
        """Forwards of the dense layers that the backward repeats."""
        return 0.0 if self.work.recompute == "none" else 1.0

    def product(self, params: float, width: float) -> float:
        """Seconds of a dense product with `params` weights, forward and backward, on this rank's tokens."""
        rows = self.tokens * self.layout.tp  # tensor parallelism splits the weights, not the tokens
        flops = 2.0 * rows * params / self.layout.tp
        once = self.cluster.product_seconds(flops, rows, width / self.layout.tp**0.5, self.work.dtype)
        return (3 + self.again) * once

    def memory(self, numbers: float) -> float:
        """Seconds of element-wise work that moves so many numbers of a token forward, twice as many backward."""
        moved = self.tokens * numbers * max(BYTES[self.work.dtype], 2)
        return (3 + self.again) * self.cluster.memory_seconds(moved)


def predict_step(
    job: Job,
    routing: str | RoutingSource = "balanced",
    planner: PlannerChoice | None = None,
    seed: int = 0,
    samples: int = 8,
    natural: Natural | None = None,
) -> StepTime:
    """The time of one optimizer step under that routing and planner; `samples` layers are drawn and planned."""
    job.layout.check(job.shape)
    micro_steps = job.work.micro_steps(job.layout)
    planner = planner or PlannerChoice("home")
    source = routing if isinstance(routing, RoutingSource) else find_routing(routing, job.group, natural or Natural())
    number = 1 if source.name == "balanced" else min(job.shape.num_moe, samples)
    layers = run_layers(source.layers(job.group, number, seed), job.machine, planner)

    attention, mlp, head = _attention(job), _mlp(job), _head(job)
    host = np.array([_host(job, attention + mlp / job.shape.num_layers, layer) for layer in layers])
    experts = np.array([layer.total for layer in layers]) + host
    mean, low, high = _over_stages(experts, job, seed)
    scale = mean / max(experts.mean() * job.shape.num_moe / job.layout.pp, 1e-300)
    each = job.shape.num_moe / job.layout.pp * micro_steps * scale
    dense_layers = job.shape.num_layers / job.layout.pp * micro_steps
    parts = {
        "attention": attention * dense_layers,
        "mlp": mlp / job.layout.pp * micro_steps,
        "experts": each * _mean(layers, lambda x: x.experts),
        "head": head / job.layout.pp * micro_steps,
        "dispatch": each * _mean(layers, lambda x: x.dispatch),
        "combine": each * _mean(layers, lambda x: x.combine),
        "lend": each * _mean(layers, lambda x: x.lend),
        "host": each * float(host.mean()),
        "tensor": _tensor(job) * dense_layers,
    }
    busy = sum(parts.values())
    shards, shard_bytes = _shards(job, micro_steps, busy)
    parts |= {"shards": shards, "update": _update(job)}
    parts["bubble"] = busy * (job.layout.pp - 1) / (job.layout.virtual * micro_steps)
    total = sum(parts.values())
    spread = micro_steps * (1 + (job.layout.pp - 1) / (job.layout.virtual * micro_steps))
    drawn = float(experts.std(ddof=1)) if len(experts) > 1 else 0.0
    rest = max(1 - len(experts) / job.shape.num_moe, 0.0)  # nothing is unknown where all layers are drawn
    error = spread * job.shape.num_moe / job.layout.pp * drawn * (rest / len(experts)) ** 0.5
    below, above = (np.hypot(spread * (edge - mean), 1.28 * error) for edge in (low, high))
    count = job.shape.num_moe / job.layout.pp * micro_steps
    link_bytes = {
        "tokens inside": count * _mean(layers, lambda x: x.inside),
        "tokens between": count * _mean(layers, lambda x: x.between),
        **shard_bytes,
    }
    return StepTime(parts, float(total - below), float(total + above), error, layers, link_bytes)


def _mean(layers: list[LayerResult], value: Callable[[LayerResult], float]) -> float:
    return float(np.mean([value(layer) for layer in layers]))


def _over_stages(experts: np.ndarray, job: Job, seed: int) -> tuple[float, float, float]:
    """(mean, 10th, 90th percentile) seconds of the experts of the slowest pipeline stage in a micro-step."""
    stages = job.layout.pp
    number = job.shape.num_moe / stages
    if len(experts) == 1:
        return (float(experts[0] * number),) * 3
    rng = np.random.default_rng((seed, 11))
    drawn = rng.choice(experts, (RESAMPLES, stages, max(1, round(number))))
    slowest = drawn.mean(2).max(1) * number
    return float(slowest.mean()), float(np.quantile(slowest, 0.1)), float(np.quantile(slowest, 0.9))


def _attention(job: Job) -> float:
    """Of a layer: projections, scores, norms and residuals."""
    shape = job.shape
    width = (shape.dim * shape.attention.score_width) ** 0.5
    pairs = shape.attention.pairs(job.work.seq_len, shape.num_layers)
    flops = 2.0 * job.tokens * pairs * (shape.attention.score_width + shape.attention.value_width)
    dtype = "bf16" if job.work.dtype == "fp8" else job.work.dtype
    scores = (3.5 + job.again) * flops / (job.cluster.peak_of(dtype) * job.cluster.gemm.attention)
    moved = job.memory(14 * shape.dim + 3 * shape.attention.kept_width / job.layout.tp)
    return job.product(shape.attention.products, width) + scores + moved


def _mlp(job: Job) -> float:
    """Of all layers together: dense MLPs, shared experts, routers."""
    shape = job.shape
    total = 0.0
    for count, hidden in ((shape.num_dense, shape.dense_hidden), (shape.num_moe, shape.shared_hidden)):
        if count and hidden:
            products = job.product(3 * shape.dim * hidden, (shape.dim * hidden) ** 0.5)
            total += count * (products + job.memory(3 * hidden / job.layout.tp))
    rows = job.tokens
    router = job.cluster.product_seconds(2.0 * rows * shape.router_params, rows, shape.dim, job.stack.router_dtype)
    return total + shape.num_moe * ((3 + job.again) * router + job.memory(3 * shape.experts))


def _head(job: Job) -> float:
    """Logits, cross entropy, and the embedding's rows."""
    rows = job.tokens * job.layout.tp
    flops = 2.0 * rows * job.shape.vocab * job.shape.dim / job.layout.tp
    dtype = "bf16" if job.work.dtype == "fp8" else job.work.dtype
    products = 3 * job.cluster.product_seconds(flops, rows, (job.shape.dim * job.shape.vocab) ** 0.5, dtype)
    moved = job.cluster.memory_seconds(job.tokens * job.shape.vocab * job.stack.logit_bytes)
    return products + moved + job.memory(4 * job.shape.dim)


def _host(job: Job, dense: float, layer: LayerResult) -> float:
    """Seconds of a layer that the device waits for the host; `dense`: of its attention and shared experts."""
    launches = job.stack.layer_launches + job.stack.moe_launches
    host = launches * job.cluster.host.launch + job.stack.syncs * job.cluster.host.sync
    host += job.stack.collectives * job.cluster.host.turn
    if not job.cluster.host.runs_ahead:
        return host
    return max(0.0, host - job.stack.host_ahead * layer.experts - dense)


def _tensor(job: Job) -> float:
    """Of a layer: gathers and reductions of tensor parallelism, keys and values of context parallelism."""
    shape, layout = job.shape, job.layout
    width = max(BYTES[job.work.dtype], 2)
    tokens = job.tokens * layout.tp
    per_layer = 4 + 4 * (shape.num_dense + (shape.num_moe if shape.shared_hidden else 0)) / shape.num_layers
    seconds = (per_layer + 2 * job.again) * gather_seconds(tokens * shape.dim * width, layout.tp, job.cluster)
    keys = tokens * layout.cp * shape.attention.kv_width * width / layout.tp
    return seconds + (3 + job.again) * gather_seconds(keys, layout.cp, job.cluster, layout.tp)


def _shards(job: Job, micro_steps: int, busy: float) -> tuple[float, dict[str, float]]:
    """(seconds that nothing hides, bytes): parameters gathered, gradients reduced over the data-parallel ranks.

    What FSDP copies into and out of its buffers is done on one rank, too.
    """
    shape, layout = job.shape, job.layout
    dense = (shape.dense_params + shape.embedding_params) / layout.pp / layout.tp
    experts = shape.num_moe * layout.own_experts(shape) * shape.expert_params / layout.pp
    gathers = micro_steps * (2 if layout.reshard else 1) if layout.sharding == "fsdp" else 1
    seconds = moved = 0.0
    for params, shards, stride in (
        (dense, layout.dense_shards, layout.tp),
        (experts, layout.expert_shards, layout.ep),
    ):
        if shards > 1:
            seconds += gathers * gather_seconds(2 * params, shards, job.cluster, stride)
            seconds += gather_seconds(4 * params, shards, job.cluster, stride)
            moved += (2 * gathers + 4) * params * (shards - 1) / shards
        if layout.dp_replicate > 1:  # an all-reduce of the shards over the replicas
            apart = stride * shards
            part = 4 * params / shards
            seconds += 2 * gather_seconds(part, layout.dp_replicate, job.cluster, apart)
            moved += 2 * part * (layout.dp_replicate - 1) / layout.dp_replicate
    hidden = min(job.stack.gather_hidden * seconds, busy)
    copied = job.stack.gather_bytes * gathers + job.stack.reduce_bytes if layout.sharding == "fsdp" else 0.0
    copies = job.cluster.memory_seconds(copied * (dense + experts))
    return seconds - hidden + copies, {"parameters and gradients": moved}


def _update(job: Job) -> float:
    shape, layout = job.shape, job.layout
    dense = (shape.dense_params + shape.embedding_params) / layout.pp / layout.tp / layout.dense_shards
    experts = shape.num_moe * layout.own_experts(shape) * shape.expert_params / layout.pp / layout.expert_shards
    return job.cluster.memory_seconds((dense + experts) * job.stack.optimizer_bytes)
