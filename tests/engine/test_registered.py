"""Optimizers of other packages: trained with, saved, resumed bit-exactly; refused if no checkpoint has their state."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import moetrain
from moetrain import config
from moetrain.common.extensions import OPTIMIZERS
from moetrain.common.registry import option
from moetrain.config import ConfigError
from moetrain.distributed.mesh import Mesh
from moetrain.engine.registered import make_registered
from tests.training.test_train import losses, run


@dataclass(frozen=True, kw_only=True)
class MomentumOptions(moetrain.OptimizerOptions):
    state_names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)
    momentum: float = option(0.9, "Decay of the velocity per optimizer step.", at_least=0, below=1)


def run_registered(mesh: Mesh, overrides: list[str]) -> str:
    """A run in a process that knows the optimizer for its time."""
    moetrain.register_optimizer("momentum", MomentumOptions)(torch.optim.SGD)
    try:
        return run(mesh, overrides)
    finally:
        del OPTIMIZERS["momentum"]


def test_a_run_with_another_optimizer_resumes_bit_exactly(pool: Any, tiny: list[str]) -> None:
    more = [*tiny, "optim.name=momentum", "optim.momentum=0.8", "optim.lr=0.1", "optim.warmup=1"]
    more += ["train.steps=4", "checkpoint.every=2", "train.dtype=fp32"]
    whole = pool.run(run_registered, 2, [*more, "run.name=whole"])[0]
    saved = Path(whole) / "checkpoints" / "step_2"
    names = (saved / "entries.json").read_text()
    assert "momentum_buffer/" in names
    assert "exp_avg" not in names
    part = pool.run(run_registered, 2, [*more, "run.name=part", f"checkpoint.resume={saved}"])[0]
    assert losses(part) == losses(whole)[2:]
    assert len(set(losses(whole))) == 4


@pytest.mark.parametrize(
    ("kind", "options", "rule"),
    [
        (torch.optim.NAdam, None, "its state mu_product is not among the state_names of its options"),
        (torch.optim.Adafactor, None, "its state row_var is not among the state_names of its options"),
    ],
)
def test_state_that_no_checkpoint_would_hold_is_refused(kind: Any, options: Any, rule: str) -> None:
    moetrain.register_optimizer("theirs", options)(kind)
    try:
        optim = config.load(["model=tiny", "optim.name=theirs"]).optim
        parameter = torch.nn.Parameter(torch.ones(4, 4))
        with pytest.raises(ConfigError, match=rf"^optim\.name=theirs: {rule}"):
            make_registered([{"params": [parameter], "weight_decay": 0.0}], optim, torch.device("cpu"))
    finally:
        del OPTIMIZERS["theirs"]


def test_an_optimizer_with_moments_needs_no_options() -> None:
    moetrain.register_optimizer("theirs")(torch.optim.Adam)
    try:
        optim = config.load(["model=tiny", "optim.name=theirs"]).optim
        parameter = torch.nn.Parameter(torch.ones(4, 4))
        states = make_registered([{"params": [parameter], "weight_decay": 0.0}], optim, torch.device("cpu"))
        assert states.optimizer.param_groups[0]["lr"] == optim.lr
        assert set(states.state_of(parameter)) == {"step", "exp_avg", "exp_avg_sq"}
        states.restored(7)
        parameter.grad = torch.ones_like(parameter)
        states.optimizer.step()
        assert states.state_of(parameter)["step"].item() == 8
    finally:
        del OPTIMIZERS["theirs"]
