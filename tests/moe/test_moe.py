"""The ladder of equivalences of the MoE layer: loop = one rank = R ranks under any plan, forward and backward."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.distributed import comm
from moetrain.distributed.mesh import Mesh
from moetrain.moe.clock import Clock
from moetrain.moe.exchange import dispatch, guests
from moetrain.moe.experts import Experts
from moetrain.moe.kernels import api as kernels
from moetrain.moe.kernels import cpu_fused, cpu_gemm, reference
from moetrain.moe.kernels.api import KernelChoice
from moetrain.moe.kernels.bags import Bags
from moetrain.moe.planning import PLANNERS, default_home
from moetrain.moe.planning.plan import Plan
from moetrain.moe.routing.base import Routing
from tests import oracle
from tests.grid import sample

D, H, E = 16, 24, 8
RAGGED = "ragged"


def weights(num_experts: int = E) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator)
    return draw(num_experts, 2 * H, D) * 0.3, draw(num_experts, D, H) * 0.3


def case(rank: int, tokens: int, kind: str | int, num_experts: int = E) -> tuple[Tensor, Routing, Tensor]:
    """x, routing and upstream gradient of one rank. `kind`: top-k, or any number of selections a token."""
    generator = torch.Generator().manual_seed(100 + rank)
    draw = partial(torch.randn, generator=generator)
    if kind == RAGGED:  # 0 to 3 selections a token, duplicates allowed, experts 5 and up never chosen
        per_token = torch.randint(0, 4, (tokens,), generator=generator)
        token = torch.arange(tokens).repeat_interleave(per_token)
        expert = torch.randint(0, min(5, num_experts), (len(token),), generator=generator)
    else:
        token = torch.arange(tokens).repeat_interleave(int(kind))
        skew = draw(tokens, num_experts) + torch.tensor([3.0, 2.0] + [0.0] * (num_experts - 2))
        expert = skew.topk(int(kind)).indices.flatten()
    weight = torch.rand(len(token), generator=generator).requires_grad_()
    x = draw(tokens, D).requires_grad_()
    return x, Routing(token, expert, weight, torch.full((tokens, num_experts), 1 / num_experts)), draw(tokens, D)


def any_plan(counts: np.ndarray, home: np.ndarray, seed: int) -> Plan:
    """Rows anywhere: every expert cut at random places and handed to random ranks."""
    rng = np.random.default_rng(seed)
    chunks: list[tuple[int, int, int]] = []
    for expert, load in enumerate(counts.sum(0).tolist()):
        ranks = rng.permutation(counts.shape[0])[: rng.integers(1, counts.shape[0] + 1)].tolist()
        cuts = np.sort(rng.integers(0, load + 1, len(ranks) - 1))
        sizes = np.diff(np.concatenate([[0], cuts, [load]])).tolist()
        chunks += [(expert, rank, size) for rank, size in zip(ranks, sizes, strict=True)]
    return Plan.from_chunks(counts, home, chunks)


def make_plan(counts: np.ndarray, name: str | int) -> Plan:
    home = default_home(counts.shape[1], counts.shape[0])
    if isinstance(name, int):
        return any_plan(counts, home, name)
    return PLANNERS[name](counts, home, None, **({"min_rows": 1, "threshold": 1.0} if name == "llep" else {}))


def counts_of(tokens: list[int], kind: str | int, num_experts: int = E) -> np.ndarray:
    chosen = [case(r, t, kind, num_experts)[1].expert_N.numpy() for r, t in enumerate(tokens)]
    return np.stack([np.bincount(expert_N, minlength=num_experts) for expert_N in chosen])


def build(mesh: Mesh, slots: int = 0, max_rows: int | None = None, num_experts: int = E) -> Experts:
    experts = Experts(D, H, num_experts)
    with torch.no_grad():
        for parameter, value in zip((experts.gate_up, experts.down), weights(num_experts), strict=True):
            parameter.copy_(value)
    experts.shard(mesh.ep, slots, max_rows)
    return experts


def layer_on_ranks(
    mesh: Mesh,
    tokens: list[int],
    kind: Any,
    plan_name: Any,
    recompute: bool = False,
    slots: int = 0,
    max_rows: int | None = None,
    keep_hidden: bool = True,
    num_experts: int = E,
    num_chunks: int = 1,
) -> dict[str, Tensor]:
    """One rank's outputs and gradients."""
    x, routing, upstream = case(mesh.rank, tokens[mesh.rank], kind, num_experts)
    experts = build(mesh, slots, max_rows, num_experts)
    experts.keep_hidden = keep_hidden
    plan = make_plan(counts_of(tokens, kind, num_experts), plan_name)
    most = max(int(torch.bincount(case(r, t, kind)[1].token_N, minlength=1).max()) for r, t in enumerate(tokens))

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return experts(x, routing._replace(weight_N=weight), plan, most, Clock(mesh.device), None, num_chunks)

    if recompute:
        from torch.utils.checkpoint import checkpoint

        y = checkpoint(run, x, routing.weight_N, use_reentrant=False)
    else:
        y = run(x, routing.weight_N)
    y.backward(upstream)
    found = {"y": y.detach(), "x": x.grad, "weight": routing.weight_N.grad}
    return {**found, "gate_up": experts.gate_up.grad, "down": experts.down.grad}


