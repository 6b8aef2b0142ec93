"""The ladder of equivalences of the MoE layer: loop = one rank = R ranks under any plan, forward and backward."""

from functools import partial
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.mesh import Mesh
from moetrain.moe import dispatch, guests
from moetrain.moe.clock import Clock
from moetrain.moe.experts import Experts
from moetrain.moe.plan import Plan
from moetrain.moe.planners import PLANNERS, default_home
from moetrain.moe.router import Choice, Routing

D, H, E = 16, 24, 8
RAGGED = "ragged"


def weights(num_experts: int = E) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    return draw(num_experts, 2 * H, D) * 0.3, draw(num_experts, D, H) * 0.3


def case(rank: int, tokens: int, kind: str | int) -> tuple[Tensor, Routing, Tensor]:
    """x, routing and upstream gradient of one rank. `kind`: top-k, or any number of selections a token."""
    generator = torch.Generator().manual_seed(100 + rank)
    draw = partial(torch.randn, generator=generator)
    if kind == RAGGED:  # 0 to 3 selections a token, duplicates allowed, experts 5 and up never chosen
        per_token = torch.randint(0, 4, (tokens,), generator=generator)
        token = torch.arange(tokens).repeat_interleave(per_token)
        expert = torch.randint(0, 5, (len(token),), generator=generator)
    else:
        token = torch.arange(tokens).repeat_interleave(int(kind))
        skew = draw(tokens, E) + torch.tensor([3.0, 2.0] + [0.0] * (E - 2))
        expert = skew.topk(int(kind)).indices.flatten()
    weight = torch.rand(len(token), generator=generator).requires_grad_()
    x = draw(tokens, D).requires_grad_()
    return x, Routing(token, expert, weight, torch.full((tokens, E), 1 / E)), draw(tokens, D)


def any_plan(counts: np.ndarray, home: np.ndarray, seed: int) -> Plan:
    """Rows anywhere: every expert cut at random places and handed to random ranks."""
    rng = np.random.default_rng(seed)
    chunks: list[tuple[int, int, int]] = []
    for expert, load in enumerate(counts.sum(0).tolist()):
        ranks = rng.permutation(counts.shape[0])[: rng.integers(1, counts.shape[0] + 1)].tolist()
        cuts = np.sort(rng.integers(0, load + 1, len(ranks) - 1))
        sizes = np.diff(np.concatenate([[0], cuts, [load]])).tolist()
        chunks += [(expert, rank, size) for rank, size in zip(ranks, sizes, strict=True)]
    return Plan.of(counts, home, chunks)


def make_plan(counts: np.ndarray, name: str | int) -> Plan:
    home = default_home(E, counts.shape[0])
    if isinstance(name, int):
        return any_plan(counts, home, name)
    return PLANNERS[name](counts, home, None, **({"min_rows": 1, "threshold": 1.0} if name == "llep" else {}))


def counts_of(tokens: list[int], kind: str | int) -> np.ndarray:
    return np.stack([np.bincount(case(r, t, kind)[1].expert_N.numpy(), minlength=E) for r, t in enumerate(tokens)])


def layer_on_ranks(mesh: Mesh, tokens: list[int], kind: Any, plan_name: Any, recompute: bool) -> dict[str, Tensor]:
    """One rank's outputs and gradients."""
    x, routing, upstream = case(mesh.rank, tokens[mesh.rank], kind)
    experts = Experts(D, H, E)
    gate_up, down = weights()
    with torch.no_grad():
        experts.gate_up.copy_(gate_up)
        experts.down.copy_(down)
    experts.shard(mesh.ep)
    plan = make_plan(counts_of(tokens, kind), plan_name)
    most = max(1, int(torch.bincount(routing.token_N, minlength=1).max()))

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return experts(x, routing._replace(weight_N=weight), plan, most, Clock(mesh.device))

    if recompute:
        from torch.utils.checkpoint import checkpoint

        y = checkpoint(run, x, routing.weight_N, use_reentrant=False)
    else:
        y = run(x, routing.weight_N)
    y.backward(upstream)
    found = {"y": y.detach(), "x": x.grad, "weight": routing.weight_N.grad}
    return {**found, "gate_up": experts.gate_up.grad, "down": experts.down.grad}


def expected(tokens: list[int], kind: Any) -> list[dict[str, Tensor]]:
    """The loop on one device in fp64, split into what each rank should have."""
    gate_up, down = (w.double().requires_grad_() for w in weights())
    found = []
    for rank, count in enumerate(tokens):
        x, routing, upstream = case(rank, count, kind)
        x64 = x.detach().double().requires_grad_()
        weight64 = routing.weight_N.detach().double().requires_grad_()
        y = oracle.moe(x64, routing._replace(weight_N=weight64), gate_up, down)
        if y.requires_grad:  # not where no token chose any expert
            y.backward(upstream.double())
        none = torch.zeros_like
        found.append({"y": y.detach(), "x": none(x64) if x64.grad is None else x64.grad})
        found[-1]["weight"] = none(weight64) if weight64.grad is None else weight64.grad
    home = default_home(E, len(tokens))
    for rank, part in enumerate(found):
        for name, weight in (("gate_up", gate_up), ("down", down)):
            part[name] = (none(weight) if weight.grad is None else weight.grad)[home == rank]
    return found


