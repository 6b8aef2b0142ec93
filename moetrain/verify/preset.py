"""The step of a model of ours: in one process, and on the layout of the configuration, through the engine."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moetrain.config import Config, ConfigError, load, resolve, vary
from moetrain.data.loader import Sequences
from moetrain.distributed import sharded
from moetrain.distributed.comm import all_gather, all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.engine.native import NativeEngine
from moetrain.moe.planning.cost import default_costs
from moetrain.training.step import build, micro_batches, optimizer_step
from moetrain.verify.compare import Case, Result, compare

LIMIT = 3e-5
VOCABULARY = 512
LR = 0.05
EXACT: tuple[str, ...] = ("train.dtype=fp32", "train.seq_len=16", "balance.accumulate=exact", "optim.clip=0")
EXACT += ("optim.eps=0.01",)  # an update that is smooth in the gradient: without it AdamW's first is its sign


class RandomSamples:
    """Random tokens, the same ones whoever asks."""

    def __init__(self, length: int) -> None:
        self._length = length

    def samples(self, begin: int, end: int) -> Sequences:
        """[B, L + 1] of each, as `data.loader.Samples`."""
        rows = [np.random.default_rng(n).integers(0, VOCABULARY, self._length + 1) for n in range(begin, end)]
        tokens = np.stack(rows) if rows else np.zeros((0, self._length + 1), np.int64)
        nothing = np.zeros_like(tokens)
        return Sequences(tokens, nothing, nothing, np.arange(begin, end))

    def count_tokens(self, end: int) -> int:
        """Returns the tokens of the global samples before `end`."""
        return end * self._length


def settle(overrides: list[str], layers: int, sequences: int, more: tuple[str, ...] = ()) -> Config:
    """The configuration of the step: the user's, in fp32 and with fewer layers. Raises `ConfigError`."""
    config = load([*overrides, *EXACT, f"train.global_batch={sequences}", *more])
    if config.engine.name != "native":
        raise ConfigError(f"engine={config.engine.name}: verify compares the native engine so far")
    few = min(layers, config.model.num_layers)
    return vary(config, {"model.vocab_size": VOCABULARY, "model.num_layers": few})


def run_step(config: Config, mesh: Mesh) -> tuple[Result, int]:
    """Run one optimizer step. Returns the whole result, and the copies of experts on other ranks."""
    spec = resolve(config, mesh.world, VOCABULARY, "fp32")
    engine = NativeEngine(build(spec), mesh, spec)
    engine.plan_with(replace(default_costs(), row_forward=1.0, row_backward=2.0))  # lending is nothing against rows
    found: Result = {}

    def keep(*_: Any) -> None:
        for name, parameter in engine.model.named_parameters():
            if parameter.grad is not None:
                found[f"gradient of {name}"] = _gather(mesh, name, parameter.grad)

    engine.optimizer.register_step_pre_hook(keep)
    shares = list(micro_batches(spec, mesh, RandomSamples(config.train.seq_len), 0))
    step = optimizer_step(engine, spec, shares, LR)
    tokens = spec.tokens_per_step
    loss = torch.stack([part.nats.sum() / tokens + part.losses.weighted for part in step.parts]).sum()
    found["loss"] = all_reduce_sum(loss)
    found["norm"] = torch.tensor(step.norm, dtype=torch.float64)
    found |= {f"counts of router {n}": torch.as_tensor(counts) for n, counts in enumerate(step.counts)}
    for name, parameter in engine.model.named_parameters():
        found[f"next {name}"] = _gather(mesh, name, parameter.detach())
    return found, sum(len(stats.plan.guests()) for part in step.parts for stats in part.stats)


def run_cases(overrides: list[str], layers: int, sequences: int, mesh: Mesh, alone: Result) -> list[Case]:
    """Run the step on the mesh in every case. All ranks call it; rank 0's differences count."""
    cases = []
    each = sequences // mesh.world
    for recompute, micro_steps in (("none", 1), ("full", 1), ("full", 2)):
        more = (f"train.recompute={recompute}", f"train.micro_batch={each // micro_steps}")
        config = settle(overrides, layers, sequences, more)
        result, guests = run_step(config, mesh)
        about = {"recompute": recompute == "full", "micro_steps": micro_steps, "planner": config.planner.name}
        cases.append(Case(about, guests, None, 0, compare(result, alone, LIMIT)))
    return cases


def _gather(mesh: Mesh, name: str, tensor: Tensor) -> Tensor:
    """The whole of a parameter or gradient."""
    tensor = sharded.gather_whole(tensor)
    return all_gather(tensor, mesh.ep.rows).flatten(0, 1) if ".experts." in name else tensor.clone()
