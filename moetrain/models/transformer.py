"""A decoder-only Mixture-of-Experts transformer, built on one device; it knows no ranks.

Cut so that its parameters map one to one onto Qwen3-MoE and OLMoE of Hugging Face (`docs/model.md` has the table).

B sequences, L positions, T = B·L tokens, D model width, A heads, G key/value heads, C head width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain import config
from moetrain.config.core_options import planner_options, router_options, zero_compute_options
from moetrain.config.schedules import spread
from moetrain.models.base import AnyChoice, LanguageModel, ReadRows, SpreadableExperts
from moetrain.models.cross_entropy import linear_cross_entropy_at
from moetrain.models.initialise import draw_values
from moetrain.models.linear import Linear
from moetrain.moe.experts import Experts
from moetrain.moe.kernels import cpu_attention
from moetrain.moe.layer import LayerStats, MoE
from moetrain.moe.routing import ROUTERS, Place, Router
from moetrain.moe.routing.base import Replicated

Run = Callable[..., Any]  # run(function, *args) calls it, perhaps recomputing it in the backward


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_again: Run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class Recompute(NamedTuple):
    """How the parts of a layer run."""

    dense: Run  # attention and router; a whole dense layer
    shared: Run  # shared experts, inside of `experts`
    experts: Run  # dispatch, experts, combine


RECOMPUTE = {
    "none": Recompute(_call, _call, _call),
    "selective": Recompute(_again, _again, _call),  # experts by themselves keep what they were sent, and no more
    "full": Recompute(_again, _call, _again),
}


IN_TRANSFORMERS = {  # parts of names, as Qwen3-MoE and OLMoE have them
    "attn": "self_attn",
    **{part: f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down", "gate_up")},
    "moe": "mlp",
    "router": "gate",
    "shared": "shared_expert",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU: leading dense layers and shared experts."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = Linear(dim, hidden)
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rope_table(length: int, width: int, theta: float, device: torch.device) -> Tensor:
    """[2, L, C] cosines and sines, fp32 (RoFormer, Eq. 15, halves as in Llama)."""
    rate = theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), rate)
    return torch.stack([angle.cos(), angle.sin()]).repeat(1, 1, 2)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn [B, A, L, C] by position."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = rope.to(x.dtype)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √C) v where `mask` [B, 1, L, L] is true, None: causal. q [B, A, L, C]; k, v [B, G, L, C]; returns
    [B, L, A, C]."""
    if mask is None and cpu_attention.fits(q, k):
        return cpu_attention.attention(q, k, v)
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return y.transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention with optional QK-norm."""

    def __init__(self, m: config.Model) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = m.num_heads, m.num_kv_heads, m.head_dim
        self.q = Linear(m.dim, m.num_heads * m.head_dim)
        self.k = Linear(m.dim, m.num_kv_heads * m.head_dim)
        self.v = Linear(m.dim, m.num_kv_heads * m.head_dim)
        self.o = Linear(m.num_heads * m.head_dim, m.dim)
        self.qk_norm = m.qk_norm
        if m.qk_norm != "none":
            full = m.qk_norm == "full"
            self.q_norm = RMSNorm(m.head_dim * (m.num_heads if full else 1), m.norm_eps)
            self.k_norm = RMSNorm(m.head_dim * (m.num_kv_heads if full else 1), m.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, D] -> [B, L, D]. `mask` [B, 1, L, L], true where a position may look; None: causal."""
        batch, length, _ = x.shape
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.view(batch, length, y.shape[-1] // self.width, self.width) for y in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = rotate(q.transpose(1, 2), rope), rotate(k.transpose(1, 2), rope), v.transpose(1, 2)
        return self.o(attend(q, k, v, mask).flatten(2))


def build_moe(
    m: config.Model,
    router: config.RouterSection,
    planner: config.Planner,
    shared: nn.Module | None = None,
    index: int = 0,
) -> MoE:
    """Returns the layer of experts that a configuration describes."""
    return MoE(
        m.dim,
        m.expert_hidden,
        m.num_experts,
        router=router.name,
        router_options=router_options(router),
        planner=planner.name,
        planner_options=planner_options(planner),
        zero_compute=zero_compute_options(m, router),
        shared=shared,
        passes=m.chain,
        index=index,
    )


class Block(nn.Module):
    """Attention, then experts or a dense MLP, each behind its norm and on the residual stream."""

    def __init__(
        self, m: config.Model, router: config.RouterSection, planner: config.Planner, dense: bool, index: int = 0
    ) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(m.dim, m.norm_eps)
        self.attn = Attention(m)
        self.ffn_norm = RMSNorm(m.dim, m.norm_eps)
        self.mlp = MLP(m.dim, m.dense_hidden) if dense else None
        shared = MLP(m.dim, m.num_shared_experts * m.expert_hidden) if m.num_shared_experts and not dense else None
        self.moe = None if dense else build_moe(m, router, planner, shared, index)

    def forward(
        self,
        x: Tensor,
        carry: Any,
        place: Place,
        rope: Tensor,
        mask: Tensor | None,
        run: Recompute,
        replay: Iterator[AnyChoice],
    ) -> tuple[Tensor, list[LayerStats], Any]:
        """[B, L, D] -> [B, L, D]; statistics of each pass through the experts.

        `replay`: choices to take instead of making them, until there are none left.
        """
        if self.moe is None:
            return run.dense(self._dense, x, rope, mask), [], carry
        x, flat_TD, scores, carry = run.dense(self._attend_and_route, x, carry, place, rope, mask)
        stats = []
        for turn in range(len(self.moe.routers)):
            if turn:
                flat_TD, scores, carry = run.dense(self._route, x, carry, place, turn)
            decision = self.moe.decide(scores, place, next(replay, None), turn)
            x = x + run.experts(self.moe.compute, flat_TD, scores, decision, turn, run.shared).view_as(x)
            stats.append(LayerStats.collect(scores, decision, place))
        return x, stats, carry

    def _dense(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        assert self.mlp is not None
        x = x + self.attn(self.attn_norm(x), rope, mask)
        return x + self.mlp(self.ffn_norm(x))

    def _attend_and_route(self, x: Tensor, carry: Any, place: Place, rope: Tensor, mask: Tensor | None) -> tuple:
        x = x + self.attn(self.attn_norm(x), rope, mask)
        return x, *self._route(x, carry, place, 0)

    def _route(self, x: Tensor, carry: Any, place: Place, turn: int) -> tuple:
        """([T, D] what the experts see, scores, carry). Every pass has the residual stream behind the layer's norm."""
        assert self.moe is not None
        flat_TD = self.ffn_norm(x).flatten(0, 1)
        return flat_TD, *self.moe.route(flat_TD, carry, place, turn)


class Transformer(LanguageModel):
    """The model of our presets."""

    def __init__(self, m: config.Model, router: config.RouterSection, planner: config.Planner, recompute: str = "none"):
        super().__init__()
        assert m.vocab_size is not None
        self.options = m
        self.embed = nn.Embedding(m.vocab_size, m.dim)
        self.layers = nn.ModuleList(Block(m, router, planner, dense=True) for _ in range(m.num_dense_layers))
        each = zip(m.experts_of_layers, spread(router.k_schedule, m.num_moe_layers, router.top_k, 1), strict=True)
        for number, (experts, top_k) in enumerate(each):
            own = m.model_copy(update={"num_experts": experts}), router.model_copy(update={"top_k": top_k})
            self.layers.append(Block(*own, planner, dense=False, index=number * m.chain))
        self.shared_router = ROUTERS[router.name].shared(router_options(router))
        self.norm = RMSNorm(m.dim, m.norm_eps)
        self.head = Linear(m.dim, m.vocab_size)
        self.tie_weights()
        self.run = RECOMPUTE[recompute]

    def compile_dense(self) -> None:
        """torch.compile for attention, norms and dense MLPs, at their first call; experts and head stay as they are."""
        for module in self.modules():
            if isinstance(module, Attention | MLP | RMSNorm):
                module.compile()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    @property
    def routers(self) -> list[Router]:
        return [router for moe in self.modules() if isinstance(moe, MoE) for router in moe.routers]

    def freeze_routers(self) -> None:
        for module in (*self.routers, self.shared_router):
            if module is not None:
                module.requires_grad_(False)

    def find_embedding(self) -> nn.Module:
        return self.embed

    def find_unadapted(self) -> set[nn.Module]:
        replicated = [module for module in self.modules() if isinstance(module, Replicated)]
        return {self.head, *(inner for module in replicated for inner in module.modules())}

    def name_in_transformers(self, name: str) -> str:
        parts = ["model", *(IN_TRANSFORMERS.get(part, part) for part in name.split("."))]
        return {"head": "lm_head"}.get(name, ".".join(parts))

    def find_layers(self) -> Iterator[tuple[int, MoE]]:
        for number, block in enumerate(self.layers):
            yield from ((number, module) for module in block.modules() if isinstance(module, MoE))

    def find_experts(self) -> dict[str, tuple[nn.Module, SpreadableExperts]]:
        return {name: (module, module) for name, module in self.named_modules() if isinstance(module, Experts)}

    def replicated(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(p for m in self.modules() if isinstance(m, Replicated) for p in m.parameters()))

    def undecayed(self) -> set[nn.Parameter]:
        """Norms and embeddings."""
        embeddings = {p for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return embeddings | {p for p in self.parameters() if p.ndim <= 1}

    def initial_values(self, seed: int) -> Iterator[tuple[nn.Parameter, ReadRows]]:
        """normal(0, init_std), / sqrt(2 · layers) where they write to the residual stream; routers may have a standard
        deviation of their own."""
        std = self.options.init_std
        small = std / math.sqrt(2 * self.options.num_layers)
        own_std = {
            f"{owner}.{name}": module.init_std
            for owner, module in self.named_modules()
            if isinstance(module, Replicated) and module.init_std is not None
            for name, _ in module.named_parameters()
        }

        def std_of(name: str) -> float:
            owner, _, last = name.rpartition(".")
            return own_std.get(name, small if last == "down" or owner.endswith((".o", ".down")) else std)

        return draw_values(self, seed, std_of)

    def initialise_buffers(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def tie_weights(self) -> None:
        if self.options.tied_embeddings:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        document: Tensor | None = None,
        domain: Tensor | None = None,
        sample: Tensor | None = None,
        choices: Sequence[AnyChoice] | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerStats]]:
        x, stats = self._hidden(tokens, document, domain, sample, choices or ())
        if targets is None:
            return self.head(x), stats
        return linear_cross_entropy_at(positions, x, self.head.weight, targets, self.head.kernel_choice), stats

    @torch.no_grad()
    def count(
        self,
        tokens: Tensor,
        document: Tensor | None,
        domain: Tensor | None,
        sample: Tensor | None,
        choices: Sequence[AnyChoice] | None = None,
    ) -> list[LayerStats]:
        return self._hidden(tokens, document, domain, sample, choices or ())[1]

    def _hidden(
        self,
        tokens: Tensor,
        document: Tensor | None,
        domain: Tensor | None,
        sample: Tensor | None,
        choices: Sequence[AnyChoice],
    ) -> tuple[Tensor, list[LayerStats]]:
        rope = rope_table(tokens.shape[1], self.options.head_dim, self.options.rope_theta, tokens.device)
        mask = None
        if document is not None:
            causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
            mask = ((document[:, :, None] == document[:, None, :]) & causal)[:, None]
        real_T = None if document is None or bool((document >= 0).all()) else (document >= 0).flatten()
        place = Place(tokens.shape[1], sample, None if domain is None else domain.flatten(), real_T)
        x, stats = self.embed(tokens), []
        carry = None if self.shared_router is None else self.shared_router()
        run, replay = self.run if torch.is_grad_enabled() else RECOMPUTE["none"], iter(choices)
        for layer in self.layers:
            x, layer_stats, carry = layer(x, carry, place, rope, mask, run, replay)
            stats += layer_stats
        return self.norm(x), stats

    def at_step(self, step: int, train: config.Train) -> None:
        for router in self.routers:
            router.at_step(step, train.steps, train.seed)
