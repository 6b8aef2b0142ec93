"""Engines: how a model's parameters, gradients and optimizer states lie on the ranks."""

from importlib import import_module

from moetrain.config import RunSpec
from moetrain.distributed.mesh import Mesh
from moetrain.engine.base import Engine
from moetrain.models.base import LanguageModel

ENGINES = {"native": "NativeEngine", "deepspeed": "DeepSpeedEngine"}  # of the module that has the engine's name


def build_engine(model: LanguageModel, mesh: Mesh, config: RunSpec) -> Engine:
    """The engine that `config.engine` names, imported only now. `model` is on the meta device."""
    name = config.engine.name
    return getattr(import_module(f"moetrain.engine.{name}"), ENGINES[name])(model, mesh, config)
