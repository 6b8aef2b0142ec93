"""The cost model by hand, and what `makespan` promises under any costs."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, milp

from moetrain.moe.planning import PLANNERS, default_home
from moetrain.moe.planning.cost import Costs, Limits, Link, State, default_costs, layer_time
from moetrain.moe.planning.cost_model import name_figures
from moetrain.moe.planning.makespan import NO_LIMIT, judge_chunks
from moetrain.moe.planning.place_rows import make_problem
from moetrain.moe.planning.plan import Ints, Plan, imbalance
from tests.moe.planning.test_plan import paper_loads

makespan = PLANNERS["makespan"]
SIMPLE = Costs(
    row_forward=1.0,
    row_backward=2.0,
    segment_forward=4.0,
    segment_backward=6.0,
    row_bytes=8,
    weight_bytes=600,
    gradient_bytes=1200,
    inside=Link(latency=1.0, bandwidth=16.0),
    between=Link(latency=3.0, bandwidth=4.0),
    overlap=0.0,
)


def test_layer_time_by_hand() -> None:
    """Four ranks on two nodes, an expert each. Expert 0 keeps 5 rows, lends itself to ranks 1 and 2 for 3 and 4."""
    counts, home = np.array([[5, 0, 0, 0], [4, 2, 0, 0], [3, 0, 1, 0], [0, 0, 0, 2]]), np.arange(4)
    costs = replace(SIMPLE, nodes=(0, 0, 1, 1))
    plan = Plan.from_chunks(
        counts,
        home,
        [(0, 0, 5), (0, 1, 3), (0, 2, 4), (1, 1, 2), (2, 2, 1), (3, 3, 2)],
        (np.arange(4), costs.node(4)),
    )
    found = layer_time(plan, counts, home, costs)
    # One row crosses, from rank 1 to rank 2 in the other node: there and back, in forward and in backward.
    assert found.dispatch == found.combine == 2 * (3.0 + 1 * 8 / 4.0)
    # Rank 2 computes 4 + 1 rows, rank 0 five, rank 1 3 + 2; ranks 1 and 2 two experts each.
    assert found.compute == 5 * (1.0 + 2.0) + 2 * (4.0 + 6.0)
    # Rank 0 sends 600 bytes inside the node and 600 to the other, which is slower; 1200 come back each way.
    assert found.lend == (3.0 + 600 / 4.0) + (3.0 + 1200 / 4.0)
    resident = np.zeros((4, 4), np.int64)
    resident[2, 0] = 1
    assert layer_time(plan, counts, home, costs, resident).lend == (1.0 + 600 / 16.0) + (1.0 + 1200 / 16.0)
    # What is hidden: never more than a borrower computes of its own meanwhile, here rank 2's one row.
    assert layer_time(plan, counts, home, replace(costs, overlap=0.5)).lend == found.lend - 1 * (1.0 + 2.0)
    # Backward lends again: the weights and their latency once more.
    assert layer_time(plan, counts, home, replace(costs, lends=2)).lend == found.lend + (3.0 + 600 / 4.0)


def test_many_guests_are_relayed() -> None:
    """One expert to three guests, rank 1 in the owner's node, 2 and 3 in the other: slices of a third."""
    counts, home = np.full((4, 4), [4, 0, 0, 0]), np.arange(4)
    costs = replace(SIMPLE, nodes=(0, 0, 1, 1))
    plan = Plan.from_chunks(counts, home, [(0, q, 4) for q in range(4)], (np.arange(4), costs.node(4)))
    found = layer_time(plan, counts, home, costs)
    assert found.dispatch == found.combine == 0  # every row is where it was
    # First the owner sends a third inside its node and two thirds to the other. Then rank 1 sends its slice to ranks
    # 2 and 3, both in the other node, and gets theirs from there: again two thirds on the slower link.
    phase = 2 / 3 * (600 + 1200) / 4.0 + 2 * 3.0
    assert found.lend == pytest.approx(2 * phase)
    # A guest that is there already takes no part: the two others are lent the whole expert, one in each node.
    resident = np.zeros((4, 4), np.int64)
    resident[3, 0] = 1
    assert layer_time(plan, counts, home, costs, resident).lend == (600 + 1200) / 4.0 + 2 * 3.0
    # Within one node of four: a third to each, then two thirds out of and into every guest.
    together = layer_time(plan, counts, home, replace(costs, nodes=(0,) * 4)).lend
    assert together == pytest.approx((3 / 3 + 2 / 3) * (600 + 1200) / 16.0 + 2 * 2 * 1.0)


