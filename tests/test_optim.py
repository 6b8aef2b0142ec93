"""AdamW with bf16 moments, random rounding; where its moments lie."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain import config, train
from moetrain.config import Optim
from moetrain.mesh import Mesh
from moetrain.optim import AdamW, mapped, rounded_at_random


def test_rounding_at_random_is_right_on_average() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(30), torch.randn(30) * 1e-20, torch.tensor([0.0, 1.0, -1.5, 3e38])])
    drawn = torch.stack([rounded_at_random(values.clone(), seed).double() for seed in range(4000)])
    bits = values.view(torch.int32) & -(1 << 16)
    toward_zero = bits.view(torch.float32).double()
    away = (bits + (1 << 16)).view(torch.float32).double()
    assert ((drawn == toward_zero) | (drawn == away)).all()
    gap = (away - toward_zero).abs()
    assert (
        (drawn.mean(0) - values.double()).abs() <= 0.04 * gap
    ).all()  # five standard deviations: 0.5 / sqrt(4000) · 5
    exact = values.double() == toward_zero
    assert exact.sum() >= 3
    assert (drawn[:, exact] == values.double()[exact]).all()
    assert torch.equal(rounded_at_random(values.clone(), 7), rounded_at_random(values.clone(), 7))


def optimizer(state_dtype: str, folder: Path | None = None, beta2: float = 0.95) -> tuple[AdamW, list[torch.Tensor]]:
    options = Optim(
        **{**config.load([]).optim.model_dump(), "state_dtype": state_dtype, "betas": (0.9, beta2), "eps": 1e-8}
    )
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((40, 30), (7,), (0, 5))]
    return AdamW([{"params": list(parameters), "weight_decay": 0.1}], options, folder), parameters


def steps(made: tuple[AdamW, list[torch.Tensor]], number: int) -> list[torch.Tensor]:
    ours, parameters = made
    generator = torch.Generator().manual_seed(1)
    for _ in range(number):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        ours.step()
    return [parameter.detach() for parameter in parameters]


def test_moments_in_files_are_the_same_bit_for_bit(tmp_path: Path) -> None:
    for state_dtype in ("fp32", "bf16"):
        for ours, theirs in zip(
            steps(optimizer(state_dtype, tmp_path), 20), steps(optimizer(state_dtype), 20), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert not list(tmp_path.iterdir())
    assert mapped(tmp_path, torch.Size([3, 4]), torch.float32).equal(torch.zeros(3, 4))


@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_bf16_moments_follow_fp32_ones(beta2: float) -> None:
    """A slow second moment too, where rounding to nearest would stand still long before it has arrived."""
    wide, narrow = optimizer("fp32", beta2=beta2), optimizer("bf16", beta2=beta2)
    steps(wide, 400)
    steps(narrow, 400)
    (expected, found) = (made[0].state_of(made[1][0])["exp_avg_sq"].float() for made in (wide, narrow))
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=0.01)
    assert ((found - expected).abs() / expected).mean() < 0.05


def losses(mesh: Mesh, overrides: list[str]) -> list[float]:
    folder = train.train(config.load(overrides), mesh)
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/lm_loss"] for row in rows if "train/lm_loss" in row]


def test_the_loss_with_bf16_moments_is_that_with_fp32_ones(pool, tiny) -> None:
    """On average: a text learned by heart makes single late steps jump by more, either way."""
    more = [*tiny, "train.steps=30", "optim.warmup=5"]
    wide, narrow = (
        pool.run(losses, 2, [*more, f"optim.state_dtype={d}", f"run.name={d}"])[0] for d in ("fp32", "bf16")
    )
    assert narrow[-1] < 0.8 * narrow[0]
    assert narrow[:15] == pytest.approx(wide[:15], rel=0.01)
    assert sum(narrow) == pytest.approx(sum(wide), rel=0.02)
    assert narrow != wide
