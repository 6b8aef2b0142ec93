"""From experiments to a table: the scripts on tiny runs, every one of them trained."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moetrain import config
from moetrain.data.opening import open_data
from moetrain.distributed.mesh import Mesh
from moetrain.training.loop import train
from tests.grid import sample

ROOT = Path(__file__).parents[2]


def curve(mesh: Mesh, overrides: list[str]) -> list[float]:
    folder = train(config.load(overrides), mesh)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/lm_loss"] for row in rows if "train/lm_loss" in row]


EXPERIMENTS = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("router_*.yaml"))


@pytest.mark.parametrize("name", sample(EXPERIMENTS, every=4))
def test_every_router_experiment_trains(pool, tiny, name: str) -> None:
    """With its own router and experts, on a small model: the loss falls, on both ranks alike."""
    small = [*tiny, "train.global_batch=16", "train.steps=12", "optim.warmup=2"]
    first, second = pool.run(curve, 2, [f"experiment={name}", *small, "run.name=short"], ep=2)
    assert first == second
    assert len(first) == 12
    assert max(first[-3:]) < first[0] - 0.5


def script(name: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / name), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=env)


@pytest.fixture(scope="module")
def runs(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """scope_micro with one seed and scope_global with two, and the words that made them."""
    folder = tmp_path_factory.mktemp("experiments")
    small = ["model=tiny", "train.steps=4", "train.seq_len=32", "train.global_batch=16", "train.threads=1", *data]
    small += ["train.dtype=fp32", "eval.tokens_per_domain=256", "generate.tokens=2", "optim.warmup=1"]
    words = ["--dir", str(folder), *small]
    first = script("run_experiments.py", "scope_micro", "scope_global", "--seeds", "0", *words)
    assert first.returncode == 0, first.stdout + first.stderr
    more = script("run_experiments.py", "scope_global", "--seeds", "0,1", *words)
    assert more.returncode == 0, more.stdout + more.stderr
    assert "2 runs, 1 of them finished before" in more.stdout
    assert "[1/1] scope_global, seed 1: done in" in more.stdout
    return folder, words


def test_runs_become_a_table_and_a_picture(runs: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = runs
    names = ["scope_micro-s0", "scope_global-s0", "scope_global-s1"]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(names)
    done = script("tabulate_runs.py", *(str(folder / name) for name in names), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    micro, wide = json.loads((tmp_path / "table.json").read_text())
    assert (micro["name"], micro["seeds"], wide["name"], wide["seeds"]) == ("scope_micro", [0], "scope_global", [0, 1])
    summaries = [json.loads((folder / name / "summary.json").read_text()) for name in names]
    scores = [summary["bits_per_byte"]["all"] for summary in summaries]
    assert wide["bits_per_byte"]["values"] == pytest.approx(scores[1:])
    assert wide["bits_per_byte"]["mean"] == pytest.approx(sum(scores[1:]) / 2)
    assert wide["bits_per_byte"]["half_range"] == pytest.approx(abs(scores[1] - scores[2]) / 2)
    assert wide["against_first"]["values"] == pytest.approx([scores[1] - scores[0]])  # the seed that both have
    assert wide["domain/greek"]["values"] == pytest.approx([s["bits_per_byte"]["greek"] for s in summaries[1:]])
    rows = [json.loads(line) for line in (folder / names[0] / "metrics.jsonl").read_text().splitlines()]
    late = [row["balance/imbalance_home"] for row in rows if "train/loss" in row][2:]
    assert micro["imbalance_home"]["mean"] == pytest.approx(sum(late) / len(late))
    information = [v for k, v in rows[-1].items() if k.startswith("specialise/")]
    assert micro["domain_mi"]["mean"] == pytest.approx(sum(information) / len(information))
    text = (tmp_path / "table.md").read_text()
    assert re.search(rf"\| scope_micro \| 1 \| {scores[0]:.4f} \|  \|", text)
    assert re.search(r"\| scope_global \| 2 \| \d\.\d{4} ± \d\.\d{4} \| [+-]\d\.\d{4} \|", text)
    assert re.search(r"\| numbers \| \d\.\d{3} \| \d\.\d{3} ± ", text)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_micro_batch_of_the_scope_experiments_has_one_domain(runs: tuple[Path, list[str]]) -> None:
    """Two ranks in two micro-steps of a block each: the tokens of a step are a multiple of a block's."""
    folder, _ = runs
    settings = config.load_resolved(folder / "scope_micro-s0" / "config.yaml")
    _, loader = open_data(settings)
    for begin in range(0, 64, 4):
        assert len(np.unique(loader.samples(begin, begin + 4).domain)) == 1


def test_what_does_not_belong_together_is_refused(runs: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, words = runs
    failed = script("run_experiments.py", "scope_micro", "--seeds", "7", *words, "train.stepz=1")
    assert failed.returncode == 1
    assert "scope_micro, seed 7: FAILED, see" in failed.stdout
    assert "did you mean train.steps" in (folder / "scope_micro-s7.log").read_text()
    odd = tmp_path / "scope_micro-s1"
    odd.mkdir()
    for name in ("config.yaml", "summary.json", "metrics.jsonl"):
        (odd / name).write_text((folder / "scope_global-s1" / name).read_text())
    mixed = script("tabulate_runs.py", str(folder / "scope_micro-s0"), str(odd), "--out", str(tmp_path / "out"))
    assert mixed.returncode == 2
    assert "differs from other runs of scope_micro in more than its seed" in mixed.stderr
    nothing = script("tabulate_runs.py", str(tmp_path), "--out", str(tmp_path / "out"))
    assert (nothing.returncode, nothing.stderr.splitlines()[-1]) == (2, "error: none of these is a finished run")
    assert not (tmp_path / "out").exists()