def test_default_costs_worked_example() -> None:
    """8 H100, gpt-oss-120b: an expert of 3 · 2880² weights; 32,768 tokens a rank, top-4, spread evenly."""
    costs, weights = default_costs(), 3 * 2880 * 2880
    assert costs.weight_bytes == 2 * weights == 49_766_400
    assert costs.row_forward == pytest.approx(82.9e-9, rel=1e-3)
    counts, home = np.full((8, 128), 1024), default_home(128, 8)
    found = layer_time(PLANNERS["home"](counts, home), counts, home, costs)
    # 131,072 rows × 6 · weights / 600 TFLOP/s = 32.6 ms; 16 experts a rank × 28 µs.
    assert found.compute == pytest.approx(131_072 * 6 * weights / 600e12 + 16 * 28e-6)
    # 7/8 of the rows leave: 114,688 × 5,760 bytes / 300 GB/s = 2.2 ms, and as much back from backward.
    assert found.dispatch == found.combine == pytest.approx(2 * (20e-6 + 114_688 * 5760 / 300e9))
    assert found.lend == 0
    assert found.total == found.dispatch + found.compute + found.combine


@st.composite
def cases(draw: st.DrawFn) -> tuple[Ints, Ints, Costs, Ints | None]:
    """(counts, home, costs, resident): up to 7 ranks on up to 3 nodes, any rates and overlap, experts anywhere."""
    num_ranks = draw(st.integers(1, 7))
    num_experts = num_ranks * draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = rng.choice([0, 0, 1, 3, 17, 200, 5000], (num_ranks, num_experts))
    home = draw(st.sampled_from([default_home(num_experts, num_ranks), rng.integers(0, num_ranks, num_experts)]))
    nodes = np.unique(np.sort(rng.integers(0, draw(st.integers(1, 3)), num_ranks)), return_inverse=True)[1]
    costs = Costs(
        *(10 ** rng.uniform(-8, -4, 4)).tolist(),
        *(10 ** rng.uniform([1, 2, 2], [4, 8, 8])).astype(int).tolist(),
        Link(*(10 ** rng.uniform([-7, 8], [-4, 12])).tolist()),
        Link(*(10 ** rng.uniform([-7, 8], [-4, 12])).tolist()),
        overlap=draw(st.sampled_from([0.0, 0.5, 1.0])),
        lends=draw(st.integers(1, 2)),
        nodes=tuple(nodes.tolist()),
    )
    resident = draw(st.sampled_from([None, (rng.random(counts.shape) < 0.2).astype(np.int64)]))
    return counts, home, costs, resident


def hosted(plan: Plan) -> int:
    """The most guests on any rank."""
    return int(np.bincount([guest for _, _, guest in plan.guests()], minlength=plan.num_ranks).max())


@given(case=cases(), factor=st.sampled_from([None, 1.0, 1.1, 2.0]), slots=st.sampled_from([None, 0, 1, 3]))
@settings(max_examples=300)
def test_never_above_home_or_llep_within_limits(case, factor: float | None, slots: int | None) -> None:
    counts, home, costs, resident = case
    max_rows = None if factor is None else int(np.ceil(factor * counts.sum() / len(counts)))
    plan = makespan(counts, home, costs, Limits(max_rows, slots), State(resident))

    def excess(plan: Plan) -> int:
        return max(int(plan.loads().max()) - (NO_LIMIT if max_rows is None else max_rows), 0)

    assert slots is None or hosted(plan) <= slots
    assert (sum(plan.rows(source).sum(1) for source in range(len(counts))) == counts.sum(0)).all()
    for name in ("home", "llep"):
        other = PLANNERS[name](counts, home, costs)
        if slots is None or hosted(other) <= slots:
            assert excess(plan) <= excess(other)
            if excess(plan) == excess(other):
                mine, theirs = (layer_time(p, counts, home, costs, resident).total for p in (plan, other))
                assert mine <= theirs
    at_home = PLANNERS["home"](counts, home)
    if plan.crossing() > at_home.crossing() and excess(at_home) == 0 and slots is None:
        assert plan.loads().max() < at_home.loads().max()
    if slots is None and max_rows is not None:
        assert excess(plan) == 0


