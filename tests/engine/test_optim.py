"""AdamW with bf16 moments, random rounding; where its moments lie."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain import config
from moetrain.config import Optim
from moetrain.distributed import sharded
from moetrain.distributed.mesh import Mesh
from moetrain.distributed.sharded import EXACT_ELEMENTS, fp32_squares, sum_of_squares
from moetrain.engine import base
from moetrain.engine.optim import AdamW, mapped, rounded_at_random
from moetrain.training.loop import train


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


class Watcher(TorchDispatchMode):
    """Counts what asks the device for a number, and sees the largest fp64 tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.largest = max(self.largest, tensor.numel())
        return out


def test_a_step_with_bf16_moments_asks_the_device_for_nothing() -> None:
    ours, parameters = optimizer("bf16")
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with Watcher() as watcher:
        ours.step()
        ours.step()
    assert watcher.asked == 0
    ours.restored(7)
    assert {int(state["step"]) for state in ours.state.values()} == {7}


def test_bf16_moments_go_on_as_if_never_restored() -> None:
    """The random numbers of a step are those of its number, whoever counted it."""
    (ours, mine), (theirs, others) = optimizer("bf16"), optimizer("bf16")
    steps((ours, mine), 3)
    for parameter, other in zip(mine, others, strict=True):
        other.data.copy_(parameter)
        theirs.state_of(other).update({k: v.clone() for k, v in ours.state_of(parameter).items()})
    theirs.restored(3)
    for first, second in zip(steps((ours, mine), 2), steps((theirs, others), 2), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_hooks_of_a_step_are_called_once(state_dtype: str) -> None:
    """Also where this process has made a plain AdamW of torch, whose `step` calls them itself from then on."""
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(4))])
    made, calls = optimizer(state_dtype), []
    made[0].register_step_pre_hook(lambda *_: calls.append("before"))
    made[0].register_step_post_hook(lambda *_: calls.append("after"))
    steps(made, 1)
    assert calls == ["before", "after"]


@pytest.mark.parametrize("exact", [False, True], ids=["cpu", "exact"])
def test_squares_are_summed_without_a_copy_of_a_gradient(exact: bool) -> None:
    """A CPU adding up ten million squares in fp32 would be wrong in the third digit."""
    torch.manual_seed(0)
    grads = [(torch.randn(2_000, 5_000) * 1e-3, 2), (torch.randn(7, 300).T, 1), (torch.zeros(0, 4), 4)]
    grads += [(torch.randn(1_000).bfloat16(), 3)]
    with Watcher() as watcher:
        total = sum_of_squares(grads, torch.device("cpu"), exact)
    assert watcher.largest == EXACT_ELEMENTS
    assert float(total) == pytest.approx(sum(float(g.double().square().sum()) / n for g, n in grads), rel=1e-12)


def test_a_gpu_sums_squares_in_fp32_and_copies_nothing() -> None:
    torch.manual_seed(0)
    plain = [torch.randn(200, 300), torch.randn(90), torch.randn(70, 7).T]
    with Watcher() as watcher:
        total = fp32_squares(plain)
    assert watcher.largest == len(plain)  # norms
    assert float(total) == pytest.approx(sum(float(g.double().square().sum()) for g in plain), rel=1e-6)


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
    folder = train(config.load(overrides), mesh)
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


class Engine(base.Engine):
    """With a gradient and nothing else, on a device that squares in fp32."""

    def __init__(self, grad: torch.Tensor, mesh: Mesh) -> None:
        self.grad, self.mesh = grad, mesh

    def _grads(self) -> Any:
        return iter([(self.grad, self.mesh.world)])


Engine.__abstractmethods__ = frozenset()


def find_norms(mesh: Mesh) -> list[float]:
    def in_fp32(grads: Any, device: torch.device, exact: bool = False) -> torch.Tensor:
        return sum_of_squares(grads, device, exact) if exact else fp32_squares([g for g, _ in grads]) / mesh.world

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "sum_of_squares", in_fp32)
        return [Engine(torch.full((3, 4), value), mesh).grad_norm() for value in (1e20, 1e-25, 0.0, 2.0, math.inf)]


def test_a_norm_that_fp32_has_no_squares_for_is_found(pool) -> None:
    """The norm of finite gradients is finite, whatever squares in."""
    (found, other) = pool.run(find_norms, 2)
    assert found == other == pytest.approx([value * 12**0.5 for value in (1e20, 1e-25, 0.0, 2.0, math.inf)], rel=1e-6)
