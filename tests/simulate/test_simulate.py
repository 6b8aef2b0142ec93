"""`moetrain simulate` as a user calls it, and what it loads."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetrain.cli import main
from moetrain.moe.planning import default_costs
from tests import made_run

SMALL = ["model=qwen3_30b_a3b", "cluster=h100x64"]


def simulate(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict]:
    assert main(["simulate", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["simulate", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_planners_side_by_side(capsys, tmp_path: Path) -> None:
    assert main(["simulate", *SMALL, "--compare", "home,llep,makespan,eplb", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for word in ("64 × H100 SXM5 80 GB", "makespan", "dispatch", "tokens/s a device", "% of balanced", "moments"):
        assert word in shown
    records = json.loads((tmp_path / "simulate.json").read_text())
    assert [r["planner"] for r in records] == ["home", "llep", "makespan", "eplb"]
    assert (tmp_path / "simulate.png").stat().st_size > 10_000
    seconds = {r["planner"]: r["step_seconds"] for r in records}
    assert seconds["makespan"] == min(seconds.values())
    for record in records:
        assert sum(record["parts_seconds"].values()) == pytest.approx(record["step_seconds"])
        assert sum(record["memory_bytes"].values()) == pytest.approx(record["memory_total_bytes"])
        assert record["percent_of_balanced"] <= 101


def test_sixteen_thousand_devices_take_seconds(capsys) -> None:
    began = time.perf_counter()
    words = [
        "model=hf",
        "model.path=deepseek-v3",
        "cluster=gb200_nvl72x16384",
        "parallel.ep=64",
        "parallel.dp_replicate=64",
    ]
    (found,) = simulate(capsys, *words, "train.recompute=full")
    assert time.perf_counter() - began < 60
    assert found["world"] == 16384
    assert 0 < found["mfu"] < 0.6
    assert found["sampling_error_seconds"] > 0


def test_a_sweep_shows_the_fastest_that_fit(capsys) -> None:
    words = ["model=hf", "model.path=qwen3-30b-a3b", "cluster=h100x16", "train.global_batch=64", "routing=balanced"]
    found = simulate(capsys, *words, "--sweep")
    assert 0 < len(found) <= 10
    assert all(r["fits"] for r in found)
    assert [r["step_seconds"] for r in found] == sorted(r["step_seconds"] for r in found)
    assert main(["simulate", *words, "--sweep"]) == 0
    assert "out of memory, most of it activations" in capsys.readouterr().out
    (best,) = simulate(capsys, *words, "parallel.layout=auto", "--samples", "2")
    assert (best["ep"], best["recompute"]) == (found[0]["ep"], found[0]["recompute"])
    assert best["step_seconds"] == pytest.approx(found[0]["step_seconds"])
    tight = refused(capsys, *words, "parallel.layout=auto", "cluster.memory.capacity=8e9")
    assert "no layout fits into the devices' memory" in tight
    assert "parallel.layout=any: must be auto or fixed" in refused(capsys, *words, "parallel.layout=any")


def test_mistakes_are_told_in_one_line(capsys) -> None:
    assert refused(capsys, "cluster=h1000x8").startswith("error: cluster=h1000x8: must be NAMExDEVICES")
    assert "routing=W9: must be the folder of a run" in refused(capsys, *SMALL, "routing=W9")
    assert "parallel.ep=7: must divide" in refused(capsys, *SMALL, "parallel.ep=7")
    assert "model.path: goes with model=hf" in refused(capsys, "model.path=deepseek-v3")
    assert "stack=x: must be one of" in refused(capsys, *SMALL, "stack=x")
    assert "optim.lr: `moetrain simulate` does not use it" in refused(capsys, *SMALL, "optim.lr=1e-3")
    assert "--compare" in refused(capsys, *SMALL, "--sweep", "--compare", "home")
    assert "planner=best: must be one of" in refused(capsys, *SMALL, "--compare", "best")
    assert "routing.agreement=0: must be a number above 0" in refused(capsys, *SMALL, "routing.agreement=0")
    assert "train.dtype=fp8: a100 has peaks for" in refused(capsys, "cluster=a100x8", "train.dtype=fp8")


def test_a_runs_trace_stands_for_its_routing(capsys, tmp_path: Path) -> None:
    run = made_run.write(tmp_path / "run")
    words = ["model=tiny", "cluster=herex2", "parallel.ep=2", f"routing={run}"]
    home, planned = simulate(capsys, *words, "--compare", "home,makespan")
    assert home["routing"] == str(run)
    assert home["imbalance_planned"] > 1.1 > planned["imbalance_planned"]
    (other,) = simulate(capsys, "model=tiny", "cluster=herex4", "parallel.ep=4", f"routing={run}")
    assert other["routing"] == f"natural, fit to {run}"


def test_a_prediction_loads_no_torch() -> None:
    words = [*SMALL, "--json"]
    ask = f"from moetrain.cli import main; import sys; main(['simulate', *{words!r}]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_measured_costs_take_the_place_of_nominal_figures(capsys, tmp_path: Path) -> None:
    costs = default_costs()
    tree = {"ranks": "2 on cpu, ep 2", **dataclasses.asdict(costs), "weight_bytes": 4 * 3 * 64 * 64, "nodes": [0, 0]}
    (tmp_path / "costs.json").write_text(json.dumps(tree))
    words = [
        "model=tiny",
        "cluster=herex2",
        "parallel.ep=2",
        "train.dtype=fp32",
        "train.seq_len=128",
        "routing=balanced",
    ]
    (found,) = simulate(capsys, *words, f"cluster.costs={tmp_path}/costs.json")
    rows, segments = 128 * 2, 4
    layer = rows * (costs.row_forward + costs.row_backward)
    layer += segments * (costs.segment_forward + costs.segment_backward)
    assert found["parts_seconds"]["experts"] == pytest.approx(2 * layer)
    assert "must be the costs.json of a run" in refused(capsys, *words, f"cluster.costs={tmp_path}/none.json")
    refusal = refused(capsys, *words, "model.expert_hidden=128", f"cluster.costs={tmp_path}/costs.json")
    assert "is of experts of 49,152 bytes, the model's have 24,576 weights" in refusal
