"""Rows that travel and are computed in chunks: outputs and gradients are those of one chunk."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import moetrain
from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import Mesh
from moetrain.moe.clock import Clock
from moetrain.moe.experts import Experts
from moetrain.moe.kernels import cpu_gemm
from moetrain.moe.kernels.api import KernelChoice, use_kernels
from moetrain.moe.planning import choose_chunks, default_costs, default_home
from moetrain.moe.planning.cost import CHUNKS as COUNTS
from moetrain.moe.planning.cost import Link
from moetrain.moe.planning.plan import stay_home
from tests.moe.test_moe import RAGGED, any_plan, case, layer_on_ranks

CHUNKS = (2, 4, 8)


def chunked(mesh: Mesh, tokens: list[int], arguments: dict[str, Any]) -> list[dict[str, Tensor]]:
    """One rank's outputs and gradients, in one chunk and in several."""
    return [layer_on_ranks(mesh, tokens, num_chunks=n, **arguments) for n in (1, *CHUNKS)]


def check(pool: Any, tokens: list[int], **arguments: Any) -> None:
    for one, *others in pool.run(chunked, len(tokens), tokens, arguments):
        for num_chunks, found in zip(CHUNKS, others, strict=True):
            for name, value in one.items():
                message = partial("{} chunks, {}: {}".format, num_chunks, name)
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-5, msg=message)


@given(
    tokens=st.sampled_from([1, 2, 4]).flatmap(lambda r: st.lists(st.integers(0, 20), min_size=r, max_size=r)),
    kind=st.sampled_from([1, 3, RAGGED]),
    plan_name=st.one_of(st.integers(0, 10_000), st.sampled_from(["home", "makespan"])),
    slots=st.integers(0, 3),
    max_rows=st.sampled_from([None, 7]),
    keep_hidden=st.booleans(),
    recompute=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_chunks_change_nothing(pool, tokens, **arguments) -> None:
    """Ranks without tokens, fewer tokens than chunks, experts without rows, guests that stay, every recompute."""
    check(pool, tokens, **arguments)


def wide_layer(mesh: Mesh, dtype: torch.dtype, left_to_torch: list[str], seed: int) -> list[list[Tensor]]:
    """Outputs and gradients of a layer that kernels of our own can compute, in one chunk and in several."""
    tokens, num_experts = [150, 40], 4
    routings = [case(rank, count, 2, num_experts)[1] for rank, count in enumerate(tokens)]
    counts = np.stack([np.bincount(routing.expert_N.numpy(), minlength=num_experts) for routing in routings])
    plan, routing = any_plan(counts, default_home(num_experts, 2), seed), routings[mesh.rank]
    torch.manual_seed(mesh.rank)
    x, upstream = (torch.randn(tokens[mesh.rank], 32).to(dtype) for _ in range(2))
    torch.manual_seed(7)
    experts = Experts(32, 64, num_experts).to(dtype)
    experts.shard(mesh.ep)
    use_kernels(experts, KernelChoice(left_to_torch=frozenset(left_to_torch)))
    found = []
    for num_chunks in (1, *CHUNKS):
        x, weight_N = x.detach().requires_grad_(), routing.weight_N.detach().requires_grad_()
        y = experts(x, routing._replace(weight_N=weight_N), plan, 2, Clock(mesh.device), None, num_chunks)
        grads = torch.autograd.grad(y, [x, weight_N, *experts.parameters()], upstream)
        experts.residents.reset()
        found.append([y.detach(), *grads])
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("left_to_torch", [[], ["products"]], ids=["own", "torch"])
def test_sums_keep_their_order(pool, dtype, left_to_torch) -> None:
    """Bit for bit, but for products of torch's, which may go by the number of rows."""
    for one, *others in pool.run(wide_layer, 2, dtype, left_to_torch, 3):
        for found in others:
            if cpu_gemm.able(dtype) and not left_to_torch:
                assert all(map(torch.equal, found, one))
            else:
                torch.testing.assert_close(found, one)


def whole_step(mesh: Mesh, router: str, options: dict[str, Any], recompute: Any) -> list[list[Tensor]]:
    """All gradients of a step of two micro-steps in somebody's own loop, in one chunk and in several."""
    found = []
    for chunks in (1, 4, "auto"):
        torch.manual_seed(0)
        module = moetrain.MoE(16, 24, 4, router=router, router_options=options)
        link = Link(1e-6, 1e6)  # slow: auto takes several
        costs = replace(default_costs(), inside=link, between=link, overlap=1.0, row_forward=5e-3, row_backward=1e-2)
        handle = moetrain.expert_parallel(module, mesh.ep, costs=costs, chunks=chunks, recompute=recompute)
        with handle.step(2):
            for seed in range(2):
                torch.manual_seed(10 * seed + mesh.rank)
                module(torch.randn(12 + 5 * mesh.rank, 16)).square().sum().backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    return found


@pytest.mark.parametrize(
    ("router", "options", "recompute"),
    [
        ("topk", {}, "full"),
        ("topk", {"capacity_factor": 1.0}, "selective"),
        ("top_p", {}, "none"),
        ("expert_choice", {}, "none"),
    ],
    ids=str,
)
def test_a_step_is_the_same_in_chunks(pool, router, options, recompute) -> None:
    for one, *others in pool.run(whole_step, 2, router, options, recompute):
        for found in others:
            torch.testing.assert_close(found, one, rtol=1e-6, atol=1e-5)


def test_chunks_are_chosen_by_costs() -> None:
    counts = np.full((2, 8), 256)
    plan = stay_home(counts, default_home(8, 2))
    fast = Link(1e-9, 1e15)
    costs = replace(default_costs(), inside=fast, between=fast)
    assert choose_chunks(plan, costs) == 1  # nothing to hide
    slow = replace(costs, inside=Link(1e-6, 1e9), overlap=0.9, segment_forward=0.0, segment_backward=0.0)
    assert choose_chunks(plan, slow) > 1
    assert choose_chunks(plan, replace(slow, overlap=0.0)) == 1  # a transfer that waits for nobody hides nowhere
    assert choose_chunks(plan, replace(slow, inside=Link(1.0, 1e9))) == 1  # each message costs more than it hides
    assert choose_chunks(plan, replace(slow, segment_forward=1.0)) == 1
    times = [moetrain.layer_time(plan, counts, plan.home, slow, chunks=n).total for n in COUNTS]
    assert times[0] == moetrain.layer_time(plan, counts, plan.home, slow).total
    assert min(times) >= 0.99 * times[COUNTS.index(choose_chunks(plan, slow))]


@pytest.mark.parametrize("chunks", [0, 3, True, "many"])
def test_chunks_that_are_none_are_refused(chunks) -> None:
    with pytest.raises(ConfigError, match=f"chunks={chunks}: must be one of 1, 2, 4, 8, auto"):
        moetrain.expert_parallel(moetrain.MoE(16, 24, 4), None, chunks=chunks)
