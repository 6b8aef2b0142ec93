"""What a model is, as far as time and memory depend on it: parameters, floating-point operations, widths.

From a configuration of ours (`from_config`), from the `config.json` of a transformers model (`from_hf`), or one of the
published models in `PUBLISHED` by name. Nothing is built and no torch is loaded.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moetrain.common.errors import ConfigError
from moetrain.config import Config, HuggingFace


@dataclass(frozen=True)
class AttentionShape:
    """One layer's attention, of any kind: grouped-query or latent (MLA)."""

    params: int  # norms included
    products: int  # of them in matrix products
    score_width: int  # heads × width of queries and keys
    value_width: int  # heads × width of values
    kv_width: int  # keys and values, or the latent that they are made of
    kept_width: int  # numbers a token keeps for the backward: queries, keys, values, output
    windows: tuple[int, ...] = ()  # of layers with a sliding window: their lengths, in tokens

    def pairs(self, seq_len: int, num_layers: int) -> float:
        """Query-key pairs a token and layer, mean over `num_layers` layers of causal attention."""
        windowed = sum(_pairs(seq_len, window) for window in self.windows[:num_layers])
        return (windowed + (num_layers - len(self.windows[:num_layers])) * seq_len / 2) / num_layers


def _pairs(seq_len: int, window: int) -> float:
    """Keys that a token attends to in the mean, where it sees `window` tokens at most."""
    window = min(window, seq_len)
    return window - window**2 / (2 * seq_len)