@given(case=cases())
@settings(max_examples=100)
def test_the_search_counts_as_layer_time_does(case) -> None:
    counts, home, costs, resident = case
    free = np.zeros_like(counts) if resident is None else resident
    nobody, workspace = np.zeros((0, 2), np.int64), np.empty(counts.T.shape, np.int64)
    node = costs.node(len(counts))
    problem = make_problem(counts, home, node, free, nobody, costs.vector(), NO_LIMIT, NO_LIMIT, workspace)
    for plan in (
        makespan(counts, home, costs, None, State(resident)),
        PLANNERS["llep"](counts, home, min_rows=3, threshold=1.0),
        PLANNERS["home"](counts, home),
    ):
        chunks = np.ascontiguousarray(np.stack([plan.expert, plan.rank, plan.num_rows], 1))
        predicted, _over = judge_chunks(problem, chunks, 1 if plan.near else 0, np.inf, NO_LIMIT)
        assert predicted == layer_time(plan, counts, home, costs, resident).total


@given(case=cases())
@settings(max_examples=100)
def test_sources_are_local_first_then_near(case) -> None:
    """Own rows kept = min(own rows, quota); then, in each node, min(rows left, quota left)."""
    counts, home, costs, _ = case
    num_ranks, node = len(counts), costs.node(len(counts))
    state = State(past=counts.sum(0).astype(float))
    for plan in (makespan(counts, home, costs), PLANNERS["eplb"](counts, home, costs, None, state)):
        if not plan.near:
            continue
        sent = np.stack([plan.rows(source) for source in range(num_ranks)])  # [source, E, R]
        quota = sent.sum(0).T  # [R, E]
        kept = np.stack([sent[r, :, r] for r in range(num_ranks)])
        assert (kept == np.minimum(counts, quota)).all()
        for k in range(node.max() + 1):
            here = node == k
            inside = sent[here][:, :, here].sum((0, 2)) - kept[here].sum(0)
            left, wanted = (counts - kept)[here].sum(0), (quota - kept)[here].sum(0)
            assert (inside == np.minimum(left, wanted)).all()


