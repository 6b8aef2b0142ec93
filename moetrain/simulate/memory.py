"""Peak memory of the fullest rank, part by part, in bytes.

States are exact; activations follow the estimate of `moetrain train --dry-run` (observe/estimate.py), with what routing
and planning add: the rows of the busiest rank, and the experts that are lent to it.
"""

from dataclasses import dataclass

import numpy as np

from moetrain.simulate.cluster import BYTES, Cluster
from moetrain.simulate.layer import LayerResult
from moetrain.simulate.layout import Layout
from moetrain.simulate.shape import Shape
from moetrain.simulate.step import Job

DRAWS = 20  # of the layers of a model
BLOCK = 2 << 20  # of the allocator: every large tensor is rounded up to a multiple of it


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one rank."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def on_device(self) -> float:
        return self.total - self.parts.get("states in host memory", 0.0)

    def fits(self, cluster: Cluster) -> bool:
        return self.on_device <= cluster.memory.capacity


def predict_memory(job: Job, layers: list[LayerResult], is_drawn: bool = False) -> MemoryUse:
    """Peak of the fullest rank, from the layers that were drawn: where the backward begins, or where it ends.

    `is_drawn`: any rank may be the busy one of a layer; otherwise the same ranks are busy in all layers.
    """
    shape, layout, work, cluster = job.shape, job.layout, job.work, job.cluster
    dense = (shape.dense_params + shape.embedding_params) / layout.pp / layout.tp
    experts = shape.num_moe * layout.own_experts(shape) * shape.expert_params / layout.pp
    routers = shape.num_moe * shape.router_params / layout.pp
    own = dense / layout.dense_shards + experts / layout.expert_shards + routers
    width = max(BYTES[work.dtype], 2)
    depth = shape.num_layers / layout.pp
    micro_steps = work.micro_steps(layout)
    is_sharded = layout.dense_shards * layout.expert_shards > 1 and layout.sharding == "fsdp"
    gathered = width * (dense + experts + routers)
    if is_sharded and layout.reshard:
        gathered = width * (shape.embedding_params / layout.pp + 2 * (dense + experts) / depth)
    held = (4.0 if layout.sharding == "zero1" or micro_steps > 1 else 2 * width / depth) * (dense + experts)

    tokens = work.tokens(layout)
    even = tokens * shape.top_k
    rows, kept_rows = even * busiest_of_one(layers), even * busiest_of_all(layers, round(depth), is_drawn)
    attention = tokens * (8 * shape.dim + shape.attention.kept_width)
    dense_mlp = tokens * 3 * (shape.shared_hidden or (shape.dense_hidden if shape.num_dense else 0))
    of_row = 3 * layout.r * shape.dim + 4 * shape.expert_hidden
    live = width * (attention + dense_mlp + rows * of_row)  # of the layer at work
    kept = {
        "none": width * (attention + dense_mlp + kept_rows * of_row),
        "selective": width * _selective(shape, layout, tokens),
        "full": width * 2.0 * tokens * shape.dim,
    }
    in_flight = min(_in_flight(layout), micro_steps)
    waiting, gradients = in_flight * depth * kept[work.recompute], 4.0 * own
    if layout.sharding == "fsdp" and micro_steps == 1:  # layer by layer, gradients take the place of activations
        waiting, gradients = (waiting, 0.0) if waiting > gradients else (0.0, gradients)
    activations = live + waiting
    logits = _logits(job, tokens, width)
    most = max((layer.most_guests for layer in layers), default=0)
    guests = 2 * most * shape.expert_params / layout.r * width  # weights and gradients, of one layer at a time
    states = {"masters": 4.0 * own, "gradients": gradients, "moments": float(work.moment_bytes) * own}
    parts = {"states in host memory": sum(states.values())} if work.offload else states
    parts |= {
        "parameters in use": gathered,
        "gradients not reduced": held,
        "activations": activations,
        "logits": logits,
        "guests": guests,
    }
    parts["allocator"] = cluster.memory.fragmentation * (activations + logits) + 40 * depth * BLOCK / 2
    parts["context"] = cluster.memory.context
    return MemoryUse({name: float(value) for name, value in parts.items() if value or name != "guests"})


def _in_flight(layout: Layout) -> float:
    """Micro-batches whose activations the first stage holds: p, with v chunks a stage p + (p - 1) / v."""
    return layout.pp + ((layout.pp - 1) / layout.virtual if layout.virtual > 1 else 0.0)


def _logits(job: Job, tokens: int, width: int) -> float:
    """The head's: all logits and their gradient, or a chunk of them (models/cross_entropy.py) and fp32 gradients."""
    every = float(tokens) * job.shape.vocab
    if not job.stack.has_chunked_logits:
        return every * (width + 8)
    chunk = min(every * width, job.cluster.memory.capacity / 32)
    return chunk + tokens * job.shape.dim * width + 4.0 * job.shape.vocab * job.shape.dim


def _selective(shape: Shape, layout: Layout, tokens: float) -> float:
    """Numbers that a layer keeps: its input, its experts' input, and the tokens that came to its experts."""
    sent = layout.ep * (1 - (1 - 1 / layout.ep) ** (shape.top_k * layout.r))
    return (2 + sent * (layout.ep - 1) / layout.ep) * tokens * shape.dim


def busiest_of_one(layers: list[LayerResult]) -> float:
    """Largest over mean load of any rank in any layer."""
    return max((layer.rows_here for layer in layers), default=1.0)


def busiest_of_all(layers: list[LayerResult], depth: int, is_drawn: bool) -> float:
    """Largest over mean of what a rank computes in `depth` layers together."""
    if not layers:
        return 1.0
    loads = np.stack([layer.loads / max(layer.loads.mean(), 1e-300) for layer in layers])
    if not is_drawn:
        return float(loads.mean(0).max())
    rng = np.random.default_rng(13)
    found = []
    for _ in range(DRAWS):
        chosen = loads[rng.integers(len(loads), size=max(depth, 1))]
        found.append(rng.permuted(chosen, axis=1).mean(0).max())
    return float(np.mean(found))