def expected(tokens: list[int], kind: Any, num_experts: int = E) -> list[dict[str, Tensor]]:
    """The loop on one device in fp64, split into what each rank should have."""
    gate_up, down = (w.double().requires_grad_() for w in weights(num_experts))
    found = []
    for rank, count in enumerate(tokens):
        x, routing, upstream = case(rank, count, kind, num_experts)
        x64 = x.detach().double().requires_grad_()
        weight64 = routing.weight_N.detach().double().requires_grad_()
        y = oracle.moe(x64, routing._replace(weight_N=weight64), gate_up, down)
        if y.requires_grad:  # not where no token chose any expert
            y.backward(upstream.double())
        none = torch.zeros_like
        found.append({"y": y.detach(), "x": none(x64) if x64.grad is None else x64.grad})
        found[-1]["weight"] = none(weight64) if weight64.grad is None else weight64.grad
    home = default_home(num_experts, len(tokens))
    for rank, part in enumerate(found):
        for name, weight in (("gate_up", gate_up), ("down", down)):
            part[name] = (none(weight) if weight.grad is None else weight.grad)[home == rank]
    return found


def check(pool: Any, tokens: list[int], kind: Any, *settings: Any, num_experts: int = E) -> None:
    got = pool.run(partial(layer_on_ranks, num_experts=num_experts), len(tokens), tokens, kind, *settings)
    for rank, (ours, theirs) in enumerate(zip(got, expected(tokens, kind, num_experts), strict=True)):
        for name, value in theirs.items():
            torch.testing.assert_close(
                ours[name].double(), value, rtol=2e-5, atol=2e-5, msg=lambda m, r=rank, n=name: f"{r} {n}: {m}"
            )


TOKENS = [([40], 2), ([40, 40], 2), ([40, 0], 1), ([30, 0, 7, 12], 2), ([0, 0], 2), ([25, 0, 18, 1], RAGGED)]


@pytest.mark.parametrize(
    ("of_ranks", "plan_name", "recompute"),
    sample(itertools.product(TOKENS, ["home", "llep", 0], [False, True]), every=5),
    ids=str,
)
def test_any_plan_on_any_ranks_equals_the_loop(pool, of_ranks, plan_name, recompute) -> None:
    tokens, kind = of_ranks
    check(pool, tokens, kind, plan_name, recompute)


@pytest.mark.parametrize(
    ("experts", "plan_name"),
    sample(itertools.product([(3, 2), (4, 3), (5, 4), (9, 4)], ["home", "llep", "makespan", "static", 0, 1]), every=3),
    ids=str,
)
def test_homes_may_be_uneven_or_empty(pool, experts, plan_name) -> None:
    """The last rank has fewer experts, or none: it still takes guests."""
    num_experts, ranks = experts
    check(pool, [30, 0, 7, 12][:ranks], 2, plan_name, False, 1, num_experts=num_experts)


