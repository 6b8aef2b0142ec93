"""The balance loss: the paper's values, and independence of how a batch is split."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import checkpoint, config
from moetrain.checkpoint import manifest
from moetrain.config.core_options import router_options
from moetrain.data.opening import open_data
from moetrain.distributed.mesh import Mesh
from moetrain.engine.native import NativeEngine
from moetrain.moe.layer import LayerStats
from moetrain.moe.options import BalanceOptions
from moetrain.moe.planning import PLANNERS, default_home
from moetrain.moe.routing import ROUTERS, Choice, Router, Scores, balance
from moetrain.moe.routing.balance import BalanceLoss
from moetrain.training.loop import train
from moetrain.training.step import build, micro_batches, optimizer_step

OPTIONS = BalanceOptions(z_coefficient=1e-3)


def stats(probs_TE: torch.Tensor, expert_N: torch.Tensor) -> LayerStats:
    """One layer's statistics from probabilities and choices."""
    counts = torch.bincount(expert_N, minlength=probs_TE.shape[1])
    per_token = len(expert_N) // max(len(probs_TE), 1)
    choice = Choice(torch.arange(len(probs_TE)).repeat_interleave(per_token), expert_N)
    return LayerStats(Scores(probs_TE.log(), probs_TE), choice, counts, counts, None, 0, None)  # type: ignore[arg-type]


def one_sided(mesh: Mesh, scope: str) -> float:
    """Two ranks, four experts, top-1: rank 0 uses {0, 1} half and half, rank 1 {2, 3}, and P = f."""
    half = torch.zeros(4)
    half[2 * mesh.rank : 2 * mesh.rank + 2] = 0.5
    here = stats(half.expand(8, 4), torch.arange(8) % 2 + 2 * mesh.rank)
    options = replace(OPTIONS, scope=scope)
    return float(BalanceLoss(options, [], 16, 8).losses([here]).shares["balance"])


def test_micro_is_two_where_global_is_one(pool) -> None:
    assert sum(pool.run(one_sided, 2, "micro")) == pytest.approx(2.0)
    assert sum(pool.run(one_sided, 2, "global")) == pytest.approx(1.0)
    assert sum(pool.run(one_sided, 2, "data")) == pytest.approx(1.0)


def buffered(mesh: Mesh) -> list[float]:
    """Four micro-steps, each sending everything to another expert, with P = 1 there."""
    step, values = BalanceLoss(OPTIONS, [], 8, 8), []
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
    step = BalanceLoss(replace(OPTIONS, coefficient=1.0, z_coefficient=0.0), [], len(probs), 1)
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
    torch.testing.assert_close(balance.z_sums([here, here]) / 10, expected.expand(2))


def own(**options: Any) -> BalanceOptions:
    """Balance options with all coefficients zero but those given."""
    return replace(OPTIONS, **{"coefficient": 0.0, "z_coefficient": 0.0, **options})


def alone(mesh: Mesh, options: BalanceOptions, layers: list[LayerStats], length: int, groups: int = 1) -> Any:
    """(weighted sum, shares) on one rank."""
    tokens = len(layers[0].scores.probs_TE)
    losses = BalanceLoss(options, [], tokens, length, groups).losses(layers)
    return losses.weighted.detach(), losses.shares


def planned(here: LayerStats, homes: int) -> LayerStats:
    """With a plan over `homes` experts, as a layer has it."""
    counts = here.counts_E[:homes].numpy()[None]
    return dataclasses.replace(here, plan=PLANNERS["home"](counts, default_home(homes, 1)))


def test_uniform_routing_has_the_papers_constants(pool) -> None:
    """DeepSeekMoE: L_Exp = α1 and L_Dev = α2, whatever P is."""
    probs = torch.rand(32, 8, generator=torch.Generator().manual_seed(0)).softmax(1)
    here = planned(stats(probs, torch.arange(64) % 8), 8)
    options = own(coefficient=0.003, device_coefficient=0.05, sequence_coefficient=0.0001)
    for groups in (1, 2, 3, 4, 8):  # three of the eight: groups of three, three and two
        weighted, shares = pool.run(alone, 1, options, [here, here], 8, groups)[0]
        for name in ("balance", "device", "sequence"):
            assert float(shares[name]) == pytest.approx(2.0)
        assert float(weighted) == pytest.approx(2 * (0.003 + 0.05 + 0.0001))


def test_the_device_loss_looks_at_groups_only(pool) -> None:
    """Moving load inside a group changes the expert loss alone; the last two experts here have no home."""
    generator = torch.Generator().manual_seed(1)
    probs = torch.rand(16, 6, generator=generator).softmax(1)
    expert = torch.randint(0, 6, (32,), generator=generator)
    moved = torch.where(expert == 1, 0, expert)
    options = own(coefficient=1.0, device_coefficient=1.0, device_groups=2)
    found = [pool.run(alone, 1, options, [planned(stats(probs, e), 4)], 16)[0][1] for e in (expert, moved)]
    assert found[0]["device"] == found[1]["device"]
    assert abs(found[0]["balance"] - found[1]["balance"]) > 1e-3
    counts = torch.bincount(expert, minlength=6)[:4].double()
    by_hand = (2 * counts.view(2, 2).sum(1) / counts.sum() * probs.mean(0)[:4].view(2, 2).sum(1)).sum()
    assert float(found[0]["device"]) == pytest.approx(float(by_hand))


