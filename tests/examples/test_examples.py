"""Every example runs as its first lines say, and comes to what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(name: str, ranks: int = 0) -> str:
    """What the example prints; on so many ranks, or in one process alone."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]


def test_a_plain_loop_lends() -> None:
    text = run("plain_loop.py", 2)
    assert len(losses(text)) == 5
    for before, after in re.findall(r"rank ([\d.]+) -> ([\d.]+)", text)[1:]:
        assert float(before) > 1.9
        assert float(after) < 1.5


@pytest.mark.parametrize("name", ["ddp.py", "fsdp2.py"])
def test_the_loss_falls_beside(name: str) -> None:
    text = run(name, 2)
    found = losses(text)
    assert len(found) == 8
    assert found[-1] < found[0]
    assert name == "ddp.py" or "6 whole tensors" in text or "7 whole tensors" in text


def test_digits_are_recognized() -> None:
    text = run("digits.py")
    assert float(re.findall(r"digits: ([\d.]+)", text)[0]) > 0.9
    assert text.count("share of each expert") == 10


def test_each_example_is_run() -> None:
    """Here; those of transformers in tests/hf."""
    assert {path.name for path in EXAMPLES.glob("*.py") if not path.name.startswith("hf_")} == {
        "plain_loop.py",
        "ddp.py",
        "fsdp2.py",
        "digits.py",
    }
