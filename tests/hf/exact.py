"""The same model in one process and spread over ranks: outputs and every gradient."""

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.distributed.mesh import Mesh
from moetrain.hf.parallel import HFExpertParallel, expert_parallel
from moetrain.hf.pinning import PinnedChoices
from moetrain.moe.planning.plan import Plan
from tests.hf.families import build
from tests.moe.test_moe import any_plan

SEQUENCES, LENGTH, VOCABULARY = 4, 8, 128
IN_FP64 = {"gemma4", "diffusion_gemma", "deepseek_v4"}  # their own gradients in fp32 are 2e-5 away from those in fp64


def batch() -> Tensor:
    return torch.randint(3, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))


def forced(counts: np.ndarray, home: np.ndarray, *rest: Any) -> Plan:
    """Rows anywhere, differently for every input."""
    return any_plan(counts, home, int((counts * np.arange(1, counts.size + 1).reshape(counts.shape)).sum()))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """This rank's share of the mean over the global batch."""
    nats = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="sum")
    return nats / (SEQUENCES * (LENGTH - 1))


def model_of(name: str) -> nn.Module:
    return build(name).to(torch.float64 if name in IN_FP64 else torch.float32)


def reference(name: str) -> tuple[nn.Module, Tensor, PinnedChoices]:
    """The model after one backward in this process, its logits and its choices."""
    model, ids, pins = model_of(name), batch(), PinnedChoices()
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module.config, "_experts_implementation"):
            module.config._experts_implementation = "eager"
    with pins.record(model):
        logits = model(input_ids=ids, use_cache=False).logits
    loss_of(logits, ids).backward()
    return model, logits.detach(), pins


def spread_forced(mesh: Mesh, model: nn.Module, grouped: bool = False) -> HFExpertParallel:
    """Spread the model; the plans are `forced`. `grouped`: SwiGLU takes the path of any family too."""
    replicas = mesh.expert_data if mesh.expert_data.size() > 1 else None
    handle = expert_parallel(model, mesh.ep, "home", replicas=replicas, reduction="sum")
    for one in handle.experts:
        one.planner = forced
        one.is_fused &= not grouped
    return handle


def shares(ranks: int, idle: bool) -> list[int]:
    """Sequences of each rank; with `idle` the last one has none."""
    if not idle:
        return [SEQUENCES // ranks] * ranks
    return [SEQUENCES - (ranks - 2), *[1] * (ranks - 2), 0]


def compare(mesh: Mesh, name: str, cases: list[tuple[bool, bool]], grouped: bool = False) -> list[tuple[float, str]]:
    """For each case of (recompute, idle): the largest difference, of the largest element, and where it is."""
    found = []
    whole, logits, pins = reference(name)
    for recompute, idle in cases:
        model = model_of(name)
        handle = spread_forced(mesh, model, grouped)
        if recompute:
            recomputed = model if hasattr(model, "activation_checkpointing_enable") else model.model
            recomputed.activation_checkpointing_enable()
        sizes = shares(mesh.world, idle)
        begin, end = sum(sizes[: mesh.rank]), sum(sizes[: mesh.rank + 1])
        ids = batch()[begin:end]
        handle.begin_step()
        if begin < end:
            part = pins.part(begin, end, SEQUENCES).replay() if not recompute else nullcontext()
            with part:  # a recompute has to replay what was chosen here
                mine = model(input_ids=ids, use_cache=False).logits
            loss_of(mine, ids).backward()
        else:
            mine = logits[:0]
            handle.join_without_tokens().backward()
        handle.end_step()
        handle.reduce_dense_gradients()
        assert any(one.guests for one in handle.statistics())
        worst = (_difference(mine.detach(), logits[begin:end], float(logits.abs().max())), "logits")
        whole_of, owners = dict(whole.named_parameters()), handle._find_owners()
        for key, parameter in model.named_parameters():
            expected, got = whole_of[key].grad, parameter.grad
            if expected is None:
                assert got is None or not got.any(), key
                continue
            largest = float(expected.abs().max())
            if key in owners:
                expected = expected[owners[key].own_experts()]
            worst = max(worst, (_difference(got, expected, largest), key))
        norm = handle.clip_grad_norm_(1e9)
        squares = [p.grad.double().square().sum() for p in whole.parameters() if p.grad is not None]
        expected_norm = float(torch.stack(squares).sum().sqrt())
        worst = max(worst, (abs(norm - expected_norm) / expected_norm, "norm"))
        found.append(worst)
    return found


def _difference(got: Tensor, expected: Tensor, largest: float) -> float:
    return float((got - expected).abs().max()) / max(largest, 1e-20) if expected.numel() else 0.0