def test_the_sequence_loss_is_the_mean_of_the_sequences(pool) -> None:
    """Against a loop; a selection that is not made does not count."""
    generator = torch.Generator().manual_seed(2)
    probs, expert = torch.rand(12, 5, generator=generator).softmax(1), torch.randint(0, 5, (24,), generator=generator)
    here = stats(probs, expert)
    made = torch.rand(24, generator=generator) < 0.7
    here = dataclasses.replace(here, choice=here.choice._replace(chosen_N=made))
    by_hand = 0.0
    for b in range(3):
        f = torch.bincount(expert[8 * b : 8 * b + 8][made[8 * b : 8 * b + 8]], minlength=5)
        by_hand += float(5 * (f / f.sum() * probs[4 * b : 4 * b + 4].mean(0)).sum()) / 3
    shares = pool.run(alone, 1, own(sequence_coefficient=1.0), [here], 4)[0][1]
    assert float(shares["sequence"]) == pytest.approx(by_hand, rel=1e-5)


def mixed(mesh: Mesh) -> tuple[float, float, float]:
    """Rank 0 uses the first two of four experts, rank 1 the others; the paper's one per cent of micro in addition."""
    half = torch.zeros(4)
    half[2 * mesh.rank : 2 * mesh.rank + 2] = 0.5
    here = stats(half.expand(8, 4), torch.arange(8) % 2 + 2 * mesh.rank)
    losses = BalanceLoss(own(coefficient=0.1, micro_fraction=0.01), [], 16, 8).losses([here])
    return float(losses.shares["balance"]), float(losses.shares["micro_balance"]), float(losses.weighted)


def test_a_fraction_of_micro_comes_on_top(pool) -> None:
    balance_, micro, weighted = (sum(values) for values in zip(*pool.run(mixed, 2), strict=True))
    assert (balance_, micro, weighted) == pytest.approx((1.0, 2.0, 0.1 * (1.0 + 0.01 * 2.0)))


def test_entropy_and_its_gradient(pool) -> None:
    """ln N for uniform probabilities, 0 for certain ones, where the gradient is finite too."""
    for logits, value in ((torch.zeros(4, 16), math.log(16)), (torch.eye(16)[:4] * 1e4, 0.0)):
        logits.requires_grad_()
        entropy = balance.entropy(logits.softmax(1)) / 4
        assert float(entropy.detach()) == pytest.approx(value, abs=1e-6)
        entropy.backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
    probs = torch.rand(10, 4, generator=torch.Generator().manual_seed(0)).softmax(1)
    weighted, shares = pool.run(alone, 1, own(entropy_coefficient=0.5), [stats(probs, probs.argmax(1))], 10)[0]
    assert float(shares["entropy"]) == pytest.approx(float(torch.distributions.Categorical(probs).entropy().mean()))
    assert float(weighted) == pytest.approx(float(shares["entropy"]) / 2)


def weighed(mesh: Mesh) -> float:
    """MoE++: the terms of zero-compute experts count τ."""
    router = router_of("model=tiny", "model.num_experts=4")
    router.loss_weights = (1.0, 1.0, 0.75, 0.75)
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(4, 4)
    return float(BalanceLoss(OPTIONS, [router], 4, 4).losses([stats(probs, torch.arange(4))]).shares["balance"])


def test_experts_may_weigh_less(pool) -> None:
    assert pool.run(weighed, 1)[0] == pytest.approx(0.3 + 0.75 * 0.7)


def held(mesh: Mesh) -> list[float]:
    """Two steps of two micro-steps: each micro-step sends everything to another of four experts, with P = 1 there."""
    router = router_of("model=tiny", "model.num_experts=4")
    options = replace(OPTIONS, accumulate="hold")
    balance.add_buffers([router], options)
    values = []
    for experts in ((0, 1), (1, 2)):
        step = BalanceLoss(options, [router], 8, 8)
        for expert in experts:
            probs = torch.nn.functional.one_hot(torch.full((8,), expert), 4).float()
            values.append(float(step.losses([stats(probs, torch.full((8,), expert))]).shares["balance"]))
        step.finish()
    assert router.held is not None
    assert router.held.tolist() == [0, 0.5, 0.5, 0]
    return values


def test_hold_is_the_buffer_first_and_then_the_last_step(pool) -> None:
    assert pool.run(held, 1)[0] == pytest.approx([4, 2, 2, 0])


def router_of(*overrides: str) -> Router:
    settings = config.load(list(overrides))
    return ROUTERS[settings.router.name](
        settings.model.dim, settings.model.num_experts, router_options(settings.router)
    )


