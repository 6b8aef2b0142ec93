"""Sweeps: several runs from one command, each with workers of its own; every mistake before the first of them."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moetrain import cli
from moetrain.launch.exits import REQUEUE
from tests.training.test_train import rows_of


def test_runs_at_once_are_named_kept_and_compared(tiny: list[str], tmp_path: Path) -> None:
    """Through Hydra's joblib launcher, two processes at a time; once more, and nothing is trained again."""
    overrides = [*tiny, "train.steps=2", "parallel.nproc=1", "train.threads=1", "run.name=swept"]
    overrides += ["track.wandb=true"]
    command = [sys.executable, "-m", "moetrain", "train", "--multirun", *overrides, "planner=home,llep"]
    command += ["optim.betas=[0.8,0.9]", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    swept = tmp_path / "swept"
    assert sorted(p.name for p in swept.iterdir()) == ["0-planner-home", "1-planner-llep", "multirun.yaml"]
    lines = done.stdout.splitlines()
    for number, planner in enumerate(("home", "llep")):
        name = f"{number}-planner-{planner}"
        text = (swept / name / "config.yaml").read_text()
        assert f"name: {planner}" in text
        assert re.search(r"betas:\n *- 0.8\n *- 0.9\n", text)
        (tracked,) = (swept / name / "wandb").glob("offline-run-*/*.wandb")
        assert b"\x05swept" in tracked.read_bytes()  # its group, in wandb's records
        bits = json.loads((swept / name / "summary.json").read_text())["bits_per_byte"]["all"]
        assert any(line.split()[:2] == [name, f"{bits:.3f}"] for line in lines)
    assert lines[-1] == f"compare them: moetrain report {swept}/[0-9]*/"


def test_a_sweep_that_is_asked_to_end_saves_the_run_in_progress(tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, "parallel.nproc=1", "train.threads=1", "run.name=swept", "train.steps=30000,40000"]
    command = [sys.executable, "-m", "moetrain", "train", "--multirun", *overrides]
    first, second = (tmp_path / "swept" / f"{n}-train.steps-{steps}" for n, steps in ((0, 30000), (1, 40000)))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 100
        while not (first / "metrics.jsonl").is_file() or len(rows_of(str(first))) < 2:
            assert time.monotonic() < until
            time.sleep(0.1)
        process.terminate()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == REQUEUE
    assert list((first / "checkpoints").glob("step_*"))
    assert not second.exists()
    assert f"not complete: {first.name}, {second.name}" in " ".join(said.split())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["planner=home"], "--multirun: no field has several values (planner=home,llep)"),
        (["planner=home,lep"], "planner=lep: must be one of auto, eplb, home, llep, makespan, static"),
        (["train.steps=1,0"], "train.steps=0: must be greater than 0"),
        (["train.steps=1,,"], "train.steps=1,,: not an override as Hydra reads it (field=value, field=a,b,c)"),
        (["train.global_batch=8,9", "parallel.nproc=2"], "train.global_batch=9: must be a multiple of 2 ranks"),
        (["optim.lr=interval(0,1)"], "--multirun: BasicSweeper does not support sweep type : INTERVAL_SWEEP"),
        (["experiment=glob(router_top*)", "train.steps=1,0"], "train.steps=0: must be greater than 0"),
        (["run.name=a,b"], "run.name=a,b: a sweep has one name, its runs are named by what differs"),
        (["planner=home,llep", "--json"], "--multirun: cannot be combined with --resolved, --dry-run or --json"),
    ],
)
def test_mistakes_come_before_any_run(
    words: list[str], line: str, tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert cli.main(["train", "-m", *tiny, *words]) == 2
    assert capfd.readouterr() == ("", f"error: {line}\n")
    assert not list(tmp_path.iterdir())
