"""The step of a transformers model: in one process by transformers alone, and spread over ranks.

S sequences in all, of L tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain import hf
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.hf.build import build_transformer, unwrap
from moetrain.hf.layout import is_experts
from moetrain.hf.pinning import PinnedChoices
from moetrain.moe.planning.plan import Ints, Plan
from moetrain.verify.compare import Case, Result, compare, compare_rounded

LENGTH = 16
LR = 0.1  # of plain SGD: the first step of Adam is a sign
FAULTS = ("dropped-reduction", "wrong-divisor", "transposed-expert", "expert-missing-in-norm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORCED = "forced"  # the plan that moves rows anywhere


@dataclass(frozen=True)
class VerifyStep:
    """What is run: the model, the batch, and the ways to run it."""

    folder: str  # with config.json
    layers: int
    sequences: int
    planner: str
    cases: tuple[tuple[bool, int], ...]  # recompute, micro-steps
    trust_remote_code: bool = False
    fault: str | None = None
    limit: float = 1e-5
    dtype: str = "fp32"  # or bf16


def build_model(step: VerifyStep, dtype: str | None = None) -> Any:
    """Build the architecture at the folder with random weights, the same in every process.

    `dtype`: of its parameters; None: the step's. Raises `ConfigError` as `build_transformer`.
    """
    torch.manual_seed(0)
    wanted = DTYPES[dtype or step.dtype]
    return build_transformer(step.folder, step.trust_remote_code, step.layers, dtype=wanted, ask="--trust-remote-code")


def make_batch(step: VerifyStep, vocabulary: int) -> Tensor:
    """Return [S, L] random tokens, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, min(vocabulary, 4096), (step.sequences, LENGTH), generator=generator)


def run_alone(step: VerifyStep) -> dict[str, Any]:
    """Run the step in this process, by transformers' own eager code, in fp32. Returns the result and the choices.

    For a step in bf16 the weights are those of bf16, and `rounded` is the result in bf16 with the same choices.
    """
    model, pins = build_model(step, "fp32"), PinnedChoices()
    rounded = build_model(step) if step.dtype != "fp32" else None
    if rounded is not None:
        model.load_state_dict(rounded.state_dict())
    with watch_choices(model) as chosen, pins.record(model):
        result = _run_here(step, model)
    result |= {f"counts of {name}": count(index, experts) for name, (index, experts) in chosen.items()}
    found = {"result": result, "pins": pins, "chosen": {name: index for name, (index, _) in chosen.items()}}
    if rounded is not None:
        with pins.part(0, 1, 1).replay():
            found["rounded"] = _run_here(step, rounded)
    return found


def _run_here(step: VerifyStep, model: Any) -> Result:
    for module in model.modules():
        if is_experts(module):
            module.config._experts_implementation = "eager"
    ids = make_batch(step, model_vocabulary(model))
    loss = loss_of(model(input_ids=ids).logits, ids, step)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    result: Result = {"loss": loss.detach()}
    result |= {f"gradient of {name}": grad.clone() for name, grad in grads.items()}
    result["norm"] = torch.stack([grad.double().square().sum() for grad in grads.values()]).sum().sqrt()
    torch.optim.SGD(model.parameters(), LR).step()
    return result | {f"next {name}": value.detach() for name, value in model.state_dict().items() if name in grads}


def run_spread(step: VerifyStep, mesh: Mesh, alone: dict[str, Any]) -> list[Case]:
    """Run the step on the ranks of the mesh in every case. All ranks call it; rank 0's differences count."""
    cases = []
    for recompute, micro_steps in step.cases:
        result, guests, flips, tokens = _run_case(step, mesh, alone, recompute, micro_steps)
        about = {"recompute": recompute, "micro_steps": micro_steps, "planner": step.planner, "dtype": step.dtype}
        if step.dtype == "fp32":
            found = compare(result, alone["result"], step.limit)
        else:
            found = compare_rounded(result, alone["rounded"], alone["result"])
        cases.append(Case(about, guests, flips, tokens, found))
    return cases


