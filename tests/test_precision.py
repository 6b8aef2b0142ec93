"""`auto`: what it takes of a device, of ranks that differ; where bf16 is slow it is said once."""

import pytest
import torch

from moetrain import precision
from moetrain.mesh import Mesh

CPU = torch.device("cpu")


@pytest.mark.parametrize(("speed", "dtype"), [(4.0, "bf16"), (1.3, "bf16"), (1.2, "fp32"), (0.01, "fp32"), (0, "fp32")])
def test_bf16_is_taken_where_it_is_clearly_faster(speed: float, dtype: str) -> None:
    assert precision.chosen(speed) == dtype


def test_a_speed_in_words() -> None:
    assert precision.describe(0.01) == "bf16 products take 100 times as long as fp32 ones here"
    assert precision.describe(3.84) == "bf16 products run at 3.8 times the speed of fp32 ones here"
    assert precision.describe(float("inf")) == "this GPU has bf16"
    assert precision.describe(0.0) == "this GPU has no bf16"


def test_a_gpu_is_asked_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, speed in ((True, float("inf")), (False, 0.0)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert precision.speed_of_bf16(torch.device("cuda")) == speed


def test_the_measured_speed_is_that_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that takes a known time, on a clock of its own."""
    clock = [0.0]

    def product(one: torch.Tensor, two: torch.Tensor) -> None:
        clock[0] += {torch.float32: 0.001, torch.bfloat16: 0.02}[one.dtype]

    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: clock[0])
    assert precision.speed_of_bf16(CPU) == pytest.approx(1 / 20)
    assert clock[0] < 0.1


def agree(mesh: Mesh, speeds: list[float]) -> list[tuple[str, str]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "speed_of_bf16", lambda _: speeds[mesh.rank])
        return [precision.agree(asked, mesh) for asked in ("auto", "bf16", "fp32")]


def test_ranks_take_what_all_of_them_do_well(pool) -> None:
    slow = "bf16 products take 50 times as long as fp32 ones here"
    warned = f"train.dtype=bf16 is slow: {slow}; train.dtype=auto computes in fp32"
    for speeds, found in (
        ([4.0, 3.0], [("bf16", ""), ("bf16", ""), ("fp32", "")]),
        ([4.0, 0.02], [("fp32", f"computes in fp32: {slow}"), ("bf16", warned), ("fp32", "")]),
    ):
        assert pool.run(agree, 2, speeds) == [found, found]
