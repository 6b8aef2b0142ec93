"""The configuration of a run: its schema, how it is loaded, and the rules between its fields."""

from moetrain.common.errors import ConfigError
from moetrain.config.compose import composing, config_dir, dump, from_tree, load, load_resolved
from moetrain.config.layout import find_ep
from moetrain.config.overrides import fields_of
from moetrain.config.schema import (
    AnyEngine,
    Balance,
    Checkpoint,
    Config,
    Data,
    DeepSpeed,
    Eval,
    Generate,
    Model,
    Native,
    Optim,
    Parallel,
    Planner,
    Recovery,
    Router,
    Run,
    Track,
    Train,
)
from moetrain.config.spec import RunSpec, fix_places, name_run, resolve, resolve_early, vary

__all__ = [
    "AnyEngine",
    "Balance",
    "Checkpoint",
    "Config",
    "ConfigError",
    "Data",
    "DeepSpeed",
    "Eval",
    "Generate",
    "Model",
    "Native",
    "Optim",
    "Parallel",
    "Planner",
    "Recovery",
    "Router",
    "Run",
    "RunSpec",
    "Track",
    "Train",
    "composing",
    "config_dir",
    "dump",
    "fields_of",
    "find_ep",
    "fix_places",
    "from_tree",
    "load",
    "load_resolved",
    "name_run",
    "resolve",
    "resolve_early",
    "vary",
]
