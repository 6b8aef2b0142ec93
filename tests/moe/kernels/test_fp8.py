"""Products in FP8 by what a CPU does of them: rounded values, multiplied exactly; the training curve follows bf16's."""

from unittest import mock

import pytest
import torch

from moetrain import cli, config
from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import Mesh
from moetrain.engine import precision
from moetrain.moe.kernels import fp8
from moetrain.moe.kernels.api import KernelChoice
from moetrain.moe.kernels.reference import LoopedProducts
from tests.training.test_train import losses, run

HALF_STEP = 2.0**-4  # of e4m3, relative: three bits after the point
CURVE = 0.01  # relative, of a loss in FP8 to that in bf16


def test_rows_are_rounded_to_their_own_scale() -> None:
    """Each value to half a step, or to the least step of a row whose largest value is much larger; zeros stay."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 64) * torch.tensor([1e-5, 1.0, 3e4])[:, None, None]
    x[1, 2] = 0
    values, scale = fp8.quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    assert scale.shape == (3, 7)
    found = values.float() * scale[..., None]
    assert ((found - x).abs() <= HALF_STEP * x.abs() + 2.0**-10 * scale[..., None]).all()
    assert not found[1, 2].any()
    assert torch.equal(values.float().abs().amax(-1)[0], torch.full((7,), fp8.LARGEST))


@pytest.mark.parametrize("shape", [(5, 2880), (3, 4, 64), (1, 4100), (0, 32)], ids=str)
def test_the_triton_kernel_makes_the_same_rows(shape: tuple[int, ...]) -> None:
    """All but the last rounding, which Triton's interpreter gets wrong next to powers of two."""
    from moetrain.moe.kernels import triton_fp8

    torch.manual_seed(0)
    x = torch.randn(shape).bfloat16()
    x[:1, ..., :8] = 0
    values, scale = fp8.quantize_rows(x)
    found, found_scale = triton_fp8.quantize_rows(x, torch.float32, fp8.LARGEST, fp8.LEAST)
    assert torch.equal(found_scale, scale)
    assert torch.equal(found.to(fp8.DTYPE).float(), values.float())


def rounded(x: torch.Tensor) -> torch.Tensor:
    values, scale = fp8.quantize_rows(x)
    return values.float() * scale[..., None]


@pytest.mark.parametrize("sizes", [[3, 0, 5], [0, 0, 8], [8, 0, 0], [0, 0, 0]], ids=str)
def test_products_are_those_of_rounded_rows(sizes: list[int]) -> None:
    """With weights as one tensor or a list; gradients are those of the kernels below, bit for bit."""
    torch.manual_seed(0)
    num = sum(sizes)
    rows, weights = torch.randn(num, 32).bfloat16(), torch.randn(3, 48, 32).bfloat16()
    products = KernelChoice("torch", is_fp8=True).choose(rows.device, rows.dtype, (weights,))
    out, back = torch.empty(num, 48).bfloat16(), torch.empty(num, 32).bfloat16()
    products.segment_mm(rows, weights, sizes, out, transpose=True)
    again = torch.empty_like(out)
    products.segment_mm(rows, list(weights), sizes, again, transpose=True)
    products.segment_mm(out, list(weights), sizes, back, transpose=False)
    slot = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    expected = torch.einsum("ma,mba->mb", rounded(rows), rounded(weights)[slot]).bfloat16()
    torch.testing.assert_close(out, expected)
    assert torch.equal(again, out)
    wide_back = torch.empty_like(back)
    LoopedProducts.segment_mm(out, weights, sizes, wide_back, transpose=False)
    assert torch.equal(back, wide_back)
    found, wide = (torch.empty(3, 48, 32).bfloat16() for _ in range(2))
    products.segment_outer(out, rows, sizes, found, add=False)
    LoopedProducts.segment_outer(out, rows, sizes, wide, add=False)
    assert torch.equal(found, wide)


def test_the_gpus_product_takes_these_layouts() -> None:
    """Checked by torch itself, on tensors without values."""
    new = lambda *shape: torch.empty(*shape, dtype=fp8.DTYPE, device="meta")  # noqa: E731
    scales = torch.empty(64, device="meta"), torch.empty(4, 48, device="meta")
    found = fp8.multiply(new(64, 32), scales[0], new(4, 48, 32), scales[1], [16, 0, 40, 8], torch.bfloat16)
    assert (found.shape, found.dtype) == ((64, 48), torch.bfloat16)


def run_emulated(mesh: Mesh, overrides: list[str]) -> str:
    with mock.patch.object(fp8, "is_supported", return_value=True):
        return run(mesh, overrides)


def test_the_curve_follows_that_of_bf16(pool, tiny: list[str]) -> None:
    """With lending and recompute; not the same numbers, so that it is FP8 that runs."""
    more = [*tiny, "train.dtype=bf16", "train.steps=12", "optim.warmup=2", "router.skew=1", "train.recompute=full"]
    wide = losses(pool.run(run, 2, [*more, "run.name=bf16"])[0])
    narrow = losses(pool.run(run_emulated, 2, [*more, "train.experts_dtype=fp8", "run.name=fp8"])[0])
    assert narrow == pytest.approx(wide, rel=CURVE)
    assert narrow != wide
    assert narrow[-1] < narrow[0] - 0.5


def test_it_is_refused_where_no_gpu_computes_it(capsys: pytest.CaptureFixture) -> None:
    overrides = ["model=tiny", "train.experts_dtype=fp8"]
    assert cli.main(["train", *overrides]) == 2
    assert "train.experts_dtype=fp8: needs a Hopper GPU" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"^train\.experts_dtype=fp8: needs a Hopper GPU"):
        precision.check_experts_dtype(config.load(overrides), torch.device("cpu"))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.dtype=fp32"], "train.dtype=fp32: must be bf16 or auto with train.experts_dtype=fp8"),
        (["model.expert_hidden=40"], "model.expert_hidden=40: must be a multiple of 16 with train.experts_dtype=fp8"),
        (["lora.rank=4"], "train.experts_dtype=fp8: must be null with lora.rank > 0"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}"):
        config.load(["model=tiny", "train.experts_dtype=fp8", *overrides])
