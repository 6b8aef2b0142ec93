"""`model=hf`: what a configuration leaves to the folder of the model is filled in from there.

The sizes of the model, `router.top_k` and the tokenizer. A run keeps copies of the files that this needs
(`runs.keep_model`), so that it goes on where the folder is gone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moetrain.common.errors import ConfigError, short
from moetrain.config.architecture import CONFIG, Architecture, read_architecture, read_json
from moetrain.config.sections.model import HuggingFace, Model

KEPT = "model"  # in a run's folder
TOKENIZER = "tokenizer.json"
SIZES = ("dim", "num_layers", "moe_layers", "num_experts", "expert_hidden", "vocab_size")
DEFAULTS: dict[str, Any] = {  # of what config.yaml sets for presets
    "chain": 1,
    "zero_experts": 0,
    "copy_experts": 0,
    "constant_experts": 0,
    "expert_schedule": "uniform",
    "min_experts": None,
}


def complete(tree: dict[str, Any], given: Sequence[str] = ()) -> dict[str, Any]:
    """Return the tree of a configuration with all that follows from the model's folder, where it has one.

    `given`: fields that a user has set. Raises `ConfigError` where the folder is not what it should be, and where a
    size was set that is another there.
    """
    model = tree.get("model")
    if not isinstance(model, dict) or model.get("source") != "hf" or not isinstance(model.get("path"), str):
        return tree
    for name, value in model.items():
        if name in Model.model_fields and name not in HuggingFace.model_fields and value != DEFAULTS.get(name, value):
            raise ConfigError(f"model.{name}={short(value)}: model=hf has no such option")
    own = {name: value for name, value in model.items() if name not in DEFAULTS}
    folder = find_folder(model["path"], tree.get("run") or {})
    found = read_architecture(read_json(folder), model["path"])
    for name, value in _sizes(found).items():
        if own.get(name) not in (None, value) and tuple(_listed(own[name])) != tuple(_listed(value)):
            raise ConfigError(f"model.{name}={short(own[name])}: must be {short(value)}, as in {folder / CONFIG}")
    out = {**tree, "model": {**own, **_sizes(found)}}
    if isinstance(router := tree.get("router"), dict) and "router.top_k" not in given:
        out["router"] = {**router, "top_k": found.top_k}
    data = tree.get("data")
    if isinstance(data, dict) and _is_of_folder(data.get("tokenizer")) and (folder / TOKENIZER).is_file():
        out["data"] = {**data, "tokenizer": str(folder / TOKENIZER)}
    return out


def find_folder(path: str, run: dict[str, Any]) -> Path:
    """Return the model's folder, or where that is gone the copy of its small files that the run has kept."""
    kept = Path(str(run.get("dir") or ""), str(run.get("name") or ""), KEPT)
    is_gone = not (Path(path) / CONFIG).is_file()
    return kept if is_gone and run.get("name") and (kept / CONFIG).is_file() else Path(path)


def _is_of_folder(tokenizer: Any) -> bool:
    """Whether the tokenizer is the default, or was it, and its folder is gone."""
    return tokenizer is None or (not Path(str(tokenizer)).is_file() and Path(str(tokenizer)).name == TOKENIZER)


def _sizes(found: Architecture) -> dict[str, Any]:
    return {name: getattr(found, name) for name in SIZES}


def _listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]
