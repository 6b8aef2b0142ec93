"""The balance loss: the paper's values, and independence of how a batch is split."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import config
from moetrain.mesh import Mesh
from moetrain.moe import balance
from moetrain.moe.balance import Balance
from moetrain.moe.layer import LayerStats
from moetrain.moe.routers import Choice, Scores

OPTIONS = config.load([]).balance


def stats(probs_TE: torch.Tensor, expert_N: torch.Tensor) -> LayerStats:
    """One layer's statistics from probabilities and choices."""
    counts = torch.bincount(expert_N, minlength=probs_TE.shape[1])
    per_token = len(expert_N) // max(len(probs_TE), 1)
    choice = Choice(torch.arange(len(probs_TE)).repeat_interleave(per_token), expert_N)
    return LayerStats(Scores(probs_TE.log(), probs_TE), choice, counts, None, 0, None)  # type: ignore[arg-type]


def one_sided(mesh: Mesh, scope: str) -> float:
    """Two ranks, four experts, top-1: rank 0 uses {0, 1} half and half, rank 1 {2, 3}, and P = f."""
    half = torch.zeros(4)
    half[2 * mesh.rank : 2 * mesh.rank + 2] = 0.5
    here = stats(half.expand(8, 4), torch.arange(8) % 2 + 2 * mesh.rank)
    options = OPTIONS.model_copy(update={"scope": scope})
    return float(Balance(options, [], 16, 8).losses([here]).shares["balance"])


def test_micro_is_two_where_global_is_one(pool) -> None:
    assert sum(pool.run(one_sided, 2, "micro")) == pytest.approx(2.0)
    assert sum(pool.run(one_sided, 2, "global")) == pytest.approx(1.0)
    assert sum(pool.run(one_sided, 2, "data")) == pytest.approx(1.0)


def buffered(mesh: Mesh) -> list[float]:
    """Four micro-steps, each sending everything to another expert, with P = 1 there."""
    step, values = Balance(OPTIONS, [], 8, 8), []
    for micro in range(4):
        probs = torch.nn.functional.one_hot(torch.full((8,), micro), 4).float()
        values.append(float(step.losses([stats(probs, torch.full((8,), micro))]).shares["balance"]))
    return values


def test_the_buffer_sees_four_two_four_thirds_one(pool) -> None:
    assert pool.run(buffered, 1)[0] == pytest.approx([4, 2, 4 / 3, 1])


def shares(mesh: Mesh, sizes: list[int], probs: torch.Tensor, expert: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Loss share and gradient of one rank's part of a batch; two layers."""
    begin = sum(sizes[: mesh.rank])
    mine = slice(begin, begin + sizes[mesh.rank])
    p = probs[mine].clone().requires_grad_()
    layers = [stats(p, expert[mine].flatten()), stats(p.flip(1), expert[mine, :1].flatten())]
    step = Balance(OPTIONS.model_copy(update={"coefficient": 1.0, "z_coefficient": 0.0}), [], len(probs), 1)
    losses = step.losses(layers)
    assert [int(counts.sum()) for counts in step.counts] == [2 * len(probs), len(probs)]
    losses.weighted.backward()
    torch.testing.assert_close(losses.weighted.detach(), losses.shares["balance"])
    return float(losses.shares["balance"]), p.grad


def run_split(pool: Any, sizes: list[int]) -> tuple[float, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    probs = torch.rand(24, 6, generator=generator).softmax(1)
    expert = torch.randint(0, 6, (24, 2), generator=generator)
    parts = pool.run(shares, len(sizes), sizes, probs, expert)
    return sum(value for value, _ in parts), torch.cat([grad for _, grad in parts])


@pytest.mark.parametrize("sizes", [[12, 12], [20, 4], [6, 6, 6, 6], [24, 0, 0, 0]], ids=str)
def test_the_global_loss_does_not_depend_on_the_split(pool, sizes: list[int]) -> None:
    value, grad = run_split(pool, [24])
    ours, our_grad = run_split(pool, sizes)
    assert ours == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(our_grad, grad)


@given(st.integers(2, 6), st.integers(2, 8), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_micro_is_never_below_global(parts: int, experts: int, seed: int) -> None:
    """With P = f (Jensen), in equal parts."""
    random = np.random.default_rng(seed)
    counts = torch.from_numpy(
        np.stack([random.multinomial(60, random.dirichlet(np.ones(experts))) for _ in range(parts)])
    )
    f = balance.frequencies(counts.flatten(), [experts] * parts).view(parts, experts)
    whole = balance.frequencies(counts.sum(0), [experts])
    assert (f * f).sum(1).mean() >= (whole * f.mean(0)).sum() - 1e-6


def test_z_loss_is_the_mean_squared_logsumexp() -> None:
    logits = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    base = stats(logits.softmax(1), logits.argmax(1))
    here = dataclasses.replace(base, scores=Scores(logits, logits.softmax(1)))
    expected = logits.logsumexp(1).square().mean()
    torch.testing.assert_close(balance.z_loss([here, here], 10), 2 * expected)
