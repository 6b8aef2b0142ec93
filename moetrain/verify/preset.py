"""The step of a model of ours: in one process, and on the layout of the configuration, through the engine.

Weights and gradients are read as a checkpoint would have them, so that any engine can be asked: AdamW's first moment
of the first step is a share of the gradient.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from moetrain.config import Config, ConfigError, load, resolve, vary
from moetrain.data.loader import Sequences
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.engine import build_engine
from moetrain.engine.entries import MODEL, Held, expected
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
    if config.optim.name != "adamw":
        raise ConfigError(f"optim.name={config.optim.name}: must be adamw, whose moments hold the gradients")
    few = min(layers, config.model.num_layers)
    return vary(config, {"model.vocab_size": VOCABULARY, "model.num_layers": few})


def settle_alone(overrides: list[str], layers: int, sequences: int) -> Config:
    """The same for one process: the native engine, all sequences at once. Raises `ConfigError`."""
    single = [word for word in overrides if not word.startswith(("engine=", "engine.", "parallel."))]
    return settle(single, layers, sequences, (f"train.micro_batch={sequences}",))


def run_step(config: Config, mesh: Mesh) -> tuple[Result, int]:
    """Run one optimizer step. Returns the whole result, and the copies of experts on other ranks."""
    spec = resolve(config, mesh.world, VOCABULARY, "fp32")
    model = build(spec)
    shapes = expected(model)
    engine = build_engine(model, mesh, spec)
    engine.plan_with(replace(default_costs(), row_forward=1.0, row_backward=2.0))  # lending is nothing against rows
    engine.entries()  # as at the beginning of a run: DeepSpeed makes AdamW's moments only now
    shares = list(micro_batches(spec, mesh, RandomSamples(config.train.seq_len), 0))
    step = optimizer_step(engine, spec, shares, LR)
    tokens = spec.tokens_per_step
    loss = torch.stack([part.nats.sum() / tokens + part.losses.weighted for part in step.parts]).sum()
    found: Result = {"loss": all_reduce_sum(loss), "norm": torch.tensor(step.norm, dtype=torch.float64)}
    found |= {f"counts of router {n}": torch.as_tensor(counts) for n, counts in enumerate(step.counts)}
    entries = engine.entries()
    for entry, shape in shapes.items():
        kind, _, name = entry.partition("/")
        if kind == "exp_avg":  # the mean of one gradient
            found[f"gradient of {name}"] = _gather(entries.get(entry), shape) / (1 - spec.optim.betas[0])
        elif kind == MODEL:
            found[f"next {name}"] = _gather(entries.get(entry), shape)
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


def _gather(part: Held | None, shape: tuple[int, ...]) -> Tensor:
    """The whole of an entry of a checkpoint, of which this rank has a part or none; several may have the same one."""
    values, holders = torch.zeros(math.prod(shape)), torch.zeros(math.prod(shape))
    if part is not None:
        place = slice(part.begin, part.begin + len(part.values))
        values[place], holders[place] = part.values.float().cpu(), 1.0
    return (all_reduce_sum(values) / all_reduce_sum(holders)).view(shape)
