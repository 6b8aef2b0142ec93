"""A transformers model built from the `config.json` of a folder: the one place that does it.

Of a model that sees or hears it is the language model, under a head of its own where it has none.
"""

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moetrain.common.errors import ConfigError
from moetrain.hf.layout import is_experts

ASK = "model.trust_remote_code=true"  # what trusts the folder's code
PLAIN_LOGITS = {"self.lm_head(hidden_states)"}
PLAIN_HIDDEN = {  # all that a head without scaling does to the hidden states
    "outputs.last_hidden_state",
    "outputs[0]",
    "slice_logits_to_keep(hidden_states, logits_to_keep)",
    "slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)",
}


class WithHead(nn.Module):
    """A text model without a head of its own: hidden states become logits by the embedding's transpose."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        found: Any = self.model(**inputs)
        inner: Any = self.model
        found["logits"] = F.linear(found[0], inner.get_input_embeddings().weight)
        return found


def build_transformer(
    folder: str | Path,
    trust_remote_code: bool = False,
    layers: int | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    ask: str = ASK,
) -> Any:
    """Build the architecture at the folder in `dtype`, on `device`, as its own code initialises it.

    `layers`: how many to keep, the last ones; None: all. `ask`: what a user is told to set for remote code. Raises
    `ConfigError` for remote code, unless it is trusted, and for a model that transformers does not build or that has no
    experts it knows.
    """
    import transformers

    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path={folder}: has no config.json")
    if '"auto_map"' in path.read_text() and not trust_remote_code:
        raise ConfigError(f"model.path={folder}: has code of its own (auto_map); {ask} runs it")
    trust = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **trust).get_text_config()
        if layers is not None:
            config = reduce_depth(config, layers)
        config.use_cache = False
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # weights are dequantised as they are read
        with torch.device(device):
            model = _build(config, trust, dtype)
    except Exception as error:  # whatever transformers' own code says of a config that it does not take
        reason = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"model.path={folder}: {reason[-1] if reason else type(error).__name__}") from error
    if not any(is_experts(module) for module in model.modules()):
        kept = f" with {layers} layers" if layers is not None else ""
        raise ConfigError(
            f"model.path={folder}: {type(model).__name__}{kept} is not covered: none of its modules carries "
            "@use_experts_implementation"
        )
    return model.train()


def _build(config: Any, trust: dict[str, bool], dtype: torch.dtype) -> Any:
    import transformers

    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING or trust["trust_remote_code"]:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, **trust)
    return WithHead(transformers.AutoModel.from_config(config, dtype=dtype, **trust))


def reduce_depth(config: Any, layers: int) -> Any:
    """Return the config with so many layers: lists with an entry a layer are cut, first dense layers left out."""
    values = config.to_dict()
    before = values.get("num_hidden_layers") or len(values["layers_block_type"])
    layers = min(layers, before)
    changed: dict[str, Any] = {"num_hidden_layers": layers}
    for name, value in values.items():
        if isinstance(value, list) and len(value) == before:
            changed[name] = value[-layers:]  # the last ones: the first are dense in many models
    if values.get("first_k_dense_replace"):
        changed["first_k_dense_replace"] = layers - 1
    return type(config)(**{**values, **changed})


def unwrap(model: Any) -> Any:
    """Return the `PreTrainedModel` that was built."""
    return model.model if isinstance(model, WithHead) else model


def find_plain_head(model: Any) -> nn.Module | None:
    """Return the module whose weight [V, D] alone makes logits of the base model's hidden states.

    None where the family's code does more, such as scaling or capping them, or cannot be read: then logits are to be
    taken as it makes them.
    """
    if isinstance(model, WithHead):
        embedding: nn.Module = model.model.get_input_embeddings()  # type: ignore[operator]
        return embedding
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or getattr(model, "lm_head", None) is not head:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(model).forward))))
    except (OSError, TypeError, SyntaxError):
        return None
    found: dict[str, set[str]] = {"logits": set(), "hidden_states": set()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in map(ast.unparse, targets):
                if target in found:
                    found[target].add(ast.unparse(node.value))
    is_plain = found["logits"] == PLAIN_LOGITS and found["hidden_states"] <= PLAIN_HIDDEN
    return head if is_plain else None


def separates_documents(model: Any) -> bool:
    """Tell whether positions that begin anew keep tokens from attending to earlier documents of their sequence.

    Masks that transformers makes of positions do; layers with a state or a convolution do not.
    """
    transformer = unwrap(model)
    kinds = set(getattr(transformer.config, "layer_types", None) or ())
    has_convolution = any(isinstance(module, nn.Conv1d) for module in transformer.modules())
    if has_convolution or not kinds <= {"full_attention", "sliding_attention"}:
        return False
    module = inspect.getmodule(type(transformer))
    tree = ast.parse(inspect.getsource(module) if module is not None else "")
    found = [names for node in ast.walk(tree) if {"config", "attention_mask"} <= (names := _names_in(node))]
    return bool(found) and all("position_ids" in names for names in found)


def _names_in(node: ast.AST) -> set[Any]:
    """The keywords of a call, or the keys of a dict: what a mask is made of, in the family's code."""
    if isinstance(node, ast.Call):
        return {keyword.arg for keyword in node.keywords}
    return {key.value for key in node.keys if isinstance(key, ast.Constant)} if isinstance(node, ast.Dict) else set()
