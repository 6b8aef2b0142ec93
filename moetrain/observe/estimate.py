"""Parameters and memory, worked out before anything is allocated; and the rate of large matrix products."""

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from moetrain import runs
from moetrain.config import HuggingFace, Lora, Model, Native, RunSpec
from moetrain.distributed.mesh import device_of, memory_of
from moetrain.engine import precision
from moetrain.models.adapters import add_adapters
from moetrain.models.base import LanguageModel
from moetrain.models.cross_entropy import peak_bytes
from moetrain.models.transformer import Transformer
from moetrain.moe.kernels.api import DEFAULT_KERNELS

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


class AdapterCounts(NamedTuple):
    """Parameters of adapters (LoRA) by what they are beside."""

    dense: int
    expert: int  # of one expert, in the mean of all layers
    shared: int  # whole on every rank


class Counts(NamedTuple):
    """Parameters of a model by their kind; those of adapters apart."""

    dense: int  # embeddings included
    embeddings: int
    expert: int  # one of them
    replicated: int  # routers and what else is whole on every rank
    shared: int  # of the shared experts of a layer
    is_tied: bool  # whether the head is the embedding
    attention_width: int  # heads × the width of one
    passes: int  # through each layer of experts
    adapters: AdapterCounts | None  # under LoRA, where nothing else is trained


def estimate(config: RunSpec) -> Estimate:
    """Return the estimate of the config's model, on each of its ranks."""
    m, t = config.model, config.train
    assert m.vocab_size is not None
    shard, ep = config.dp_shard, config.ep
    if isinstance(config.model, HuggingFace):
        counts = _count_folder(config.model, runs.model_folder(config), config.lora)
    else:
        counts = _count_preset(config, config.model)
    dense, embeddings, expert, routers, shared, is_tied, attention_width, passes, adapters = counts
    experts = sum(m.experts_of_layers) * expert
    tau = config.router.zero_compute_tau  # a balanced layer gives experts that compute nothing 1 / tau times the rows
    computed = tau * m.num_experts / (tau * m.num_experts + m.num_zero_compute)
    active = dense + routers + round(computed * passes * sum(config.top_k_of_layers) * expert)
    r = config.r
    slices = [math.ceil(math.ceil(e * r / ep) / (shard // ep)) for e in m.experts_of_layers]  # that a rank holds
    per_rank = trained = dense // shard + sum(slices) * expert // r + routers
    added = 0
    if adapters is not None:
        trained = adapters.dense // shard + sum(slices) * adapters.expert + adapters.shared
        added = adapters.dense + sum(m.experts_of_layers) * adapters.expert + adapters.shared
        per_rank += trained
        used = (
            adapters.dense + adapters.shared + round(computed * passes * sum(config.top_k_of_layers) * adapters.expert)
        )

    width = precision.get_dtype(config).itemsize
    tokens = t.seq_len * config.micro_batch
    live = 1 if isinstance(config.engine, Native) and config.engine.reshard_after_forward else m.num_layers
    block = (dense - embeddings + experts // ep) // m.num_layers
    gathered = width * (embeddings + live * block)
    held = width * block  # gradients before they are reduced: of one layer, or adding up until the last micro-step
    if config.micro_steps > 1:
        held = 4 * (embeddings + m.num_layers * block)
    if adapters is not None:
        held = 4 * (adapters.dense + added // ep)
    rows = round(computed * passes * config.router.top_k * tokens)
    layer = width * (tokens * (8 * m.dim + 3 * attention_width) + rows * (3 * r * m.dim + 4 * m.expert_hidden))
    sent = ep * (1 - (1 - 1 / ep) ** (config.router.top_k * r))  # ranks that a token goes to
    inputs = {"none": 0.0, "selective": 2 + sent * (ep - 1) / ep, "full": 2.0}[t.recompute]  # tokens that a layer keeps
    kept = layer + m.num_layers * (layer if t.recompute == "none" else round(width * inputs * tokens * m.dim))
    activations = kept + _head_bytes(config, tokens)
    matrices = active - (0 if is_tied else m.vocab_size * m.dim)
    matrices += (passes - 1) * m.num_moe_layers * shared
    products = 6 * matrices if adapters is None else 4 * matrices + 6 * used  # no gradients of frozen matrices
    flops = products + 6 * m.num_layers * attention_width * t.seq_len
    return Estimate(
        dense + experts + routers + added,
        active if adapters is None else active + used,
        per_rank,
        4 * per_rank,
        4 * trained + held,
        (8 if config.optim.state_dtype == "fp32" else 4) * trained,
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


def _count_preset(config: RunSpec, m: Model) -> Counts:
    assert m.vocab_size is not None
    norms = {"none": 0, "head": 2 * m.head_dim, "full": (m.num_heads + m.num_kv_heads) * m.head_dim}[m.qk_norm]
    attention = 2 * m.dim * (m.num_heads + m.num_kv_heads) * m.head_dim + norms + 2 * m.dim
    expert = 3 * m.dim * m.expert_hidden
    shared = m.num_shared_experts * expert
    embeddings = m.vocab_size * m.dim * (1 if m.tied_embeddings else 2) + m.dim
    dense = embeddings + m.num_layers * attention + m.num_dense_layers * 3 * m.dim * m.dense_hidden
    dense += m.num_moe_layers * shared
    with torch.device("meta"):
        model = Transformer(m, config.router, config.planner)
    replicated = sum(p.numel() for p in model.replicated())
    width, adapters = m.num_heads * m.head_dim, _count_adapters(model, config.lora, sum(m.experts_of_layers))
    return Counts(dense, embeddings, expert, replicated, shared, m.tied_embeddings, width, m.chain, adapters)


@lru_cache(maxsize=4)
def _count_folder(m: HuggingFace, folder: Path, lora: Lora) -> Counts:
    """Of the model as transformers builds it of `folder`, on the meta device."""
    from moetrain.hf.build import build_transformer
    from moetrain.hf.model import HFModel

    model = HFModel(build_transformer(folder, m.trust_remote_code, device="meta"), ("home", None))
    experts = sum(p.numel() for p in model.expert_parameters())
    replicated = sum(p.numel() for p in model.replicated())
    total = sum(p.numel() for p in model.parameters())
    is_tied = model.is_tied
    embeddings = m.vocab_size * m.dim * (1 if is_tied else 2)
    expert = experts // sum(m.experts_of_layers)
    dense, width = total - experts - replicated, model.attention_width
    adapters = _count_adapters(model, lora, sum(m.experts_of_layers))
    return Counts(dense, embeddings, expert, replicated, 0, is_tied, width, 1, adapters)


def _count_adapters(model: LanguageModel, lora: Lora, num_experts: int) -> AdapterCounts | None:
    """Give `model`, on the meta device, its adapters and count them; `num_experts`: of all layers."""
    if not lora.rank:
        return None
    add_adapters(model, lora)
    experts, replicated = model.expert_parameters(), set(model.replicated())
    kinds = {"dense": 0, "expert": 0, "shared": 0}
    for parameter in (p for p in model.parameters() if p.requires_grad):
        kind = "expert" if parameter in experts else "shared" if parameter in replicated else "dense"
        kinds[kind] += parameter.numel()
    return AdapterCounts(kinds["dense"], kinds["expert"] // num_experts, kinds["shared"])


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a large matrix product, measured now: what `perf/mfu` is a share
    of."""
    size = 8192 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        (a @ a).sum().item()  # .item() waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def short(number: float) -> str:
    """Return a number in short: 12.3M, 6.9B."""
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number:.3g}"
