"""The public workloads W0 to W7 in `bench layer` and `bench step`, and load traces in their place."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain import cli, config
from moetrain.bench import layer, step, workloads
from moetrain.bench.cases import LayerShape
from moetrain.bench.protocol import Grid, StepOptions
from moetrain.distributed.mesh import Mesh
from moetrain.simulate.traffic import WORKLOADS, RoutedGroup
from tests.pool import Pool

SHAPE = LayerShape(tokens=256, dim=32, hidden=32, experts=8, top_k=2, dtype="fp32")
GROUP = RoutedGroup(2, 8, 256, 2)
SOME = ["W5_zero_expert_rank", "W4_source_ragged", "W7_burst"]


@pytest.mark.parametrize("name", WORKLOADS)
def test_tokens_select_distinct_experts_with_the_workloads_counts(name: str) -> None:
    for sample in workloads.draw_steps(name, GROUP, seed=0):
        even = workloads.spread_evenly(sample.counts)
        assert even.sum() == sample.counts.sum()
        assert even.max() - even.min() <= 1
        for row in (*sample.counts, *even):
            token_N, expert_N = workloads.select_tokens(row, 2, 256, np.random.default_rng(0))
            assert (np.bincount(expert_N, minlength=8) == row).all()
            assert len(set(zip(token_N.tolist(), expert_N.tolist(), strict=True))) == len(token_N)
            assert np.bincount(token_N).max(initial=0) <= 2
            assert (np.diff(token_N) >= 0).all()


def test_counts_that_no_tokens_have_are_cut() -> None:
    fitted = workloads._fit(np.array([[300, 250, 10, 0]]), RoutedGroup(1, 4, 256, 2))
    assert fitted.sum() == 512
    assert fitted.max() <= 256


def measure_layer(mesh: Mesh) -> list[dict[str, Any]]:
    return layer.measure_grid(
        mesh, Grid([SHAPE], [], ["home", "makespan"], repeats=1, warmup=1, seed=0, workloads=SOME)
    )


def test_a_layer_is_measured_beside_its_rows_spread_evenly(pool: Pool) -> None:
    found = pool.run(measure_layer, 2)[0]
    assert [(r["scenario"], r["planner"]) for r in found] == [(s, p) for s in SOME for p in ("home", "makespan")]
    assert all(record["percent_of_balanced"] > 0 for record in found)
    home = {r["scenario"]: r["max_over_mean"] for r in found if r["planner"] == "home"}
    assert home["W5_zero_expert_rank"] == 2  # of two ranks
    assert home["W4_source_ragged"] < 1.2


def measure_step(mesh: Mesh, overrides: list[str]) -> list[dict[str, Any]]:
    options = StepOptions(["home", "makespan"], repeats=2, warmup=1, workloads=SOME[:2])
    return step.measure_variants(step.Bench.build(config.load(overrides), mesh, options), options)


def test_a_step_is_measured_with_forced_choices(pool: Pool, tiny: list[str]) -> None:
    found = pool.run(measure_step, 2, [*tiny, "train.recompute=full"])[0]
    assert [(r["routing"], r["planner"]) for r in found] == [
        (s, p) for s in SOME[:2] for p in ("home", "home", "makespan")
    ]
    ideal, hot, _ = found[:3]
    assert ideal["imbalance_home"] == pytest.approx(1, abs=0.01)
    assert hot["imbalance_home"] == pytest.approx(2)
    assert hot["repeats"] == workloads.STEPS
    assert "W5_zero_expert_rank, even | home" in step.tabulate(found).markdown()


def test_the_loads_of_a_run_take_a_workloads_place(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).multinomial(512, np.full(8, 1 / 8), size=(3, 4, 2))
    (tmp_path / "load_trace").mkdir()
    np.savez(tmp_path / "load_trace" / "part_00000.npz", counts=counts)
    for sample in workloads.draw_steps(str(tmp_path), GROUP, seed=0):
        assert abs(sample.counts.sum() - 2 * 512) <= 16


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["layer", "--workload", "W9"], "--workload W9: must be all or one of W0_balanced, W1_hot_expert_set, "),
        (["layer", "--trace", "/nowhere"], "/nowhere"),
        (["layer", "--workload", "all", "--virtual-ranks", "2"], "must not be given with --virtual-ranks"),
        (["step", "--workload", "all", "--peers"], "--peers: must not be given with --workload or --trace"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) == 2
    assert line in capsys.readouterr().err
