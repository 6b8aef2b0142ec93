"""What holds for every prediction, whatever the figures: monotone in bandwidth, at most linear in the batch, exact for
one device, and the same for all planners where nothing is lopsided."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.common.errors import ConfigError
from moetrain.moe.planning import default_home
from moetrain.moe.planning.plan import Ints, imbalance
from moetrain.simulate.cluster import load_cluster
from moetrain.simulate.layer import PlannerChoice, run_layer
from moetrain.simulate.layout import Layout, StepWork
from moetrain.simulate.memory import predict_memory
from moetrain.simulate.shape import from_hf
from moetrain.simulate.stack import STACKS
from moetrain.simulate.step import PARTS, Job, predict_step
from moetrain.simulate.traffic import (
    WORKLOADS,
    Natural,
    balanced,
    find_routing,
    fit_natural,
    workload,
)

MODELS = st.sampled_from(["qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3"])
ROUTINGS = st.sampled_from(["balanced", "natural", "W1_hot_expert_set", "W4_source_ragged"])
LINKS = ("nvlink.bandwidth", "network.bandwidth", "memory.bandwidth")


def device_imbalance(counts_RE: Ints, home_E: Ints) -> float:
    """Largest over mean load of the devices without planning."""
    return imbalance(np.bincount(home_E, counts_RE.sum(0), len(counts_RE)).astype(np.int64))


def job(model: str, world: int, ep: int, micro_batch: int = 1) -> Job:
    work = StepWork(4096, micro_batch, world * micro_batch, "bf16", "full")
    return Job(load_cluster("h100"), from_hf(model), Layout(world, ep), work, STACKS["moetrain"])


@settings(max_examples=20)
@given(MODELS, ROUTINGS, st.sampled_from([8, 16, 32]), st.sampled_from(LINKS), st.floats(1.0, 8.0))
def test_more_bandwidth_is_never_slower(model: str, routing: str, ep: int, field: str, factor: float) -> None:
    """For a fixed plan: that of home, which does not look at costs."""
    section, name = field.split(".")
    slow = load_cluster("h100")
    fast = load_cluster("h100", {field: repr(factor * getattr(getattr(slow, section), name))})
    times = [predict_step(replace(job(model, 64, ep), cluster=c), routing, samples=2) for c in (slow, fast)]
    assert times[1].total <= times[0].total * (1 + 1e-12)


@settings(max_examples=20)
@given(MODELS, ROUTINGS, st.sampled_from([1, 8, 32]), st.sampled_from([1, 2, 4]))
def test_twice_the_batch_takes_at_most_twice_the_time(model: str, routing: str, ep: int, micro_batch: int) -> None:
    one = predict_step(job(model, 32, ep, micro_batch=micro_batch), routing, samples=2).total
    two = predict_step(job(model, 32, ep, micro_batch=2 * micro_batch), routing, samples=2).total
    assert one * (1 - 1e-12) <= two <= 2 * 1.05 * one  # equal where parameters travel all the time


@given(MODELS, st.sampled_from([2, 8, 16]))
@settings(max_examples=9)
def test_balanced_routing_makes_planners_equal(model: str, ep: int) -> None:
    base = predict_step(job(model, 16, ep)).total
    for planner in ("llep", "makespan", "eplb"):
        choice = PlannerChoice(planner, {"replicas": 1} if planner == "eplb" else {})
        found = predict_step(job(model, 16, ep), "balanced", choice)
        if planner != "eplb":  # which lends whatever comes
            assert found.total == pytest.approx(base, rel=1e-9)
        assert found.total >= base * (1 - 1e-9)


def test_one_device_equals_its_roofline() -> None:
    """With perfect products and a host that costs nothing, a step is its operations over the peak and bytes over
    memory's bandwidth."""
    figures = {"gemm.share": "1", "gemm.half_rows": "0", "gemm.half_width": "0", "gemm.attention": "1"}
    figures |= {"memory.share": "1", "host.launch": "0", "host.sync": "0", "peak.fp32": "989e12"}
    shape = from_hf("qwen3-30b-a3b")
    alone = Job(load_cluster("h100", figures), shape, Layout(1, 1), StepWork(4096, 2, 2), STACKS["moetrain"])
    whole = predict_step(alone)
    fast = load_cluster("h100", {**figures, "memory.bandwidth": "1e30"})
    computing = predict_step(replace(alone, cluster=fast))
    scores = 3.5 / 3  # attention's backward forms the scores again
    pairs = shape.attention.pairs(4096, shape.num_layers) * shape.attention.score_width * 2
    attention = 6 * shape.num_layers * pairs
    flops = 2 * 4096 * (shape.flops_per_token(4096) + (scores - 1) * attention)
    assert computing.total == pytest.approx(flops / 989e12, rel=1e-4)  # norms are no products
    slow = predict_step(
        replace(alone, cluster=load_cluster("h100", {**figures, "peak.bf16": "1e40", "peak.fp32": "1e40"}))
    )
    assert whole.total == pytest.approx(computing.total + slow.total, rel=1e-6)


def test_the_parts_are_all_of_the_step_and_the_interval_holds_it() -> None:
    found = predict_step(job("deepseek-v3", 64, 64), "natural", PlannerChoice("makespan"), samples=4)
    assert set(found.parts) == set(PARTS)
    assert found.low <= found.total <= found.high
    assert 0 < found.error < 0.1 * found.total
    same = predict_step(job("deepseek-v3", 64, 64), "natural", PlannerChoice("makespan"), samples=4)
    assert same.total == found.total


