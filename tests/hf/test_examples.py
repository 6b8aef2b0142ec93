"""Other people's training loops, on two ranks: norms and saved files are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.grid import on_grid

ROOT = Path(__file__).parents[2]
LIMIT = 1e-5


def train(script: str, folder: Path, ranks: int) -> list[float]:
    """Run an example; returns the norms that it prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script_and_folder = [str(ROOT / "examples" / script), str(folder)]
    done = subprocess.run([*command, *script_and_folder], capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    words = " ".join(line for line in done.stdout.splitlines() if line.startswith("norm")).split()
    return [float(word) for word in words if word not in ("norm", "norms")]


@pytest.mark.parametrize(
    ("script", "saved"), [("hf_trainer.py", ["last", "checkpoint-4"]), on_grid(("hf_ddp.py", ["."]))]
)
def test_two_ranks_train_as_one(tmp_path: Path, script: str, saved: list[str]) -> None:
    norms = [train(script, tmp_path / str(ranks), ranks) for ranks in (1, 2)]
    assert norms[0] == pytest.approx(norms[1], rel=LIMIT)
    assert len(norms[0]) == 4
    assert max(norms[0]) > 0.5  # so that clipping has an effect
    for name in saved:
        alone, spread = (load_file(tmp_path / str(ranks) / name / "model.safetensors") for ranks in (1, 2))
        assert alone.keys() == spread.keys()
        for key, value in alone.items():
            torch.testing.assert_close(spread[key], value, rtol=0, atol=LIMIT * float(value.abs().max()), msg=key)