def drawn(share: float, hot: int, rows: int, seed: int = 0) -> Ints:
    """[8, 128] rows of every source drawn from the paper's scenario."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.multinomial(rows, load / load.sum()) for load in paper_loads(share, hot)])


def test_guests_that_are_there_already_are_free() -> None:
    counts, home = drawn(0.8, 1, rows=512), default_home(128, 8)
    everywhere = State(resident=np.arange(128) == np.zeros((8, 1), np.int64))  # expert 0
    assert not makespan(counts, home).guests()  # too few rows for what lending costs
    free = makespan(counts, home, state=everywhere)
    assert layer_time(free, counts, home, default_costs(), everywhere.resident).lend == 0
    assert imbalance(free.loads()) <= 1.01
    assert free.guests() == [(0, 0, guest) for guest in range(1, 8)]


@pytest.mark.parametrize("share", [0.8, 0.95])
def test_one_hot_expert_is_balanced_with_local_rows(share: float) -> None:
    """65,536 rows on 8 ranks, drawn eight times: three quarters fewer rows cross than in the paper's order of rows, and
    hardly more than those of the other experts."""
    home, plans, papers = default_home(128, 8), 0, 0
    for seed in range(8):
        counts = drawn(share, 1, 8192, seed)
        plan, paper = makespan(counts, home), PLANNERS["llep"](counts, home)
        plans, papers = plans + plan.crossing(), papers + paper.crossing()
        others = Plan.from_chunks(
            counts[:, 1:], home[1:], [(e, home[e + 1], n) for e, n in enumerate(counts[:, 1:].sum(0))]
        )
        assert plan.crossing() <= others.crossing() + 0.01 * counts.sum()
        assert imbalance(plan.loads()) <= 1.01
    assert plans <= 0.25 * papers


def test_the_same_input_gives_the_same_plan() -> None:
    rng = np.random.default_rng(0)
    given = [(rng.integers(0, 3000, (r, 3 * r)) * rng.integers(0, 2, 3 * r), default_home(3 * r, r)) for r in (4, 9, 4)]
    first, second = ([makespan(*g) for g in given] for _ in range(2))
    for a, b in zip(first, second, strict=True):
        for field in ("expert", "rank", "num_rows"):
            assert (getattr(a, field) == getattr(b, field)).all()


def random_case(seed: int) -> tuple[Ints, Ints, Costs]:
    """Up to 3 ranks, 4 experts, 12 rows a pair; costs of the same order of magnitude; one node, nothing hidden."""
    rng = np.random.default_rng(seed)
    num_ranks, num_experts = int(rng.integers(2, 4)), int(rng.integers(2, 5))
    counts = rng.integers(0, 13, (num_ranks, num_experts)) * rng.choice([1, 1, 4], num_experts)
    link = Link(float(rng.uniform(0, 4)), 1.0)
    costs = replace(
        SIMPLE,
        row_bytes=1,
        segment_forward=float(rng.uniform(0, 8)),
        weight_bytes=int(rng.integers(1, 20)),
        gradient_bytes=int(rng.integers(1, 20)),
        inside=Link(link.latency, float(10 ** rng.uniform(-1, 1))),
    )
    return counts, default_home(num_experts, num_ranks), costs


def optimum(counts: Ints, home: Ints, costs: Costs) -> float:
    """The least `layer_time` of any plan whatsoever, in one node with at most two guests an expert and no overlap.

    Variables: rows y[s, e, q] from a source to a rank, copies used b[e, q]; the slowest rank's compute, rows and
    copies on a link; and whether any row or copy travels at all.
    """
    num_ranks, num_experts = counts.shape
    y = np.arange(counts.size * num_ranks).reshape(num_ranks, num_experts, num_ranks)
    b = y.size + np.arange(num_experts * num_ranks).reshape(num_experts, num_ranks)
    compute, rows, copies, rows_wait, copies_wait = y.size + b.size + np.arange(5)
    size = y.size + b.size + 5
    left, low, high = [], [], []

    def rule(terms: list[tuple[np.ndarray, float]], at_least: float, at_most: float = np.inf) -> None:
        line = np.zeros(size)
        for index, factor in terms:
            np.add.at(line, index, factor)
        left.append(line)
        low.append(at_least)
        high.append(at_most)

    row, segment = costs.row_forward + costs.row_backward, costs.segment_forward + costs.segment_backward
    for e in range(num_experts):
        for r in range(num_ranks):
            rule([(y[r, e], 1.0)], counts[r, e], counts[r, e])
            rule([(b[e, r], counts[:, e].sum()), (y[:, e, r], -1.0)], 0)
            if r != home[e]:
                rule([(copies_wait, 1.0), (b[e, r], -1.0)], 0)
    for r in range(num_ranks):
        away, own = np.arange(num_ranks) != r, home == r
        rule([(compute, 1.0), (y[:, :, r].ravel(), -row), (b[:, r], -segment)], 0)
        for crossing in (y[r][:, away].ravel(), y[away, :, r].ravel()):
            rule([(rows, 1.0), (crossing, -1.0)], 0)
            rule([(rows_wait, counts.sum()), (crossing, -1.0)], 0)
        for lent in (b[own][:, away].ravel(), b[~own, r]):
            rule([(copies, 1.0), (lent, -1.0)], 0)
    price = np.zeros(size)
    price[compute] = 1
    price[rows], price[rows_wait] = 4 * costs.row_bytes / costs.inside.bandwidth, 4 * costs.inside.latency
    price[copies] = (costs.lends * costs.weight_bytes + costs.gradient_bytes) / costs.inside.bandwidth
    price[copies_wait] = (costs.lends + 1) * costs.inside.latency
    top = np.full(size, np.inf)
    top[b], top[[rows_wait, copies_wait]] = 1, 1
    whole = np.ones(size)
    whole[compute] = 0
    found = milp(price, constraints=LinearConstraint(np.array(left), low, high), integrality=whole, bounds=(0, top))
    assert found.success
    return float(found.fun)


def test_close_to_the_optimum() -> None:
    """Against the true optimum of the cost model, by integer programming: 1.14 times it on average, 1.96 at worst.

    Over 1,000 such cases (seeds 0 to 999): mean 1.13, median 1.06, 95 % below 1.54, worst 3.05, where `home` has mean
    1.89, worst 7.84. The gap is rows that a plan could keep where they lie although that unbalances the ranks.
    """
    ratios = []
    for seed in range(40):
        counts, home, costs = random_case(seed)
        best = optimum(counts, home, costs)
        ratios.append(layer_time(makespan(counts, home, costs), counts, home, costs).total / best)
    assert min(ratios) >= 1 - 1e-6
    assert np.mean(ratios) <= 1.2
    assert max(ratios) <= 2.2


def test_compiled_code_reads_every_cost_by_its_name() -> None:
    costs = Costs(1, 2, 3, 4, 5, 6, 7, Link(8, 9), Link(10, 11), overlap=0.5, handling=13, lends=14)
    named = name_figures(costs.vector())
    for name in ("row_forward", "row_backward", "segment_forward", "segment_backward", "row_bytes", "weight_bytes"):
        assert getattr(named, name) == getattr(costs, name)
    assert (named.gradient_bytes, named.overlap, named.handling, named.lends) == (7, 0.5, 13, 14)
    assert (named.inside_latency, named.inside_bandwidth) == (8, 9)
    assert (named.between_latency, named.between_bandwidth) == (10, 11)