@pytest.mark.parametrize(("rule", "rate"), [("sign", 1e-3), ("proportional", 2.56e-3)])
def test_the_bias_balances_without_a_loss(rule: str, rate: float) -> None:
    """Sigmoid scores with offsets: MaxVio falls from above 1 to the sampling floor of 256 tokens an expert."""
    router, generator = router_of("model=tiny", "model.num_experts=16", "router.scores=sigmoid"), torch.Generator()
    balance.add_buffers([router], own(bias=rule))
    assert router.bias is not None
    generator.manual_seed(0)
    offset, violation = torch.randn(16, generator=generator) * 0.5, []
    for _ in range(600):
        logits = torch.randn(2048, 16, generator=generator) + offset
        counts = torch.bincount(router.choose(Scores(logits, logits.softmax(1))).expert_N, minlength=16)
        violation.append(float(counts.max() / counts.float().mean() - 1))
        change = balance.bias_step(counts, rule)
        assert rule == "sign" or abs(float(change.sum())) < 1e-4
        router.bias += rate * change
    assert violation[0] > 1.0
    assert np.mean(violation[-50:]) < 0.2


def test_the_bias_chooses_and_does_not_weigh() -> None:
    for scores in ("softmax", "sigmoid"):
        router = router_of("model=tiny", f"router.scores={scores}", "router.normalise=false")
        logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
        found = Scores(logits, logits.softmax(1))
        before = router.choose(found)
        router.bias = torch.zeros(8)
        assert torch.equal(router.choose(found).expert_N.view(-1, 2).sort(1)[0], before.expert_N.view(-1, 2).sort(1)[0])
        router.bias = torch.tensor([2.0] + [0.0] * 7)
        after = router.choose(found)
        assert (after.expert_N.view(-1, 2) == 0).any(1).all()
        torch.testing.assert_close(router.weigh(found, after).weight_N, router.gates(found)[tuple(after[:2])])


def stepped(mesh: Mesh, overrides: list[str]) -> list[Any]:
    """Two optimizer steps of two micro-steps: what the bias became, and what follows from the counts."""
    settings = config.load(overrides)
    corpus, loader = open_data(settings)
    settings = config.resolve(settings, mesh.world, corpus.vocab_size, "fp32")
    engine = NativeEngine(build(settings), mesh, settings)
    expected = torch.zeros(len(engine.model.routers), settings.model.num_experts)
    for position in (0, 8):
        shares = list(micro_batches(settings, mesh, loader, position))
        counts_LE = torch.stack(optimizer_step(engine, settings, shares, lr=1e-3).counts)
        expected += 0.01 * (counts_LE.float().mean(1, keepdim=True) - counts_LE).sign()
    return [torch.stack([r.bias for r in engine.model.routers if r.bias is not None]), expected]


def test_the_bias_moves_once_a_step_with_the_counts_of_all(pool, tiny) -> None:
    more = ["balance.bias=sign", "balance.bias_rate=0.01", "train.micro_batch=2"]
    first, second = pool.run(stepped, 2, [*tiny, *more])
    torch.testing.assert_close(first[0], first[1])
    assert torch.equal(first[0], second[0])


def run(mesh: Mesh, overrides: list[str]) -> str:
    return str(train(config.load(overrides), mesh))


def test_bias_and_held_frequencies_resume_bit_exactly(pool, tiny) -> None:
    more = [*tiny, "balance.bias=proportional", "balance.bias_rate=0.05", "balance.accumulate=hold", "train.steps=8"]
    more += ["train.micro_batch=2", "checkpoint.every=4"]
    whole = Path(pool.run(run, 2, [*more, "run.name=whole"])[0])
    saved = f"checkpoint.resume={whole}/checkpoints/step_4"
    part = Path(pool.run(run, 2, [*more, "run.name=part", saved])[0])
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, part)]
    wanted = ("train/loss", "train/balance_loss", "balance/layer_01/bias_max", "train/grad_norm")
    assert [[row[name] for name in wanted] for row in rows[0] if "train/loss" in row and row["step"] > 4] == [
        [row[name] for name in wanted] for row in rows[1] if "train/loss" in row
    ]
    saved_at = whole / "checkpoints" / "step_4"
    checkpoint.check_fits(config.load([*more, "balance.accumulate=buffer"]), saved_at, same_run=False)
    unbiased = [text for text in more if not text.startswith("balance.bias")]
    with pytest.raises(config.ConfigError, match=r"balance\.bias=none: the checkpoint .* was trained with one"):
        checkpoint.check_fits(config.load(unbiased), saved_at, same_run=False)


def test_a_checkpoint_without_them_is_refused(tmp_path: Path) -> None:
    plain = config.load(["model=tiny"])
    body = {"step": 1, "samples": 1, "layout": {"engine": "native", "ranks": 1}, "files": {}}
    manifest.write(tmp_path, {**body, "config": plain.model_dump(mode="json")})
    checkpoint.check_fits(plain, tmp_path, same_run=False)
    for option, says in (("bias=sign", "has none"), ("accumulate=hold", "holds no frequencies; take buffer or exact")):
        with pytest.raises(config.ConfigError, match=f"balance.{option}: the checkpoint {tmp_path} {says}"):
            checkpoint.check_fits(config.load(["model=tiny", f"balance.{option}"]), tmp_path, same_run=False)