def _run_case(
    step: VerifyStep, mesh: Mesh, alone: dict[str, Any], recompute: bool, micro_steps: int
) -> tuple[Result, int, int, int]:
    """Returns the whole result, the guests, and how many of how many tokens choose other experts when not pinned."""
    model = build_model(step)
    planner = "home" if step.planner == FORCED else step.planner
    replicas = mesh.expert_data if mesh.world > mesh.ep.size else None
    handle = hf.expert_parallel(model, mesh.ep, planner, replicas=replicas, reduction="sum")
    if step.planner == FORCED:
        for one in handle.experts:
            one.planner = scatter_rows
    if recompute:
        unwrap(model).activation_checkpointing_enable()
    if step.fault == "transposed-expert" and mesh.rank == 0:
        down = handle.experts[0].parameters()[1].data
        down[0] = down[0].t().reshape(down[0].shape).clone()
    ids = make_batch(step, model_vocabulary(model))
    each = step.sequences // mesh.world // micro_steps
    parts = [(mesh.rank * micro_steps + number) * each for number in range(micro_steps)]
    loss, flips, tokens = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
    for begin in parts:
        with torch.no_grad(), watch_choices(model) as chosen:
            model(input_ids=ids[begin : begin + each])
        for name, (index, _) in chosen.items():
            theirs = alone["chosen"][name].chunk(step.sequences // each)[begin // each]
            flips += (index.sort(-1).values != theirs.sort(-1).values).any(-1).sum()
            tokens += len(index)
    with handle.step(micro_steps):
        for begin in parts:
            with alone["pins"].part(begin, begin + each, step.sequences).replay():
                logits = model(input_ids=ids[begin : begin + each]).logits
            share = loss_of(logits, ids[begin : begin + each], step)
            if step.fault == "wrong-divisor":
                share = share * step.sequences / each
            share.backward()
            loss += share.detach()
    if step.fault != "dropped-reduction":
        handle.reduce_dense_gradients()
    result: Result = {"loss": all_reduce_sum(loss)}
    for layer in handle.statistics():
        counts = torch.from_numpy(layer.counts.copy())
        result[f"counts of {layer.name}"] = all_reduce_sum(counts, *handle.replica_groups)
    result |= {f"gradient of {name}": grad for name, grad in handle.full_gradients().items()}
    missing = handle.experts[0].parameters()[0] if step.fault == "expert-missing-in-norm" else None
    kept = None
    if missing is not None:
        missing.grad, kept = None, missing.grad
    result["norm"] = torch.tensor(handle.clip_grad_norm_(1e30), dtype=torch.float64)
    if missing is not None:
        missing.grad = kept
    torch.optim.SGD(model.parameters(), LR).step()
    result |= {f"next {name}": value for name, value in handle.full_state_dict().items()}
    guests = sum(len(layer.guests) for layer in handle.statistics())
    all_reduce_sum(flips)
    return result, guests, int(flips), tokens * mesh.world


def scatter_rows(counts: Ints, home: Ints, *rest: Any) -> Plan:
    """Cut every expert's rows at random places and have random ranks compute them: the same plan on every rank."""
    rng = np.random.default_rng(int((counts * np.arange(1, counts.size + 1).reshape(counts.shape)).sum()))
    chunks: list[tuple[int, int, int]] = []
    for expert, load in enumerate(counts.sum(0).tolist()):
        ranks = rng.permutation(counts.shape[0])[: rng.integers(1, counts.shape[0] + 1)].tolist()
        cuts = np.sort(rng.integers(0, load + 1, len(ranks) - 1))
        sizes = np.diff(np.concatenate([[0], cuts, [load]])).tolist()
        chunks += [(expert, rank, size) for rank, size in zip(ranks, sizes, strict=True)]
    return Plan.from_chunks(counts, home, chunks)


@contextmanager
def watch_choices(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """The experts that tokens are given, by experts module: [T, K], and how many experts there are."""
    found: dict[str, tuple[Tensor, int]] = {}
    hooks = []
    for name, module in model.named_modules():
        if is_experts(module):

            def look(module: Any, args: Any, kwargs: Any, name: str = name) -> None:
                index = args[1] if len(args) > 1 else kwargs["top_k_index"]
                found[name] = (index.detach(), module.num_experts)

            hooks.append(module.register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def count(index_TK: Tensor, num_experts: int) -> Tensor:
    """Return [E] selections of each expert."""
    return torch.bincount(index_TK.flatten(), minlength=num_experts)[:num_experts]


def model_vocabulary(model: Any) -> int:
    """The number of tokens that the model knows."""
    return len(unwrap(model).get_input_embeddings().weight)


def loss_of(logits: Tensor, ids: Tensor, step: VerifyStep) -> Tensor:
    """These sequences' share of the mean over the whole batch."""
    logits, targets = logits[:, :-1].float(), ids[:, 1:]
    nats = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum")
    return nats / (step.sequences * (LENGTH - 1))
