"""What a configuration needs to know of a transformers model, read from its `config.json` without transformers.

The families name the same things differently; what is read here is checked against the model when it is built.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.common import disk
from moetrain.common.errors import ConfigError, short

CONFIG = "config.json"
TEXT_PARTS = ("thinker_config", "text_config", "language_config", "llm_config")  # of models that see or hear
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
HIDDEN = ("moe_intermediate_size", "intermediate_size")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model with experts."""

    dim: int
    num_layers: int
    moe_layers: tuple[int, ...]  # the numbers of the layers that have experts
    num_experts: int
    expert_hidden: int
    top_k: int
    vocab_size: int


def read_json(folder: str | Path) -> dict[str, Any]:
    """Return what `config.json` in a folder holds. Raises `ConfigError` that names `model.path`."""
    file = Path(folder) / CONFIG
    if not file.is_file():
        raise ConfigError(f"model.path={folder}: must be a folder with a {CONFIG}")
    try:
        tree = json.loads(disk.read(file))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model.path={folder}: {CONFIG} cannot be read ({short(error)})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"model.path={folder}: {CONFIG} must hold an object")
    return tree


def find_text_config(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the language model in that of a model that sees or hears; else all of it."""
    for name in TEXT_PARTS:
        if isinstance(part := tree.get(name), dict):
            return find_text_config({**tree, name: None, **part})
    return dict(tree)


def read_architecture(tree: Mapping[str, Any], name: str) -> Architecture:
    """Return the sizes in what `config.json` holds; `name`: what `model.path` was given as.

    Raises `ConfigError` where they are missing or the model has no experts.
    """
    text = find_text_config(tree)
    num_experts = _read_first(text, *EXPERTS)
    if not num_experts:
        raise ConfigError(f"model.path={name}: has no routed experts")
    num_layers = _read_first(text, "num_hidden_layers") or len(text.get("layers_block_type") or ())
    sizes = {
        "hidden_size": _read_first(text, "hidden_size"),
        "num_hidden_layers": num_layers,
        " or ".join(HIDDEN): _read_first(text, *HIDDEN),
        TOP_K[0]: _read_first(text, *TOP_K),
        "vocab_size": _read_first(text, "vocab_size"),
    }
    if missing := next((key for key, size in sizes.items() if not size), None):
        raise ConfigError(f"model.path={name}: its configuration has no {missing}")
    dim, _, hidden, top_k, vocab = sizes.values()
    moe_layers = tuple(layer for layer in range(num_layers) if not _is_dense(text, layer, num_layers))
    if not moe_layers:
        raise ConfigError(f"model.path={name}: has no layer with experts")
    return Architecture(dim, num_layers, moe_layers, num_experts, hidden, top_k, vocab)


def _is_dense(text: Mapping[str, Any], layer: int, num_layers: int) -> bool:
    """Whether a layer has no experts, by whichever of the ways to say so a family uses."""
    kinds = text.get("mlp_layer_types") or text.get("layers_block_type")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return kinds[layer] not in ("sparse", "moe", "hash_moe")
    if isinstance(listed := text.get("moe_layers"), list):
        return layer not in listed
    if isinstance(freq := text.get("moe_layer_freq"), list):
        return not freq[layer]
    first = _read_first(text, "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
    last = text.get("moe_layer_end_index")
    if layer < first or (isinstance(last, int) and 0 <= last < layer) or layer in (text.get("mlp_only_layers") or ()):
        return True
    if step := _read_first(text, "decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval"):
        return bool((layer + 1) % step)
    if period := _read_first(text, "expert_layer_period"):
        return layer % period != (text.get("expert_layer_offset") or 0)
    return False


def _read_first(text: Mapping[str, Any], *names: str) -> int:
    """The first of these numbers that is there and not zero, of a list its first; else zero."""
    for name in names:
        value = text.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