@dataclass(frozen=True)
class Shape:
    """A decoder of `num_dense` layers with a dense MLP, then layers with experts."""

    name: str
    dim: int
    num_layers: int
    num_dense: int
    dense_hidden: int
    vocab: int
    tied: bool
    experts: int
    top_k: int
    expert_hidden: int
    shared_hidden: int  # of all shared experts together
    attention: AttentionShape
    extra_params: int = 0  # biases, routers and what else is small
    expert_biases: int = 0  # of one expert

    @property
    def num_moe(self) -> int:
        return self.num_layers - self.num_dense

    @property
    def expert_params(self) -> int:
        """Of one expert: gate, up and down."""
        return 3 * self.dim * self.expert_hidden + self.expert_biases

    @property
    def router_params(self) -> int:
        """Of one layer."""
        return self.dim * self.experts

    @property
    def embedding_params(self) -> int:
        return self.vocab * self.dim * (1 if self.tied else 2)

    @property
    def dense_params(self) -> int:
        """All that is not routed experts, routers or embeddings."""
        layers = self.num_layers * (self.attention.params + 2 * self.dim) + self.dim
        mlps = self.num_dense * 3 * self.dim * self.dense_hidden + self.num_moe * 3 * self.dim * self.shared_hidden
        return layers + mlps + self.extra_params

    @property
    def params(self) -> int:
        routed = self.num_moe * (self.experts * self.expert_params + self.router_params)
        return self.dense_params + self.embedding_params + routed

    @property
    def active_params(self) -> int:
        routed = self.num_moe * (self.top_k * self.expert_params + self.router_params)
        return self.dense_params + self.embedding_params + routed

    def cut(self, slices: int) -> "Shape":
        """The shape whose experts are slices of these, as measured costs are of them."""
        return replace(self, expert_hidden=self.expert_hidden // slices) if slices > 1 else self

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward, products only, causal attention counted at half: what MFU is a share of."""
        weights = self.active_params - self.vocab * self.dim * (0 if self.tied else 1)
        pairs = self.attention.pairs(seq_len, self.num_layers)
        return 6 * weights + 6 * self.num_layers * pairs * (self.attention.score_width + self.attention.value_width)


def from_config(config: Config) -> Shape:
    """The transformer of `config`; its vocabulary is that of the data where the model has none of its own.

    Raises `ConfigError` for what the simulator does not know: chains, zero-compute experts, experts that vary by depth.
    """
    m = config.model
    if isinstance(m, HuggingFace):
        return from_hf(m.path)
    known = {"chain": 1, "zero_experts": 0, "copy_experts": 0, "constant_experts": 0, "expert_schedule": "uniform"}
    for field, value in known.items():
        if (given := getattr(m, field)) != value:
            raise ConfigError(f"model.{field}={given}: must be {value} for `moetrain simulate`")
    if config.router.k_schedule != "uniform":
        raise ConfigError(f"router.k_schedule={config.router.k_schedule}: must be uniform for `moetrain simulate`")
    norms = {"none": 0, "head": 2 * m.head_dim, "full": (m.num_heads + m.num_kv_heads) * m.head_dim}[m.qk_norm]
    return Shape(
        name="model",
        dim=m.dim,
        num_layers=m.num_layers,
        num_dense=m.num_dense_layers,
        dense_hidden=m.dense_hidden,
        vocab=m.vocab_size or config.data.vocab_size,
        tied=m.tied_embeddings,
        experts=m.num_experts,
        top_k=config.router.top_k,
        expert_hidden=m.expert_hidden,
        shared_hidden=m.num_shared_experts * m.expert_hidden,
        attention=_grouped_query(m.dim, m.num_heads, m.num_kv_heads, m.head_dim, norms),
    )


def _grouped_query(dim: int, heads: int, kv_heads: int, head_dim: int, norms: int, windows: Any = ()) -> AttentionShape:
    products = 2 * dim * (heads + kv_heads) * head_dim
    kept = (2 * heads + 2 * kv_heads) * head_dim
    return AttentionShape(
        products + norms, products, heads * head_dim, heads * head_dim, 2 * kv_heads * head_dim, kept, tuple(windows)
    )


def _latent(tree: Mapping[str, Any]) -> AttentionShape:
    """Multi-head latent attention, as DeepSeek-V2, V3 and Kimi-K2 have it."""
    dim, heads, q_rank, kv_rank = (
        tree["hidden_size"],
        tree["num_attention_heads"],
        tree.get("q_lora_rank"),
        tree["kv_lora_rank"],
    )
    nope, rope, value = tree["qk_nope_head_dim"], tree["qk_rope_head_dim"], tree["v_head_dim"]
    queries = dim * q_rank + q_rank * heads * (nope + rope) if q_rank else dim * heads * (nope + rope)
    products = queries + dim * (kv_rank + rope) + kv_rank * heads * (nope + value) + heads * value * dim
    kept = heads * (2 * (nope + rope) + 2 * value) + (q_rank or 0) + kv_rank + rope
    return AttentionShape(
        products + (q_rank or 0) + kv_rank, products, heads * (nope + rope), heads * value, kv_rank + rope, kept
    )


def from_hf(path: str) -> Shape:
    """Of `config.json` in the folder `path`, or of a published model of that name. Raises `ConfigError`."""
    if path in PUBLISHED:
        return from_tree(PUBLISHED[path], path)
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        tree = json.loads(file.read_text())
    except (OSError, ValueError):
        names = ", ".join(PUBLISHED)
        raise ConfigError(f"model.path={path}: must be a folder with a config.json, or one of {names}") from None
    return from_tree(tree, path)


def from_tree(tree: Mapping[str, Any], name: str) -> Shape:
    """Of a transformers configuration. Raises `ConfigError` for models whose layers are not of a known kind."""
    tree = {**tree, **(tree.get("text_config") or {})}
    kinds = set(tree.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ConfigError(f"model.path={name}: has layers that the simulator does not know: {', '.join(sorted(kinds))}")
    experts = _first(tree, "n_routed_experts", "num_experts", "num_local_experts")
    if not experts:
        raise ConfigError(f"model.path={name}: has no routed experts")
    try:
        return _shape(tree, name, experts)
    except KeyError as error:
        raise ConfigError(f"model.path={name}: its configuration has no {error.args[0]}") from None


def _shape(tree: Mapping[str, Any], name: str, experts: int) -> Shape:
    dim, layers, heads = tree["hidden_size"], tree["num_hidden_layers"], tree["num_attention_heads"]
    hidden = _first(tree, "moe_intermediate_size") or tree["intermediate_size"]
    head_dim, kv_heads = tree.get("head_dim") or dim // heads, tree.get("num_key_value_heads") or heads
    is_gpt_oss = tree.get("model_type") == "gpt_oss"
    biases = (heads + 2 * kv_heads) * head_dim + dim + heads if is_gpt_oss else 0  # and sinks
    types = tree.get("layer_types") or ()
    windows = [tree["sliding_window"] for kind in types if kind == "sliding_attention"]
    if "kv_lora_rank" in tree:
        attention = _latent(tree)
    else:
        is_normed = tree.get("model_type") in ("qwen3_moe", "qwen3")
        attention = _grouped_query(dim, heads, kv_heads, head_dim, 2 * head_dim * is_normed + biases, windows)
    shared = tree.get("shared_expert_intermediate_size") or (tree.get("n_shared_experts") or 0) * hidden
    step = tree.get("decoder_sparse_step") or 1
    dense = set(tree.get("mlp_only_layers") or ()) | set(range(tree.get("first_k_dense_replace") or 0))
    dense |= {layer for layer in range(layers) if (layer + 1) % step}
    return Shape(
        name=name,
        dim=dim,
        num_layers=layers,
        num_dense=len(dense),
        dense_hidden=tree.get("intermediate_size") or hidden,
        vocab=tree["vocab_size"],
        tied=bool(tree.get("tie_word_embeddings", False)),
        experts=experts,
        top_k=tree["num_experts_per_tok"],
        expert_hidden=hidden,
        shared_hidden=shared,
        attention=attention,
        extra_params=(layers * experts) if is_gpt_oss else 0,
        expert_biases=(2 * hidden + dim) if is_gpt_oss else 0,
    )


def _first(tree: Mapping[str, Any], *names: str) -> int:
    return next((int(tree[name]) for name in names if tree.get(name)), 0)


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2880,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
    }


def _qwen3(dim: int, layers: int, heads: int, hidden: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "hidden_size": dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 3 * dim,
        "moe_intermediate_size": hidden,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    }


def _deepseek(layers: int, dense: int, heads: int, experts: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "first_k_dense_replace": dense,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "vocab_size": vocab,
    }


# The figures of their config.json; multi-token-prediction layers are left out.
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek-v3": _deepseek(61, 3, 128, 256, 129280),
    "kimi-k2": _deepseek(61, 1, 64, 384, 163840),
    "qwen3-30b-a3b": _qwen3(2048, 48, 32, 768),
    "qwen3-235b-a22b": _qwen3(4096, 94, 64, 1536),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
}