def check(pool: Any, tokens: list[int], kind: Any, plan_name: Any, recompute: bool = False) -> None:
    got = pool.run(layer_on_ranks, len(tokens), tokens, kind, plan_name, recompute)
    for rank, (ours, theirs) in enumerate(zip(got, expected(tokens, kind), strict=True)):
        for name, value in theirs.items():
            torch.testing.assert_close(
                ours[name].double(), value, rtol=2e-5, atol=2e-5, msg=lambda m, r=rank, n=name: f"{r} {n}: {m}"
            )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("plan_name", ["home", "llep", 0])
@pytest.mark.parametrize(
    ("tokens", "kind"),
    [([40], 2), ([40, 40], 2), ([40, 0], 1), ([30, 0, 7, 12], 2), ([0, 0], 2), ([25, 0, 18, 1], RAGGED)],
    ids=str,
)
def test_any_plan_on_any_ranks_equals_the_loop(pool, tokens, kind, plan_name, recompute) -> None:
    check(pool, tokens, kind, plan_name, recompute)


@given(
    tokens=st.sampled_from([1, 2, 4]).flatmap(lambda r: st.lists(st.integers(0, 20), min_size=r, max_size=r)),
    kind=st.sampled_from([1, 3, RAGGED]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=25, deadline=None)
def test_random_plans_equal_the_loop(pool, tokens: list[int], kind: Any, seed: int) -> None:
    check(pool, tokens, kind, seed)


def whole_layer(mesh: Mesh, router_options: list[str]) -> None:
    """The contract `router(x, carry) -> (Routing, carry)`, and the layer as one call, against the loop."""
    from moetrain import config
    from moetrain.moe.layer import MoE

    settings = config.load(["model=tiny", "planner.min_rows=1", *router_options])
    layer = MoE(settings.model, settings.router, settings.planner, None)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    gate_up, down = layer.experts.gate_up.detach(), layer.experts.down.detach()
    layer.experts.shard(mesh.ep)
    x = torch.randn(20, settings.model.dim, generator=torch.Generator().manual_seed(mesh.rank))
    routing, carry = layer.router(x)
    assert carry is None
    assert (routing.token_N.diff() >= 0).all()
    torch.testing.assert_close(routing.probs_TE.sum(1), torch.ones(20))
    y, stats, _ = layer(x)
    torch.testing.assert_close(y, oracle.moe(x, routing, gate_up, down))
    assert torch.equal(stats.counts_E, torch.bincount(routing.expert_N, minlength=E))
    torch.testing.assert_close(stats.prob_sum_E, routing.probs_TE.sum(0))


@pytest.mark.parametrize(
    "options", [[], ["router.scores=sigmoid"], ["router.normalise=false", "router.skew=2"]], ids=str
)
def test_the_whole_layer_equals_the_loop(pool, options: list[str]) -> None:
    pool.run(whole_layer, 2, options)


def repeat(mesh: Mesh) -> list[bool]:
    first, second = (layer_on_ranks(mesh, [30, 20], 2, "llep", False) for _ in range(2))
    return [torch.equal(first[name], second[name]) for name in first]


def test_two_runs_agree_bit_for_bit(pool) -> None:
    assert all(all(equal) for equal in pool.run(repeat, 2))


def test_the_llep_case_really_lends() -> None:
    assert make_plan(counts_of([40, 40], 2), "llep").guests()


def test_gradients_of_the_index_functions_in_fp64() -> None:
    """gradcheck of gather, weighted sum and permutation, over a ragged routing."""
    _, routing, _ = case(0, 9, RAGGED)
    counts = np.bincount(routing.expert_N.numpy(), minlength=E)[None]
    most = int(torch.bincount(routing.token_N).max())
    route = dispatch.Route.of(Choice(*routing[:2]), make_plan(counts, "home"), 0, 9, most)
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(routing.token_N), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(len(routing.token_N), dtype=torch.float64, requires_grad=True)
    # The sums run in fp32 by contract, so the check is against fp32 noise, at a step that stands above it.
    near = {"eps": 1e-2, "atol": 1e-4, "rtol": 1e-3}
    assert torch.autograd.gradcheck(lambda x: dispatch._Gather.apply(x, route.token_N, route.row_TK), x, **near)
    summed = lambda r, w: dispatch._WeightedSum.apply(r, w, route.token_N, route.row_TK)  # noqa: E731
    assert torch.autograd.gradcheck(summed, (rows, weight), **near)
    permute = lambda r: dispatch._Permute.apply(r, route.to_slots_M, route.from_slots_M)  # noqa: E731
    assert torch.autograd.gradcheck(permute, rows)


def test_a_loan_lists_what_leaves_and_what_comes() -> None:
    plan = Plan.of(
        np.full((3, 3), 4),
        default_home(3, 3),
        [(0, 0, 4), (0, 2, 4), (0, 1, 4), (1, 1, 12), (2, 2, 8), (2, 0, 4)],
    )
    assert plan.guests() == [(0, 0, 1), (0, 0, 2), (2, 2, 0)]
    loan = guests.Loan.of(plan, 0)
    assert (loan.lent_L, loan.send, loan.receive) == ([0, 0], [0, 1, 1], [0, 0, 1])
    assert plan.slots(0) == [0, 2]
