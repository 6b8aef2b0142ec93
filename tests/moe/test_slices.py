"""Experts cut into r slices compute what whole experts do, at the communication of Tutel's table."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moetrain
from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import Mesh
from moetrain.moe.clock import Clock
from moetrain.moe.planning import find_slices
from moetrain.moe.planning.plan import stay_home
from moetrain.moe.routing import Routing
from moetrain.moe.slices import cut_matrices, join_matrices
from moetrain.moe.whole_weights import gather_whole_experts

D, H = 16, 48
FORCED = {"planner": "llep", "planner_options": {"min_rows": 1, "threshold": 1.0}}
HOME = {"planner": "home"}


def make_layer(num_experts: int, seed: int = 3) -> moetrain.MoE:
    torch.manual_seed(seed)
    return moetrain.MoE(D, H, num_experts, 1, router_options={"skew": 1.0, "normalise": False}, init_std=0.3)


def batch(rank: int, micro: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + micro)
    x, upstream = (torch.randn(tokens, D, generator=generator) for _ in range(2))
    return x, upstream


def backward(layer: moetrain.MoE, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output and gradient of the tokens; parameters' gradients add up."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(upstream)
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-6 of the largest value."""
    for name, value in expected.items():
        limit = 1e-6 * max(1.0, float(value.abs().max()) if value.numel() else 0.0)
        torch.testing.assert_close(found[name], value, rtol=0, atol=4 * limit, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["gate_up", "down"])
