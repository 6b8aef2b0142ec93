"""Plans and planners: the paper's worked examples, and what holds for every input."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import cli
from moetrain.bench import plan as bench
from moetrain.moe.planning import PLANNERS, default_home
from moetrain.moe.planning.cost import Limits, State
from moetrain.moe.planning.eplb import place
from moetrain.moe.planning.plan import imbalance

OPTIONS = {"llep": {"min_rows": 4, "threshold": 1.0}}


def spread(loads: list[int], num_ranks: int) -> np.ndarray:
    """[R, E] counts with these totals, spread unevenly over sources."""
    counts = np.zeros((num_ranks, len(loads)), np.int64)
    for expert, load in enumerate(loads):
        for row in range(load):
            counts[(row * (expert + 3)) % num_ranks, expert] += 1
    return counts


def chunks(plan, expert: int) -> list[tuple[int, int, int]]:
    """(rank, begin, end) of an expert's chunks."""
    begin, out = 0, []
    for e, rank, rows in zip(plan.expert, plan.rank, plan.num_rows, strict=True):
        if e == expert:
            out.append((int(rank), begin, begin + int(rows)))
            begin += int(rows)
    return out


@pytest.mark.parametrize("min_rows", [1, 8])
def test_llep_follows_the_papers_worked_examples(min_rows: int) -> None:
    plan = PLANNERS["llep"](
        spread([40, 4, 4, 4, 4, 4, 2, 2], 4), default_home(8, 4), None, alpha=1.0, min_rows=min_rows
    )
    assert chunks(plan, 0) == [(0, 0, 12), (3, 12, 24), (1, 24, 32), (2, 32, 40)]
    assert plan.loads().tolist() == [16, 16, 16, 16]
    assert len(plan.guests()) == 3
    plan = PLANNERS["llep"](
        spread([60, 1, 1, 1, 0, 1, 0, 0], 4), default_home(8, 4), None, alpha=1.0, min_rows=min_rows
    )
    assert chunks(plan, 0) == [(0, 0, 15), (3, 15, 31), (2, 31, 46), (1, 46, 60)]


def paper_loads(share: float, hot: int, tokens: int = 32768, experts: int = 128, top_k: int = 4) -> np.ndarray:
    """The paper's scenario on 8 ranks: `share` of the selections into `hot` experts, the rest even."""
    rows = tokens * top_k
    load = np.full(experts, (1 - share) * rows / (experts - hot))
    load[:hot] = share * rows / hot
    counts = np.tile(np.floor(load).astype(np.int64), (8, 1))
    counts[:, -1] += rows - counts.sum(1)
    return counts


def test_llep_balances_the_papers_scenarios() -> None:
    home = default_home(128, 8)
    for hot, at_home, transfers in ((16, 7.60, 20), (4, 7.64, 10), (1, 7.65, 7)):
        counts = paper_loads(0.95, hot)
        plan = PLANNERS["llep"](counts, home, None)
        assert imbalance(plan.home_loads()) == pytest.approx(at_home, abs=0.02)
        assert imbalance(plan.loads()) == pytest.approx(1.0, abs=0.001)
        assert abs(len(plan.guests()) - transfers) <= 2


def test_llep_guards_device_loads() -> None:
    """λ switches between 1.7 and 2.0 at 15 % of the rows into four experts, as in the paper's Fig. 7a."""
    counts, home = paper_loads(0.15, 4), default_home(128, 8)
    ratio = imbalance(PLANNERS["home"](counts, home, None).loads())
    assert 1.7 < ratio < 2.0
    assert PLANNERS["llep"](counts, home, None, threshold=1.7).guests()
    assert not PLANNERS["llep"](counts, home, None, threshold=2.0).guests()


counts_strategy = st.integers(1, 6).flatmap(
    lambda ranks: st.integers(1, 3).flatmap(
        lambda per_rank: st.lists(
            st.lists(st.sampled_from([0, 0, 1, 3, 17, 200]), min_size=ranks * per_rank, max_size=ranks * per_rank),
            min_size=ranks,
            max_size=ranks,
        )
    )
)


