"""Sweeps: several runs from one command, each with workers of its own; every mistake before the first of them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain import cli


def test_runs_at_once_are_named_kept_and_compared(tiny: list[str], tmp_path: Path) -> None:
    """Through Hydra's joblib launcher, two processes at a time; once more, and nothing is trained again."""
    overrides = [*tiny, "train.steps=2", "parallel.nproc=1", "train.threads=1", "run.name=swept"]
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
        bits = json.loads((swept / name / "summary.json").read_text())["bits_per_byte"]["all"]
        assert any(line.split()[:2] == [name, f"{bits:.3f}"] for line in lines)
    assert lines[-1] == f"compare them: moetrain report {swept}/*/"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["planner=home"], "--multirun: no field has several values (planner=home,llep)"),
        (["planner=home,lep"], "planner=lep: must be one of eplb, home, llep, makespan"),
        (["train.steps=1,0"], "train.steps=0: must be greater than 0"),
        (["train.steps=1,,"], "train.steps=1,,: not an override as Hydra reads it (field=value, field=a,b,c)"),
        (["run.name=a,b"], "run.name=a,b: a sweep has one name, its runs are named by what differs"),
        (["planner=home,llep", "--json"], "--multirun: goes with none of --resolved, --dry-run and --json"),
    ],
)
def test_mistakes_come_before_any_run(
    words: list[str], line: str, tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert cli.main(["train", "-m", *tiny, *words]) == 2
    assert capfd.readouterr() == ("", f"error: {line}\n")
    assert not list(tmp_path.iterdir())