def test_moving_load_pays_where_it_is_lopsided() -> None:
    lopsided = job("qwen3-30b-a3b", 8, 8, micro_batch=2)
    times = {
        name: predict_step(lopsided, "W2_hot_rank", PlannerChoice(name), samples=2) for name in ("home", "makespan")
    }
    assert times["makespan"].total < 0.6 * times["home"].total
    assert predict_step(lopsided, "balanced").total < times["makespan"].total
    memory = {name: predict_memory(lopsided, time.layers).total for name, time in times.items()}
    assert memory["makespan"] < memory["home"]


def test_tokens_cross_to_a_rank_once() -> None:
    """Of 8 experts a token has several on the same rank: fewer bytes than selections."""
    machine = job("qwen3-30b-a3b", 8, 8).machine
    found = run_layer(balanced(machine.group), machine, PlannerChoice("home"))
    selections = 7 / 8 * 4096 * 8 * 2048 * 2 * machine.transfers
    assert found.inside == pytest.approx(selections * (1 - (7 / 8) ** 8) * 8 / 8, rel=0.03)


def test_a_token_crosses_between_nodes_once_in_the_two_level_exchange() -> None:
    flat = job("deepseek-v3", 64, 64).machine
    level = replace(flat, stack=STACKS["automodel"])
    counts = balanced(flat.group)
    apart, together = (run_layer(counts, machine, PlannerChoice("home")) for machine in (flat, level))
    assert together.between < 0.85 * apart.between
    assert together.total < apart.total


@pytest.mark.parametrize("name", [*WORKLOADS, "natural"])
def test_counts_are_those_of_tokens_with_distinct_experts(name: str) -> None:
    group = job("qwen3-30b-a3b", 16, 16).group
    routing = find_routing(name, group, Natural())
    samples = list(routing.layers(group, 3, seed=5))
    for sample in samples:
        assert sample.counts.shape == (16, 128)
        assert sample.counts.min() >= 0
        assert sample.counts.max() <= group.tokens
        if name != "W4_source_ragged":
            assert (sample.counts.sum(1) == group.tokens * group.top_k).all()
    again = list(routing.layers(group, 3, seed=5))
    assert all((a.counts == b.counts).all() for a, b in zip(samples, again, strict=True))


def test_workloads_are_what_their_names_say() -> None:
    group = job("qwen3-30b-a3b", 16, 16).group
    home = default_home(128, 16)
    load = {name: workload(name, group, seed=0, step=0) for name in WORKLOADS}
    assert device_imbalance(load["W0_balanced"], home) == 1
    assert device_imbalance(load["W2_hot_rank"], home) > 7
    assert (
        device_imbalance(load["W3_spread_hot_experts"], home) < 1.5 < device_imbalance(load["W1_hot_expert_set"], home)
    )
    assert load["W5_zero_expert_rank"][:, home == 0].sum() == 0
    assert load["W4_source_ragged"].sum(1).max() > 5 * load["W4_source_ragged"].sum(1).min()
    hot = [int(workload("W6_rotating_hotspot", group, 0, step).sum(0).argmax()) // 8 for step in range(4)]
    assert hot == [0, 1, 2, 3]
    burst = [device_imbalance(workload("W7_burst", group, 0, step), home) for step in range(4)]
    assert max(burst[:3]) < 1.2 < 7 < burst[3]


@pytest.mark.parametrize(("concentration", "agreement"), [(0.5, 100.0), (1.5, 300.0), (5.0, 3000.0)])
def test_planted_parameters_of_natural_routing_are_found_again(concentration: float, agreement: float) -> None:
    group = job("qwen3-30b-a3b", 8, 8).group
    rng = np.random.default_rng(3)
    found = fit_natural(np.stack([Natural(concentration, agreement).draw(group, rng) for _ in range(60)]))
    assert found.concentration == pytest.approx(concentration, rel=0.25)
    assert found.agreement == pytest.approx(agreement, rel=0.25)


def test_layouts_that_cannot_be_are_refused() -> None:
    for layout, message in (
        (Layout(64, 48), r"parallel\.ep=48: must divide"),
        (Layout(64, 8, pp=3), r"parallel\.pp=3: must divide the number of ranks, 64"),
        (Layout(64, 8, tp=5), r"parallel\.tp=5: must divide with parallel\.cp the ranks"),
        (Layout(512, 256), r"parallel\.ep=256: needs at least as many slices of experts, parallel\.r=1 × 128"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict_step(replace(job("qwen3-30b-a3b", 64, 8), layout=layout))
    with pytest.raises(ConfigError, match=r"train\.global_batch=3: must be a multiple of 64 data-parallel ranks"):
        predict_step(replace(job("qwen3-30b-a3b", 64, 8), work=StepWork(4096, 1, 3)))


def test_slices_balance_a_hot_rank_and_send_every_token_twice() -> None:
    """Experts in two slices, at home on two ranks each: less to compute on the hot rank, more on the links; and a group
    of more ranks than experts."""
    base = job("qwen3-30b-a3b", 64, 64)
    whole, cut = (
        predict_step(replace(base, layout=replace(base.layout, r=r)), "W2_hot_rank", samples=2).layers[0]
        for r in (1, 2)
    )
    assert cut.loads.max() / cut.loads.mean() < 0.7 * whole.loads.max() / whole.loads.mean()
    assert cut.experts < 0.7 * whole.experts
    assert 1.5 < (cut.inside + cut.between) / (whole.inside + whole.between) < 2
    wide = predict_step(replace(job("qwen3-30b-a3b", 256, 256), layout=Layout(256, 256, r=2)), "natural", samples=2)
    assert wide.total > 0
    spread = replace(base, layout=Layout(64, 8, r=8))  # eight slices on every rank: a token goes to each once
    loads = predict_step(spread, "natural", samples=2).layers[0].loads
    assert loads.max() == loads.min()