@pytest.mark.parametrize("name", list(PLANNERS))
@given(rows=counts_strategy)
@settings(max_examples=60, deadline=None)
def test_every_plan_conserves_rows(name: str, rows: list[list[int]]) -> None:
    counts = np.array(rows, np.int64)
    num_ranks, num_experts = counts.shape
    home = default_home(num_experts, num_ranks)
    plan = PLANNERS[name](counts, home, None, **OPTIONS.get(name, {}))
    sent = np.stack([plan.rows(source) for source in range(num_ranks)])  # [source, E, R]
    assert (sent >= 0).all()
    assert (sent.sum(2) == counts).all()
    assert (sent.sum((0, 1)) == plan.loads()).all()
    for rank in range(num_ranks):
        assert (plan.received(rank) == sent[:, :, rank]).all()
        slots = plan.slots(rank)
        assert len(slots) == len(set(slots))
        assert set(np.flatnonzero(sent[:, :, rank].sum(0))) <= set(slots)
    away = {(e, int(home[e]), r) for e, r in zip(plan.expert.tolist(), plan.rank.tolist(), strict=True) if r != home[e]}
    assert plan.guests() == sorted(away)
    assert imbalance(plan.loads()) <= imbalance(plan.home_loads()) + 1e-9


@pytest.mark.parametrize("name", list(PLANNERS))
def test_balanced_rows_stay_at_home(name: str) -> None:
    plan = PLANNERS[name](np.full((4, 8), 5), default_home(8, 4), None)
    assert not plan.guests()
    assert plan.moved() == 0


@pytest.mark.parametrize("name", list(PLANNERS))
def test_no_rows_at_all(name: str) -> None:
    plan = PLANNERS[name](np.zeros((2, 4), np.int64), default_home(4, 2), None)
    assert plan.loads().tolist() == [0, 0]
    assert not plan.guests()


def test_eplb_copies_what_was_hot() -> None:
    """Two ranks, two experts each, a slot each; past loads 60, 10, 20, 10. Expert 0 is copied first; 30 per copy would
    still be the most, but every rank has it: so expert 2."""
    counts, home = np.array([[5, 1, 0, 0], [6, 0, 3, 2]]), default_home(4, 2)
    state = State(past=np.array([60.0, 10.0, 20.0, 10.0]))
    plan = PLANNERS["eplb"](counts, home, None, None, state)
    assert plan.guests() == [(0, 0, 1), (2, 1, 0)]
    assert chunks(plan, 0) == [(0, 0, 6), (1, 6, 11)]  # 11 rows, the odd one at home
    assert chunks(plan, 2) == [(1, 0, 2), (0, 2, 3)]
    assert plan.rows(0)[0].tolist() == [5, 0]  # local first
    assert not PLANNERS["eplb"](counts, home, None, Limits(guests=0), state).guests()
    assert not PLANNERS["eplb"](counts, home, None, None, State()).guests()


@given(
    past=st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0, 300.0]), min_size=12, max_size=12), replicas=st.integers(0, 5)
)
@settings(max_examples=60)
def test_eplb_fills_slots_with_distinct_experts(past: list[float], replicas: int) -> None:
    home = default_home(12, 4)
    holders = place(np.array(past), home, 4, replicas)
    assert [ranks[0] for ranks in holders] == home.tolist()
    assert all(len(ranks) == len(set(ranks)) for ranks in holders)
    guests = [q for ranks in holders for q in ranks[1:]]
    assert all(guests.count(q) <= replicas for q in range(4))
    assert all(len(ranks) == 1 for ranks, load in zip(holders, past, strict=True) if load == 0)


def test_bench_plan_measures_every_planner(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "SIZES", ((2, 8),))
    assert cli.main(["bench", "plan", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {r["planner"] for r in records} == set(PLANNERS)
    assert len({r["scenario"] for r in records}) == len(records) / len(PLANNERS) >= 15
    for r in records:
        assert r["plan_us"] > 0
        assert r["imbalance"] >= 1
        assert r["ratio_to_best"] >= 1
    assert cli.main(["bench", "plan"]) == 0
    assert "one hot expert a rank" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "plan", "train.steps=3"])
    assert stop.value.code == 2


def test_options_are_the_keyword_arguments() -> None:
    """What the configuration's checks know without loading compiled code is what the planners take."""
    for name, planner in PLANNERS.items():
        parameters = inspect.signature(planner).parameters.values()
        assert set(PLANNERS.options(name).names()) == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_planning_loads_no_torch() -> None:
    """A planner runs where torch is not installed: in a simulator, or behind another trainer."""
    code = "import sys, moetrain.moe.planning as p; p.default_costs(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
