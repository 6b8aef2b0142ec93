"""Our own models as architectures of transformers: Qwen3-MoE, and OLMoE where QK-norm is over the full width.

docs/model.md has the names side by side.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from moetrain.common.errors import ConfigError
from moetrain.config import Config, Model
from moetrain.moe.options import ROUTERS

FEATURES: dict[str, Any] = {  # what neither architecture has, and the values that ask for none of it
    "model.num_shared_experts": 0,
    "model.chain": 1,
    "model.zero_experts": 0,
    "model.copy_experts": 0,
    "model.constant_experts": 0,
    "model.expert_schedule": "uniform",
    "router.name": "topk",
    "router.scores": "softmax",
    "router.scaling": 1.0,
    "router.skew": 0.0,
    "router.groups": None,
    "router.capacity_factor": None,
    "router.k_schedule": "uniform",
    "balance.bias": "none",
}


class Key(NamedTuple):
    """A key of the folder, and the entry of a checkpoint's model that it is taken from."""

    key: str
    entry: str
    half: int | None = None  # of the entry's rows; None: all


def describe_preset(config: Config, vocab_size: int) -> dict[str, Any]:
    """Return the `config.json` of a model, without dtype and token ids.

    Raises `ConfigError` that names the first option which the architectures of transformers do not have.
    """
    model, router = _check_features(config), config.router
    normalise = router.normalise
    if normalise is None:
        normalise = ROUTERS[router.name].normalises and router.top_k > 1
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "num_experts": model.num_experts,
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": normalise,
        "max_position_embeddings": config.train.seq_len,
        "rope_theta": model.rope_theta,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "output_router_logits": False,
        "router_aux_loss_coef": config.balance.coefficient,
        "pad_token_id": None,
        "bos_token_id": None,
    }
    if model.qk_norm == "full":
        own = {"architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "intermediate_size": model.expert_hidden}
        return {**own, **shared, "clip_qkv": None}
    own = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "intermediate_size": model.dense_hidden}
    dense = list(range(model.num_dense_layers))
    experts = {"moe_intermediate_size": model.expert_hidden, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    return {**own, **shared, **experts, "head_dim": model.head_dim, "use_sliding_window": False}


def list_keys(config: Config) -> Iterator[Key]:
    """Yield the keys of the folder in the order of the layers; experts one by one, as both families publish them."""
    model = _check_features(config)
    yield Key("model.embed_tokens.weight", "embed.weight")
    for number in range(model.num_layers):
        theirs, ours = f"model.layers.{number}", f"layers.{number}"
        yield Key(f"{theirs}.input_layernorm.weight", f"{ours}.attn_norm.weight")
        yield from (Key(f"{theirs}.self_attn.{p}_proj.weight", f"{ours}.attn.{p}.weight") for p in "qkvo")
        yield from (Key(f"{theirs}.self_attn.{p}_norm.weight", f"{ours}.attn.{p}_norm.weight") for p in "qk")
        yield Key(f"{theirs}.post_attention_layernorm.weight", f"{ours}.ffn_norm.weight")
        if number < model.num_dense_layers:
            for part in ("gate", "up", "down"):
                yield Key(f"{theirs}.mlp.{part}_proj.weight", f"{ours}.mlp.{part}.weight")
            continue
        yield Key(f"{theirs}.mlp.gate.weight", f"{ours}.moe.router.weight")
        for expert in range(model.num_experts):
            expert_key, entry = f"{theirs}.mlp.experts.{expert}", f"{ours}.moe.experts.{expert}"
            yield Key(f"{expert_key}.gate_proj.weight", f"{entry}.gate_up", 0)
            yield Key(f"{expert_key}.up_proj.weight", f"{entry}.gate_up", 1)
            yield Key(f"{expert_key}.down_proj.weight", f"{entry}.down")
    yield Key("model.norm.weight", "norm.weight")
    if not model.tied_embeddings:
        yield Key("lm_head.weight", "head.weight")


def _check_features(config: Config) -> Model:
    """The shape of the model. Raises `ConfigError` for what the architectures of transformers do not have."""
    model = config.model
    if not isinstance(model, Model):
        raise ConfigError(f"model.source={model.source}: must be preset for an export so far")
    values = config.model_dump(mode="json")
    for field, none in FEATURES.items():
        section, _, name = field.partition(".")
        if values[section].get(name, none) != none:
            raise _refuse(field, values[section][name], f"only with {none if none is not None else 'null'}")
    if model.qk_norm == "none":
        raise _refuse("model.qk_norm", "none", "with head as Qwen3-MoE, with full as OLMoE")
    if model.qk_norm == "full":
        if model.num_dense_layers:
            raise _refuse("model.num_dense_layers", model.num_dense_layers, "OLMoE has no dense layers")
        if model.head_dim * model.num_heads != model.dim:
            raise _refuse("model.head_dim", model.head_dim, f"OLMoE has heads of {model.dim // model.num_heads}")
    return model


def _refuse(field: str, value: Any, rule: str) -> ConfigError:
    return ConfigError(f"{field}={value}: no architecture of transformers has it that a model is exported as; {rule}")