def test_cutting_is_undone_by_joining(name: str) -> None:
    whole = torch.randn(3, 2 * H, D) if name == "gate_up" else torch.randn(3, D, H)
    parts = cut_matrices(name, whole, 3)
    assert parts.shape == ((9, 2 * H // 3, D) if name == "gate_up" else (9, D, H // 3))
    assert torch.equal(join_matrices(name, parts, 3), whole)


def test_the_fewest_slices_that_give_every_rank_one() -> None:
    assert find_slices(8, H, 4) == find_slices(4, H, 4) == 1
    assert find_slices(2, H, 4) == find_slices(3, H, 4) == 2
    assert find_slices(1, H, 4) == 6  # widths of 48 / 4 and 48 / 5 are no multiples of 8
    assert find_slices(1, H, 7) is None


@pytest.mark.parametrize("slices", [1, 2, 3, 6])
def test_slices_on_one_device_are_whole_experts(slices: int) -> None:
    whole = make_layer(3)
    cut = copy.deepcopy(whole)
    cut.experts.cut(slices)
    x, upstream = batch(0, 0, 20)
    assert_near(backward(cut, x, upstream), backward(whole, x, upstream))
    for name, parameter in whole.experts.named_parameters():
        found = join_matrices(name, getattr(cut.experts, name).grad, slices)
        assert_near({name: found}, {name: parameter.grad})
    assert_near({"router": cut.router.weight.grad}, {"router": whole.router.weight.grad})


def one_device(num_experts: int, tokens: list[int], num_micro: int) -> list[dict[str, Tensor]]:
    """Of every rank, what the whole batch on one device gives it."""
    layer = make_layer(num_experts)
    found: list[dict[str, Tensor]] = []
    for micro in range(num_micro):
        parts = [batch(rank, micro, count) for rank, count in enumerate(tokens)]
        every = backward(layer, *(torch.cat([part[i] for part in parts]) for i in range(2)))
        split = {name: value.split(tokens) for name, value in every.items()}
        found = [{name: values[rank] for name, values in split.items()} for rank in range(len(tokens))]
    grads = {name: p.grad for name, p in layer.named_parameters()}
    return [{**each, **grads} for each in found]


def spread(
    mesh: Mesh, num_experts: int, tokens: list[int], num_micro: int, options: dict[str, Any]
) -> tuple[int, list[int]]:
    """Compare with one device; returns (guests, rows of every expert)."""
    layer = make_layer(num_experts, seed=3 + mesh.rank)  # parameters become rank 0's
    handle = moetrain.expert_parallel(layer, dist.group.WORLD, **options)
    for _ in range(2):  # a second step finds nothing of the first
        layer.zero_grad()
        with handle.step(num_micro):
            for micro in range(num_micro):
                found = backward(layer, *batch(mesh.rank, micro, tokens[mesh.rank]))
        handle.reduce_dense_gradients()
    for name, parameter in layer.named_parameters():
        grad = parameter.grad
        if name.startswith("experts."):
            grad = gather_whole_experts(name.rpartition(".")[2], grad, layer.experts, mesh.ep)
        found[name] = grad
    assert_near(found, one_device(num_experts, tokens, num_micro)[mesh.rank])
    stats = handle.statistics()[0]
    assert all(expert < num_experts for expert, _, _ in stats.guests)
    return len(stats.guests), stats.counts.tolist()


@pytest.mark.parametrize(
    ("num_experts", "tokens", "options"),
    [
        (1, [14, 9], {"r": 2}),
        (2, [14, 9], {"r": 2, **HOME}),
        (2, [14, 9], {"r": 3, **FORCED, "recompute": "full", "max_rows": 16}),
        (3, [14, 0], {"r": 3, **FORCED, "recompute": "selective"}),
        (1, [14, 0, 3, 5], {}),
        (2, [14, 0, 3, 5], {"r": 2, **HOME}),
        (2, [14, 2, 3, 5], {**FORCED, "guest_slots": 0}),
        (5, [4, 2, 3, 5], {"r": 2, **FORCED}),
        (3, [8, 8], {"r": 2, "planner": "static"}),
    ],
    ids=str,
)
def test_every_number_of_slices_computes_the_same(
    pool: Any, num_experts: int, tokens: list[int], options: dict[str, Any]
) -> None:
    """Outputs and every gradient, with moved load, recompute, accumulation and ranks without tokens."""
    options = {"costs": moetrain.default_costs(), **options}
    for guests, counts in pool.run(spread, len(tokens), num_experts, tokens, 2, options):
        assert sum(counts) == 2 * sum(tokens)
        assert not (guests and options.get("planner") == "home")
        assert guests or options.get("planner") != "llep"


def carry_over(mesh: Mesh, folder: str) -> None:
    """State of two slices an expert into whole experts and back, the optimizer's, too."""
    layer = make_layer(2)
    handle = moetrain.expert_parallel(layer, dist.group.WORLD, **HOME, r=2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    with handle.step():
        backward(layer, *batch(mesh.rank, 0, 8))
    handle.reduce_dense_gradients()
    optimizer.step()
    weights, states = handle.full_state_dict(), handle.full_optimizer_state(optimizer)
    if mesh.rank == 0:
        torch.save(states, f"{folder}/states.pt")
    dist.barrier()
    states = torch.load(f"{folder}/states.pt")
    other = make_layer(2, seed=9)
    second = moetrain.expert_parallel(other, dist.group.WORLD, **HOME, r=1)
    again = torch.optim.AdamW(other.parameters(), lr=0.1)
    second.load_full_state_dict(weights)
    second.load_full_optimizer_state(again, states)
    for loop, parts, steps in ((handle, layer, optimizer), (second, other, again)):
        parts.zero_grad()
        with loop.step():
            backward(parts, *batch(mesh.rank, 1, 8))
        loop.reduce_dense_gradients()
        steps.step()
    assert_near(second.full_state_dict(), handle.full_state_dict())


def test_states_go_from_slices_to_whole_experts(pool: Any, tmp_path: Any) -> None:
    pool.run(carry_over, 2, str(tmp_path))


def count_traffic(mesh: Mesh, slices: int) -> tuple[int, int]:
    """(copies of tokens that a forward sends from here, numbers of a weight that a guest is)."""
    num_experts, tokens = 4, 8
    torch.manual_seed(0)
    layer = make_layer(num_experts)
    layer.experts.cut(slices)
    layer.experts.shard(mesh.ep)
    expert_N = torch.arange(tokens) % num_experts
    routing = Routing(torch.arange(tokens), expert_N, torch.ones(tokens), torch.empty(0, num_experts))
    counts = np.tile(np.bincount(expert_N, minlength=num_experts), (mesh.ep.size, slices))
    clock = Clock(torch.device("cpu"))
    layer.experts(torch.randn(tokens, D), routing, stay_home(counts, layer.experts.home), 1, clock)
    lent = sum(weight.shape[1:].numel() for weight in layer.experts.parameters())
    return clock.sent_bytes // (4 * D), lent


@pytest.mark.parametrize("slices", [1, 2])
def test_communication_is_that_of_tutels_table(pool: Any, slices: int) -> None:
    """EP + DP + MP: O(C_g · r + P / (E · r)) (Tutel, table 3): tokens travel r times, a replica weighs P / (E · r)."""
    found = pool.run(count_traffic, 4, slices, ep=4)
    tokens, ranks = 8, 4
    copies = [copies for copies, _ in found]
    assert sum(copies) == slices * tokens * ranks * (ranks - 1) // ranks  # evenly: 1 / R of them stay
    assert {lent for _, lent in found} == {3 * D * H // slices}


def test_what_cannot_be_cut_is_refused(pool: Any) -> None:
    layer = make_layer(2)
    with pytest.raises(ConfigError, match=r"^r=4: must cut the hidden width 48 of an expert into multiples of 8"):
        layer.experts.cut(4)
    pool.run(refuse, 4)


def refuse(mesh: Mesh) -> None:
    with pytest.raises(ConfigError, match=r"^group: has 4 ranks, more than the 1 experts .* in 3 slices$"):
        moetrain.expert_parallel(make_layer(1), dist.group.WORLD, r=3)
