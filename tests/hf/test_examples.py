"""Other people's training loops, on two ranks: norms and saved files are those of one process."""

import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moetrain import hf
from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import ExpertGroup
from moetrain.hf.trainer import ExpertParallelCallback
from tests.grid import on_grid
from tests.hf.families import build
from tests.pool import Pool

ROOT = Path(__file__).parents[2]
LIMIT = 1e-5


def run_script(script: str, arguments: list[str], rank: int, ranks: int, port: int, log: str) -> None:
    """Run an example in this process as torchrun would, on one of its ranks."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = [script, *arguments]
    with Path(log).open("w") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            runpy.run_path(script, run_name="__main__")
        except BaseException:
            traceback.print_exc()
            raise


def train(script: str, folder: Path, ranks: int, *more: str) -> list[float]:
    """Run an example on so many ranks; returns the norms that it prints. The pool's server has torch and transformers
    loaded, which takes longer than the example."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    logs = [folder / f"log-{rank}.txt" for rank in range(ranks)]
    arguments = (str(ROOT / "examples" / script), [str(folder), *more])
    context = multiprocessing.get_context("forkserver")
    processes: list[Any] = [
        context.Process(target=run_script, args=(*arguments, rank, ranks, port, str(log)))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * ranks, "\n".join(log.read_text()[-3000:] for log in logs)
    words = " ".join(line for line in logs[0].read_text().splitlines() if line.startswith("norm")).split()
    return [float(word) for word in words if word not in ("norm", "norms")]


def compare_saved(one: Path, other: Path) -> None:
    """All experts are in both files, with the same values."""
    alone, spread = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert alone.keys() == spread.keys()
    for key, value in alone.items():
        torch.testing.assert_close(spread[key], value, rtol=0, atol=LIMIT * float(value.abs().max()), msg=key)


@pytest.mark.parametrize(
    ("script", "saved"),
    [("hf_sft.py", "last"), ("hf_replay.py", "last"), on_grid(("hf_ddp.py", ".")), on_grid(("hf_accelerate.py", "."))],
)
def test_two_ranks_train_as_one(pool: Pool, tmp_path: Path, script: str, saved: str) -> None:
    norms = [train(script, tmp_path / str(ranks), ranks) for ranks in (1, 2)]
    assert norms[0] == pytest.approx(norms[1], rel=LIMIT)
    assert len(norms[0]) == 4
    assert max(norms[0]) > 0.5  # so that clipping has an effect
    compare_saved(tmp_path / "1" / saved, tmp_path / "2" / saved)


@pytest.mark.parametrize(("before", "after"), [(1, 2), on_grid((2, 1)), on_grid((2, 2))])
def test_a_trainer_goes_on_from_its_checkpoint(pool: Pool, tmp_path: Path, before: int, after: int) -> None:
    """On another number of ranks, with the momentum of all experts."""
    norms = train("hf_trainer.py", tmp_path / "whole", before)
    again = train("hf_trainer.py", tmp_path / "again", after, str(tmp_path / "whole" / "checkpoint-2"))
    assert len(norms) == 4
    assert again == pytest.approx(norms[2:], rel=LIMIT)
    for name in ("last", "checkpoint-4"):
        compare_saved(tmp_path / "whole" / name, tmp_path / "again" / name)


def arguments_of(**fields: Any) -> Any:
    return SimpleNamespace(**{"fsdp": None, "deepspeed": None, "load_best_model_at_end": False, **fields})


def test_what_a_trainer_must_not_do_is_refused(tmp_path: Path) -> None:
    callback, state = ExpertParallelCallback(None), SimpleNamespace(global_step=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"deepspeed=zero\.json: would shard experts that are spread over ranks"):
        callback.on_init_end(arguments_of(deepspeed="zero.json"), state, None)
    with pytest.raises(ConfigError, match="load_best_model_at_end: needs a Trainer with ExpertParallelMixin"):
        callback.on_train_begin(arguments_of(load_best_model_at_end=True), state, None)
    with pytest.raises(ConfigError, match="resume_from_checkpoint: a checkpoint by ExpertParallelCallback"):
        callback.on_train_begin(arguments_of(), SimpleNamespace(global_step=2), None)


def test_an_optimizer_with_other_rows_is_refused() -> None:
    model = build("qwen3_moe")
    handle = hf.expert_parallel(model, ExpertGroup.alone())
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    experts = handle.experts[0].parameters()[0]
    optimizer.state[experts] = {"absmax": torch.zeros(3)}
    with pytest.raises(ConfigError, match=r"optimizer: SGD keeps absmax \(3,\) for 8 experts, not a row each"):
        handle.full_optimizer_state(optimizer)
    optimizer.state[experts] = {"momentum_buffer": torch.zeros_like(experts)}
    state = handle.full_optimizer_state(optimizer)
    assert state is not None
    for each in state["state"].values():
        each["momentum_buffer"] = each["momentum_buffer"][:4]
    with pytest.raises(ConfigError, match="optimizer: momentum_buffer has 4 of 8 experts"):
        handle.load_full_optimizer_state(optimizer, state)
    state["param_groups"][0]["params"].pop()
    with pytest.raises(ConfigError, match="optimizer: its state is that of another number of parameters"):
        handle.load_full_optimizer_state(optimizer, state)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    handle = hf.expert_parallel(build("qwen3_moe"), ExpertGroup.alone())
    build("qwen3_moe", moe_intermediate_size=48).save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"gate_up_proj is \(8, 96, 64\), must be \(8, 64, 64\)"):
        handle.load_pretrained(tmp_path)