@given(
    tokens=st.sampled_from([1, 2, 4]).flatmap(lambda r: st.lists(st.integers(0, 20), min_size=r, max_size=r)),
    kind=st.sampled_from([1, 3, RAGGED]),
    seed=st.one_of(st.integers(0, 10_000), st.just("makespan")),
    slots=st.integers(0, 3),
    max_rows=st.sampled_from([None, 1, 7]),
    keep_hidden=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_random_plans_equal_the_loop(pool, tokens, kind, seed, slots, max_rows, keep_hidden) -> None:
    check(pool, tokens, kind, seed, False, slots, max_rows, keep_hidden)


def micro_steps(mesh: Mesh, plans: list[Any], slots: int) -> list[Any]:
    """One layer through several micro-steps of an optimizer step; how many copies were lent in each."""
    tokens = [18, 5, 0, 9][: mesh.world]
    experts = build(mesh, slots)
    lent = []
    for step, name in enumerate(plans):
        x, routing, upstream = case(mesh.rank, tokens[mesh.rank], 2)
        plan = make_plan(counts_of(tokens, 2), name)
        experts.residents.admit(plan)
        lent.append(len(experts.residents.list_missing(plan)))
        y = experts(x, routing, plan, 2, Clock(mesh.device))
        experts.step.begin_backward(is_last_micro_batch=step == len(plans) - 1)
        y.backward(upstream)
    assert not experts.residents.weights
    assert not experts.residents.grads
    return [experts.gate_up.grad, experts.down.grad, lent]


@pytest.mark.parametrize("slots", [0, 1, 8])
def test_guests_that_stay_between_micro_steps(pool, slots: int) -> None:
    plans = [1, "home", 2, 1, "home"]  # the last plan lends nothing: gradients still come home
    got = pool.run(micro_steps, 4, plans, slots)
    for ours, theirs in zip(got, expected([18, 5, 0, 9], 2), strict=True):
        for grad, name in zip(ours, ("gate_up", "down"), strict=False):
            torch.testing.assert_close(grad.double(), theirs[name] * len(plans), rtol=2e-5, atol=5e-5)
    lent = got[0][2]
    guests_of = [len(make_plan(counts_of([18, 5, 0, 9], 2), name).guests()) for name in plans]
    assert all(rank[2] == lent for rank in got)
    assert lent == guests_of if slots == 0 else lent[3] < guests_of[3]
    if slots == 8:
        assert lent[3] == 0  # all of them were there already


def with_shared(mesh: Mesh) -> None:
    """What runs while rows are under way is added, and differentiated."""
    x, routing, upstream = case(mesh.rank, 12, 2)
    experts, shared = build(mesh), torch.nn.Linear(D, D, bias=False)
    plan, clock = make_plan(counts_of([12, 12], 2), "home"), Clock(mesh.device)
    apart = experts(x, routing, plan, 2, clock) + shared(x)
    grads = torch.autograd.grad(apart, [x, shared.weight], upstream)
    together = experts(x, routing, plan, 2, clock, shared)
    torch.testing.assert_close(together, apart)
    torch.testing.assert_close(torch.autograd.grad(together, [x, shared.weight], upstream), grads)


def test_shared_experts_run_in_between(pool) -> None:
    pool.run(with_shared, 2)


def test_a_second_backward_is_refused(pool) -> None:
    pool.run(backward_twice, 1)


def backward_twice(mesh: Mesh) -> None:
    x, routing, upstream = case(0, 6, 2)
    y = build(mesh)(x, routing, make_plan(counts_of([6], 2), "home"), 2, Clock(mesh.device))
    y.backward(upstream, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(upstream)


def once_per_rank(mesh: Mesh) -> tuple[int, int]:
    """Both experts of every token live on the other rank: one copy of it travels."""
    token, other = torch.arange(10).repeat_interleave(2), 1 - mesh.rank
    expert = torch.tensor([0, 1] * 10) + other * (E // 2)
    routing = Routing(token, expert, torch.ones(20), torch.empty(0))
    counts = np.zeros((2, E), np.int64)
    counts[0, E // 2 : E // 2 + 2] = counts[1, :2] = 10
    plan = PLANNERS["home"](counts, default_home(E, 2))
    backend = KernelChoice().choose(mesh.device, torch.float32)
    tables = dispatch.DispatchTables.build(routing, plan, mesh.ep, backend, 10, 2)
    assert len(tables.pool_M) == 20
    return sum(tables.copies_out), sum(tables.copies_in)


def test_a_token_goes_to_a_rank_once(pool) -> None:
    assert pool.run(once_per_rank, 2) == [(10, 10), (10, 10)]


def whole_layer(mesh: Mesh, overrides: list[str]) -> None:
    """The contract `router(x, carry) -> (Routing, carry)`, and the layer as one call, against the loop."""
    from moetrain import config
    from moetrain.models.transformer import build_moe

    settings = config.load(["model=tiny", "planner=llep", "planner.min_rows=1", *overrides])
    layer = build_moe(settings.model, settings.router, settings.planner)
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
    y, stats, _ = layer.forward_with_stats(x)
    torch.testing.assert_close(y, oracle.moe(x, routing, gate_up, down))
    assert torch.equal(stats.counts_E, torch.bincount(routing.expert_N, minlength=E))
    torch.testing.assert_close(stats.scores.probs_TE, routing.probs_TE)
    assert torch.equal(stats.choice.expert_N, routing.expert_N)


@pytest.mark.parametrize(
    "options",
    [[], ["router.scores=sigmoid"], ["router.normalise=false", "router.skew=2"], ["router.name=round_robin"]],
    ids=str,
)
def test_the_whole_layer_equals_the_loop(pool, options: list[str]) -> None:
    pool.run(whole_layer, 2, options)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("normalise", ["true", "null"])
def test_round_robin_is_even_and_trains_the_router(top_k: int, normalise: str) -> None:
    """Exactly even counts, K different experts a token, TopK's weights of them."""
    from moetrain import config
    from moetrain.config.core_options import router_options
    from moetrain.moe.routing import ROUTERS

    overrides = ["router.name=round_robin", f"router.top_k={top_k}", "router.skew=3", f"router.normalise={normalise}"]
    options = config.load(["model=tiny", *overrides]).router
    router = ROUTERS[options.name](D, E, router_options(options))
    torch.nn.init.normal_(router.weight)
    routing, _ = router(torch.randn(5 * E, D))
    assert (torch.bincount(routing.expert_N, minlength=E) == 5 * top_k).all()
    chosen_TK = routing.expert_N.view(-1, top_k)
    assert all(len(set(row)) == top_k for row in chosen_TK.tolist())
    weight_TK = routing.probs_TE.gather(1, chosen_TK)
    alone = top_k == 1 and normalise == "null"
    expected_TK = weight_TK if alone else weight_TK / weight_TK.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weight_N.view(-1, top_k), expected_TK)
    routing.weight_N.square().sum().backward()
    assert router.weight.grad is not None
    assert (router.weight.grad.abs().sum() > 0) == (top_k > 1 or alone)  # one weight, normalised, is a constant


def repeat(mesh: Mesh) -> list[bool]:
    first, second = (layer_on_ranks(mesh, [30, 20], 2, "llep") for _ in range(2))
    return [torch.equal(first[name], second[name]) for name in first]


def test_two_runs_agree_bit_for_bit(pool) -> None:
    assert all(all(equal) for equal in pool.run(repeat, 2))


def by_both_ways(mesh: Mesh) -> list[bool]:
    """The same layer through shared memory and through gloo."""
    assert {mesh.ep.rows, mesh.ep.lend} <= comm._transports.keys()
    here = layer_on_ranks(mesh, [30, 20], 2, "llep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm, "_transports", {})
        there = layer_on_ranks(mesh, [30, 20], 2, "llep")
    return [torch.equal(here[name], there[name]) for name in here]


def test_shared_memory_and_gloo_agree_bit_for_bit(pool) -> None:
    assert all(all(equal) for equal in pool.run(by_both_ways, 2))


def padded_or_not(mesh: Mesh) -> None:
    """As where bf16 products are torch's: every segment padded with rows of weight zero."""
    plain = layer_on_ranks(mesh, [30, 20], 2, "llep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelChoice, "_find_row_step", lambda *_: 16)
        padded = layer_on_ranks(mesh, [30, 20], 2, "llep")
    for name in plain:
        torch.testing.assert_close(padded[name], plain[name])


def test_padding_changes_nothing(pool) -> None:
    pool.run(padded_or_not, 2)


def test_the_llep_case_really_lends() -> None:
    assert make_plan(counts_of([40, 40], 2), "llep").guests()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_kernels_equal_the_plain_ones(dtype: torch.dtype) -> None:
    """The fused kernels against plain torch in fp64, to the rounding of the dtype; odd sizes, empty bags, extremes."""
    torch.manual_seed(0)
    near = {"rtol": 8e-3 if dtype == torch.bfloat16 else 2e-6, "atol": 1e-5}
    gate_up, grad, weight = torch.randn(37, 2 * H).mul(4).to(dtype), torch.randn(37, H).to(dtype), torch.rand(37)
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, 88.0])
    rows, own = torch.randn(37, D).to(dtype), torch.randn(50, D).to(dtype)
    bag = torch.randint(0, 45, (37,))
    bags = Bags.group(bag, 50, int(torch.bincount(bag).max()))

    def run(wide: torch.dtype) -> list[Tensor]:
        backend = KernelChoice().choose(torch.device("cpu"), wide)
        changed = gate_up.to(wide, copy=True), grad.to(wide, copy=True)
        hidden = backend.swiglu(changed[0].clone())
        of_weight = backend.swiglu_backward(*changed, weight.double() if wide == torch.float64 else weight)
        summed = backend.sum_rows(rows.to(wide), weight, bags)
        return [hidden, *changed, of_weight, summed, backend.sum_rows(rows.to(wide), None, bags, own.to(wide))]

    for ours, theirs in zip(run(dtype), run(torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), **near)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "by"),
    [
        (torch.float32, "own"),
        (torch.float32, "mm"),
        (torch.bfloat16, "own"),
        (torch.bfloat16, "mm"),
        (torch.bfloat16, "grouped_mm"),
    ],
)
def test_grouped_products_equal_the_loop_over_segments(monkeypatch, dtype: torch.dtype, by: str, threads: int) -> None:
    """Against fp64, to the rounding of the dtype: segments without rows, odd ones, longer than any block."""
    torch.manual_seed(0)
    near = {"rtol": 8e-3, "atol": 2e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
    if by != "own":
        monkeypatch.setattr(cpu_gemm, "able", lambda *_: False)
    if by == "grouped_mm":  # as GPUs have it
        monkeypatch.setattr(kernels, "use_grouped_mm", lambda *_: True)
    sizes, width, hidden = [0, 1, 7, 1025, 40, 2052], 96, 160
    rows, left = torch.randn(sum(sizes), width).to(dtype), torch.randn(sum(sizes), hidden).to(dtype)
    weights = torch.randn(len(sizes), hidden, width).to(dtype)
    out, back, grads = torch.empty_like(left), torch.empty_like(rows), torch.empty_like(weights)
    backend = KernelChoice().choose(torch.device("cpu"), dtype, (weights,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        backend.segment_mm(rows, weights, sizes, out, transpose=True)
        backend.segment_mm(left, list(weights), sizes, back, transpose=False)
        grads = backend.segment_outer(left, rows, sizes, grads, add=False)
        whole = backend.segment_outer(left[1:], rows[1:], sizes[2:], grads[2:].clone(), add=False)
        twice = [grad.clone() for grad in grads]
        backend.segment_outer(left, rows, sizes, twice, add=True)
    finally:
        torch.set_num_threads(before)
    for s, (row, other) in enumerate(zip(rows.double().split(sizes), left.double().split(sizes), strict=True)):
        weight, grad = weights[s].double(), grads[s].double()
        torch.testing.assert_close(out.split(sizes)[s].double(), row @ weight.T, **near)
        torch.testing.assert_close(back.split(sizes)[s].double(), other @ weight, **near)
        torch.testing.assert_close(grad, other.T @ row, **near)
        torch.testing.assert_close(twice[s].double(), grad + other.T @ row, **near)
        if s > 1:
            torch.testing.assert_close(whole[s - 2], grads[s])


@pytest.mark.parametrize(
    ("dtype", "hopper", "grouped"),
    [
        (torch.bfloat16, True, True),  # uneven sizes, new ones in every step: cuBLAS would look for a kernel each time
        (torch.bfloat16, False, False),  # what torch would do itself, with a look at the device each
        (torch.float32, True, False),
    ],
)
def test_a_gpu_groups_products_where_it_can(monkeypatch, dtype: torch.dtype, hopper: bool, grouped: bool) -> None:
    monkeypatch.setattr(kernels, "has_grouped_mm", lambda: hopper)
    assert kernels.use_grouped_mm(torch.device("meta"), dtype) == grouped


@pytest.mark.parametrize("part", kernels.PARTS)
def test_a_part_left_to_torch_is_torchs_alone(monkeypatch, part: str) -> None:
    """Kernels of our own compute the others, and nothing changes but the rounding."""
    calls: list[str] = []
    own = {"sums": (cpu_fused, "sum_rows"), "swiglu": (cpu_fused, "swiglu"), "products": (cpu_gemm, "segment_mm")}
    monkeypatch.setattr(cpu_gemm, "fits", lambda *_: True)
    for name, (module, function) in own.items():
        before = getattr(module, function) if name != "products" else _loop
        monkeypatch.setattr(module, function, lambda *a, n=name, b=before: (calls.append(n), b(*a))[1])
    rows, weight, bags = torch.randn(6, 2 * H), torch.randn(1, H, D), Bags.group(torch.arange(6) // 2, 3, 2)

    def run(left: list[str]) -> list[Tensor]:
        backend = KernelChoice(left_to_torch=frozenset(left)).choose(rows.device, rows.dtype, (weight,))
        hidden, out = backend.swiglu(rows), torch.empty(6, D)
        backend.segment_mm(hidden, weight, [6], out, transpose=False)
        nats, _ = backend.cross_entropy(rows, torch.arange(6))
        return [hidden, out, backend.sum_rows(out, torch.ones(6), bags), nats]

    ours = run([])
    assert sorted(calls) == sorted(kernels.PARTS)
    calls.clear()
    theirs = run([part])
    assert sorted(calls) == sorted(set(kernels.PARTS) - {part})
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_the_cross_entropy_is_left_to_torch_with_the_swiglu() -> None:
    """Both compute exponentials element by element, from one module; calibration times the SwiGLU."""
    own = KernelChoice().choose(torch.device("cpu"), torch.float32)
    left = KernelChoice(left_to_torch=frozenset(["swiglu"])).choose(torch.device("cpu"), torch.float32)
    assert own.pointwise is cpu_fused
    assert left.pointwise is reference
    assert own.has_fused_cross_entropy
    assert not left.has_fused_cross_entropy


def _loop(rows: Tensor, weights: Tensor, sizes: list[int], out: Tensor, transpose: bool) -> None:
    out.copy_(rows @ weights[0])


@pytest.mark.parametrize(
    ("features", "environment", "able"),
    [
        ({"avx2": True, "avx512f": True, "avx512bf16": True}, {}, True),
        ({"avx512bf16": True, "amx-bf16": True}, {}, False),  # oneDNN is faster
        ({"avx512f": True, "avx512bf16": False}, {}, False),
        ({"avx2": True}, {}, False),
        ({"neon": True, "bf16": True}, {}, False),  # another maker's
        ({}, {}, False),
        ({"avx512bf16": True}, {"NUMBA_CPU_NAME": "haswell"}, False),
        ({"avx512bf16": True}, {"NUMBA_DISABLE_JIT": "1"}, False),
    ],
    ids=str,
)
def test_bf16_products_are_ours_only_where_the_cpu_has_the_instructions(
    monkeypatch, features, environment, able
) -> None:
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_DISABLE_JIT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpu_gemm.llvm, "get_host_cpu_features", lambda: features)
    assert cpu_gemm.able.__wrapped__() is able


def test_cpu_kernels_round_as_torch_does() -> None:
    values = torch.cat([torch.randn(500), torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 1e-40, 3.4e38])])
    halves = values.bfloat16()
    bags = Bags.group(torch.arange(1), 1, 1)
    backend = KernelChoice().choose(halves.device, halves.dtype)
    weighted = backend.sum_rows(halves[None], torch.tensor([1.0 / 3]), bags)
    expected = (halves.float() * torch.tensor(1.0 / 3)).bfloat16()
    assert torch.equal(weighted[0].isnan(), expected.isnan())
    assert torch.equal(weighted[0].nan_to_num(), expected.nan_to_num())


def test_a_loan_lists_what_leaves_and_what_comes() -> None:
    plan = Plan.from_chunks(
        np.full((3, 3), 4),
        default_home(3, 3),
        [(0, 0, 4), (0, 2, 4), (0, 1, 4), (1, 1, 12), (2, 2, 8), (2, 0, 4)],
    )
    assert plan.guests() == [(0, 0, 1), (0, 0, 2), (2, 2, 0)]
    first, second = guests.plan_slices(plan.guests(), 10)
    assert first == [(0, 1, 0, 0, 10), (0, 2, 0, 0, 10), (2, 0, 2, 0, 10)]
    assert second == []
    first, second = guests.plan_slices([(5, 0, 1), (5, 0, 2), (5, 0, 3)], 10)  # one slice to each, which passes it on
    assert first == [(0, 1, 5, 0, 3), (0, 2, 5, 3, 6), (0, 3, 5, 6, 10)]
    assert second == [
        (1, 2, 5, 0, 3),
        (1, 3, 5, 0, 3),
        (2, 1, 5, 3, 6),
        (2, 3, 5, 3, 6),
        (3, 1, 5, 6, 10),
        (3, 2, 5, 6, 10),
    ]
    assert plan.slots(0) == [0, 2]
