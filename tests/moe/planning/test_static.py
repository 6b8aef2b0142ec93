"""`static`: even loads with few guests for any counts, the same on the device; `auto`: the better of two plans."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import MoE, config
from moetrain.common.errors import ConfigError
from moetrain.moe.exchange import static_plan
from moetrain.moe.planning import PLANNERS, default_costs, default_home, layer_time
from moetrain.moe.planning.cost import Limits
from moetrain.moe.planning.static import share_rows
from tests.moe.planning.test_plan import paper_loads


@st.composite
def counted_rows(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Counts [R, E] and home [E], the default one or any other."""
    ranks = draw(st.integers(1, 7))
    experts = draw(st.integers(1, 4 * ranks))
    rows = st.sampled_from([0, 0, 1, 3, 17, 200])
    counts = draw(st.lists(st.lists(rows, min_size=experts, max_size=experts), min_size=ranks, max_size=ranks))
    anywhere = draw(st.lists(st.integers(0, ranks - 1), min_size=experts, max_size=experts))
    home = draw(st.sampled_from([default_home(experts, ranks), np.array(anywhere)]))
    return np.array(counts, np.int64), home


@given(counted=counted_rows())
@settings(max_examples=300)
def test_loads_are_even_with_few_guests(counted: tuple[np.ndarray, np.ndarray]) -> None:
    """Rows are conserved, no rank has more than one row more than another, none more guests than one rank's experts."""
    counts, home = counted
    num_ranks = len(counts)
    rows_ER = share_rows(counts, home)
    assert (rows_ER >= 0).all()
    assert (rows_ER.sum(1) == counts.sum(0)).all()
    assert np.ptp(rows_ER.sum(0)) <= 1
    guests_R = ((rows_ER > 0) & (home[:, None] != np.arange(num_ranks))).sum(0)
    assert guests_R.max() <= np.bincount(home).max()


@given(counted=counted_rows())
@settings(max_examples=300)
def test_the_device_plans_the_same(counted: tuple[np.ndarray, np.ndarray]) -> None:
    """Bit for bit: the rows of each rank, and what every source sends where."""
    counts, home = counted
    plan, counts_RE = PLANNERS["static"](counts, home), torch.from_numpy(counts)
    rows_ER = static_plan.share_rows(counts_RE, torch.from_numpy(home))
    assert (rows_ER.T.numpy() == plan.placed()).all()
    sent = static_plan.split_sources(counts_RE, rows_ER).numpy()
    assert all((sent[source] == plan.rows(source)).all() for source in range(len(counts)))


def test_a_giver_that_gave_too_much_receives_from_the_next() -> None:
    """Loads 8, 8, 8, 0 of one expert each, shares of 6: rank 3 gets all it lacks of rank 0, which gets 4 of rank 1,
    which gets 2 of rank 2: one guest each, where each rank's own surplus would make three on rank 3."""
    rows_ER = share_rows(np.diag([8, 8, 8, 0]), np.arange(4))
    assert rows_ER.tolist() == [[2, 0, 0, 6], [4, 4, 0, 0], [0, 2, 6, 0], [0, 0, 0, 0]]


@given(counted=counted_rows())
@settings(max_examples=60)
def test_auto_is_never_slower_than_either(counted: tuple[np.ndarray, np.ndarray]) -> None:
    counts, home = counted

    def seconds(name: str) -> float:
        return layer_time(PLANNERS[name](counts, home), counts, home, default_costs()).total

    assert seconds("auto") == min(seconds("makespan"), seconds("static"))


def test_auto_keeps_within_the_limits_of_makespan() -> None:
    counts, home = paper_loads(0.95, 4), default_home(128, 8)
    counts[:, ::3] += np.arange(8)[:, None]
    unlimited = PLANNERS["static"](counts, home)
    most = max(len(unlimited.guests_on(rank)) for rank in range(8))
    found = PLANNERS["auto"](counts, home, None, Limits(guests=most - 1))
    assert max(len(found.guests_on(rank)) for rank in range(8)) <= most - 1


@pytest.mark.parametrize(
    "overrides",
    [["router.name=top_p"], ["router.name=expert_choice"], ["router.capacity_factor=1.5"], ["model.zero_experts=2"]],
    ids=str,
)
def test_static_refuses_routers_without_a_fixed_number_of_rows(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^planner\.name=static: needs a router whose number of rows is fixed: .*"):
        config.load(["model=tiny", "planner=static", *overrides])
    assert config.load(["model=tiny", "planner=auto", *overrides])


def test_a_layer_refuses_what_the_configuration_does() -> None:
    with pytest.raises(ConfigError, match=r"^planner=static: needs a router"):
        MoE(16, 16, 4, router="top_p", planner="static")
