"""Parameters and memory, worked out before anything is allocated; and the rate of large matrix products."""

import math
import time
from dataclasses import dataclass

import torch

from moetrain.config import Native, RunSpec
from moetrain.distributed.mesh import device_of, memory_of
from moetrain.engine import precision
from moetrain.models.cross_entropy import peak_bytes
from moetrain.models.transformer import Transformer
from moetrain.moe.kernels.api import DEFAULT_KERNELS
from moetrain.moe.routing import Replicated

GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Of a rank. Parameters are counted, bytes estimated: states are exact, activations rough (±30 %)."""

    total: int  # parameters of the model
    active: int  # of them used by one token, counted at each use; of a router that varies, with top_k experts
    per_rank: int  # of them whose master copy lies on one rank
    masters: int  # bytes, fp32
    gradients: int  # bytes: fp32, and what is not reduced yet
    moments: int  # bytes: AdamW's two
    gathered: int  # bytes: parameters gathered for use, in the compute dtype
    activations: int  # bytes of one micro-step under balanced routing
    flops_per_token: int  # forward and backward, matrix products only

    @property
    def states(self) -> int:
        return self.masters + self.gradients + self.moments

    @property
    def bytes(self) -> int:
        return self.states + self.gathered + self.activations


def estimate(config: RunSpec) -> Estimate:
    """Of the config's model, on each of its ranks."""
    m, t = config.model, config.train
    assert m.vocab_size is not None
    shard, ep = config.dp_shard, config.ep
    norms = {"none": 0, "head": 2 * m.head_dim, "full": (m.num_heads + m.num_kv_heads) * m.head_dim}[m.qk_norm]
    attention = 2 * m.dim * (m.num_heads + m.num_kv_heads) * m.head_dim + norms + 2 * m.dim
    expert = 3 * m.dim * m.expert_hidden
    shared = m.num_shared_experts * expert
    embeddings = m.vocab_size * m.dim * (1 if m.tied_embeddings else 2) + m.dim
    dense = embeddings + m.num_layers * attention + m.num_dense_layers * 3 * m.dim * m.dense_hidden
    dense += m.num_moe_layers * shared
    experts, routers = sum(m.experts_of_layers) * expert, _replicated(config)
    tau = config.router.zero_compute_tau  # a balanced layer gives experts that compute nothing 1 / tau times the rows
    computed = tau * m.num_experts / (tau * m.num_experts + m.num_zero_compute)
    active = dense + routers + round(computed * m.chain * sum(config.top_k_of_layers) * expert)
    whole = [math.ceil(math.ceil(e / ep) / (shard // ep)) for e in m.experts_of_layers]  # experts that a rank holds
    per_rank = dense // shard + sum(whole) * expert + routers

    width = precision.get_dtype(config).itemsize
    tokens = t.seq_len * config.micro_batch
    live = 1 if isinstance(config.engine, Native) and config.engine.reshard_after_forward else m.num_layers
    block = (dense - embeddings + experts // ep) // m.num_layers
    gathered = width * (embeddings + live * block)
    held = width * block  # gradients before they are reduced: of one layer, or adding up until the last micro-step
    if config.micro_steps > 1:
        held = 4 * (embeddings + m.num_layers * block)
    rows = round(computed * m.chain * config.router.top_k * tokens)
    layer = width * (tokens * (8 * m.dim + 3 * m.num_heads * m.head_dim) + rows * (3 * m.dim + 4 * m.expert_hidden))
    sent = ep * (1 - (1 - 1 / ep) ** config.router.top_k)  # ranks that a token goes to
    inputs = {"none": 0.0, "selective": 2 + sent * (ep - 1) / ep, "full": 2.0}[t.recompute]  # tokens that a layer keeps
    kept = layer + m.num_layers * (layer if t.recompute == "none" else round(width * inputs * tokens * m.dim))
    activations = kept + _head_bytes(config, tokens)
    matrices = active - (0 if m.tied_embeddings else m.vocab_size * m.dim)
    matrices += (m.chain - 1) * m.num_moe_layers * shared
    flops = 6 * matrices + 6 * m.num_layers * m.num_heads * m.head_dim * t.seq_len
    return Estimate(
        dense + experts + routers,
        active,
        per_rank,
        4 * per_rank,
        4 * per_rank + held,
        (8 if config.optim.state_dtype == "fp32" else 4) * per_rank,
        gathered,
        activations,
        flops,
    )


def _head_bytes(config: RunSpec, tokens: int) -> int:
    """Bytes that the head and its cross entropy hold on this host's device."""
    device, dtype = device_of(0), precision.get_dtype(config)
    is_fused = DEFAULT_KERNELS.choose(device, dtype).has_fused_cross_entropy
    assert config.model.vocab_size is not None
    sizes = tokens, config.model.dim, config.model.vocab_size, dtype.itemsize
    return peak_bytes(*sizes, is_fused, memory_of(device))


def _replicated(config: RunSpec) -> int:
    """Parameters of routers and what else is whole on every rank."""
    with torch.device("meta"):
        model = Transformer(config.model, config.router, config.planner)
    parts = (p for m in model.modules() if isinstance(m, Replicated) for p in m.parameters())
    return sum(p.numel() for p in set(parts))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product, measured now: what `perf/mfu` is a share of."""
    size = 8192 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a).sum().item()  # .item() waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def short(number: float) -> str:
    """12.3M, 6.9B."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"
