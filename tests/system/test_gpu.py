"""On one GPU, NCCL with one rank (`pytest --gpu`): kernels and layer equal the CPU, whole runs follow its curve.

The device is the mesh's own, so that nothing here is special to CUDA but the check that it is there.
"""

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain import config
from moetrain.distributed.mesh import Mesh
from moetrain.models.transformer import build_moe
from moetrain.moe.exchange import static_plan
from moetrain.moe.kernels import api as kernels
from moetrain.moe.kernels.api import KernelChoice
from moetrain.moe.kernels.bags import Bags
from moetrain.moe.planning import PLANNERS, default_home
from tests import oracle
from tests.pool import Pool
from tests.training.test_train import losses, run


@pytest.fixture(scope="module", autouse=True)
def _there_is_one(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--rehearse"):
        assert torch.cuda.is_available(), "--gpu needs a GPU that PyTorch can use"


def on_device(mesh: Mesh, dtype: torch.dtype) -> None:
    """Every kernel in `dtype` on the device against fp64 on the CPU; segments of no row and of odd sizes."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    sizes, wide, narrow = [0, 37, 1, 0, 90], 48, 32
    rows, weights, other = draw(128, wide), draw(5, narrow, wide) * 0.1, draw(128, narrow)
    bag, scale = torch.randint(0, 50, (128,), generator=generator), torch.rand(128, generator=generator)
    most = int(torch.bincount(bag).max())

    def found(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        new = lambda t: t.to(device, dtype, copy=True)  # noqa: E731
        out, grads = new(torch.empty(128, narrow)), new(torch.zeros(5, narrow, wide))
        backend = KernelChoice().choose(device, dtype, (out, grads))
        backend.segment_mm(new(rows), new(weights), sizes, out, transpose=True)
        grads = backend.segment_outer(new(other), new(rows), sizes, grads, add=False)
        full = backend.segment_outer(new(other), new(rows), [37, 1, 90], grads[:3].clone(), add=False)
        twice = backend.segment_outer(new(other), new(rows), sizes, grads.clone(), add=True)
        bags = Bags.group(bag.to(device), 50, most)
        weight = scale.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        gate_up, grad = new(rows), new(rows[:, : wide // 2])
        hidden = backend.swiglu(gate_up.clone())
        of_weight = backend.swiglu_backward(gate_up, grad, weight)
        summed = backend.sum_rows(new(rows), weight, bags)
        more = backend.sum_rows(new(rows), None, bags, new(rows[:50]))
        return [out, grads, full, twice, hidden, gate_up, grad, of_weight, summed, more]

    near = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}
    rows, weights, other = (t.to(dtype).float() for t in (rows, weights, other))  # both sides start from the same
    slow = found(torch.device("cpu"), torch.float64)
    fast, again = found(mesh.device, dtype), found(mesh.device, dtype)
    for ours, repeated, theirs in zip(fast, again, slow, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.double(), **near)
        assert torch.equal(ours, repeated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_equal_those_of_the_cpu(pool: Pool, dtype: torch.dtype) -> None:
    """Products of segments one by one in fp32, grouped in bf16 where the device can."""
    pool.run(on_device, 1, dtype)


BF16, FP32 = torch.bfloat16, torch.float32


def choose(backend: str, dtype: torch.dtype) -> kernels.Backend:
    return KernelChoice(backend).choose(torch.device("cuda"), dtype)


@pytest.mark.parametrize(
    ("dtype", "num_rows", "num_bags", "width", "gap"),
    [
        (BF16, 32768, 8192, 2880, 0),  # gpt-oss-120b
        (BF16, 65536, 40000, 7168, 0),  # DeepSeek-V3
        (FP32, 32768, 8192, 2880, 0),
        (FP32, 4099, 511, 1029, 5),  # nothing is a multiple of anything; rows that do not touch
        (BF16, 4099, 511, 1030, 6),
        (BF16, 1, 3, 8, 0),
        (BF16, 0, 3, 8, 0),
    ],
    ids=str,
)
def test_triton_kernels_equal_plain_torch(
    dtype: torch.dtype, num_rows: int, num_bags: int, width: int, gap: int
) -> None:
    """Sums bit for bit, SwiGLU to a rounding of the dtype; twice the same bits."""
    torch.manual_seed(0)
    draw = lambda rows, wide: torch.randn(rows, wide + gap, device="cuda", dtype=dtype)[:, :wide]  # noqa: E731
    rows, own, weight = draw(num_rows, width), draw(num_bags, width), torch.rand(num_rows, device="cuda")
    bag = torch.randint(0, max(num_bags - 1, 1), (num_rows,), device="cuda")  # the last one is empty
    bags = Bags.group(bag, num_bags, int(torch.bincount(bag, minlength=1).max()))

    def sums(backend: str) -> list[Tensor]:
        chosen = choose(backend, dtype)
        return [chosen.sum_rows(rows, w, bags, o) for w, o in ((weight, None), (None, None), (None, own))]

    half = width // 2
    grad = draw(num_rows, half)

    def gated(backend: str, wide: torch.dtype) -> list[Tensor]:
        chosen = choose(backend, wide)
        changed = [t.to(wide, copy=True) for t in (rows[:, : 2 * half], grad)]
        hidden = chosen.swiglu(changed[0])
        return [hidden, *changed, chosen.swiglu_backward(*changed, weight)]

    for ours, again, theirs in zip(sums("triton"), sums("triton"), sums("torch"), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, again)
    for ours, again, theirs in zip(
        gated("triton", dtype), gated("triton", dtype), gated("torch", torch.float32), strict=True
    ):
        near = {"rtol": 2e-5, "atol": 1e-3 if ours.dim() == 1 else 1e-5}  # a weight's gradient is a sum over a row
        torch.testing.assert_close(ours.float(), theirs, **near if ours.dtype == FP32 else {"rtol": 8e-3, "atol": 1e-6})
        assert torch.equal(ours, again)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(513, 201_088), (3, 129_281), (0, 8)], ids=str)
def test_triton_cross_entropy_equals_plain_torch(dtype: torch.dtype, num_rows: int, width: int) -> None:
    torch.manual_seed(0)
    logits, grad = torch.randn(num_rows, width, device="cuda").mul_(9).to(dtype), torch.rand(num_rows, device="cuda")
    target = torch.randint(width, (num_rows,), device="cuda")

    def found(backend: str) -> list[Tensor]:
        chosen = choose(backend, dtype)
        nats, lse = chosen.cross_entropy(logits, target)
        return [nats, lse, chosen.cross_entropy_backward(logits.clone(), target, lse, grad)]

    for ours, again, theirs in zip(found("triton"), found("triton"), found("torch"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=8e-3 if ours.dtype == BF16 else 2e-5, atol=2e-5)
        assert torch.equal(ours, again)


def test_triton_kernels_reach_rows_beyond_two_to_the_31_elements() -> None:
    width, last = 7168, 8
    rows = torch.zeros(300_000, width, device="cuda", dtype=BF16)
    rows[-last:] = torch.randn(last, width, device="cuda")
    grad, weight = torch.randn(len(rows), width // 2, device="cuda").bfloat16(), torch.rand(len(rows), device="cuda")
    row = torch.arange(len(rows) - last, len(rows), device="cuda")
    bags = Bags(row, torch.tensor([0, 3, last], device="cuda"), last)
    few = [t[-last:].clone() for t in (rows, grad, weight)]
    few_bags = Bags(row - row[0], bags.begin_B, last)
    triton = choose("triton", BF16)
    summed = triton.sum_rows(rows, weight, bags), triton.sum_rows(few[0], few[2], few_bags)
    hidden = triton.swiglu(rows)[-last:], triton.swiglu(few[0])
    of_weight = triton.swiglu_backward(rows, grad, weight)[-last:], triton.swiglu_backward(*few)
    for far, near in (summed, hidden, of_weight, (rows[-last:], few[0]), (grad[-last:], few[1])):
        assert near.any()
        assert torch.equal(far, near)


def test_products_in_fp8_equal_those_of_rounded_rows() -> None:
    """The GPU's product of FP8 rows against the same rounded rows in fp32: both directions, segments of no row."""
    torch.manual_seed(0)
    sizes, rows, weights = [0, 37, 1, 0, 90], torch.randn(128, 64).bfloat16(), torch.randn(5, 48, 64).bfloat16()
    found = []
    for device in (torch.device("cuda"), torch.device("cpu")):
        products = KernelChoice("torch", is_fp8=True).choose(device, BF16)
        out, back = torch.empty(128, 48, device=device).bfloat16(), torch.empty(128, 64, device=device).bfloat16()
        products.segment_mm(rows.to(device), weights.to(device), sizes, out, transpose=True)
        products.segment_mm(out, weights.to(device), sizes, back, transpose=False)
        found.append((out.cpu().float(), back.cpu().float()))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_the_static_plan_needs_no_host_sync() -> None:
    counts = np.random.default_rng(0).integers(0, 900, (8, 128))
    home, plan = default_home(128, 8), PLANNERS["static"](counts, default_home(128, 8))
    counts_RE, home_E = torch.from_numpy(counts).cuda(), torch.from_numpy(home).cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        rows_ER = static_plan.share_rows(counts_RE, home_E)
        sent = static_plan.split_sources(counts_RE, rows_ER)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (rows_ER.T.cpu().numpy() == plan.placed()).all()
    assert all((sent[source].cpu().numpy() == plan.rows(source)).all() for source in range(8))


def test_triton_is_what_a_gpu_uses() -> None:
    assert kernels.find_triton() is not None


def whole_layer(mesh: Mesh, options: list[str]) -> None:
    """Output and gradient of x in fp32: the layer on the device against the loop there; twice the same bits."""
    settings = config.load(["model=tiny", *options])
    layer = build_moe(settings.model, settings.router, settings.planner)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    layer.to(mesh.device).experts.shard(mesh.ep)
    generator = torch.Generator().manual_seed(1)
    x, upstream = (torch.randn(20, settings.model.dim, generator=generator).to(mesh.device) for _ in range(2))
    x.requires_grad_()

    def both(y: Tensor) -> tuple[Tensor, Tensor]:
        return y.detach(), torch.autograd.grad(y, x, upstream)[0]

    routing, _ = layer.router(x)
    loop = both(oracle.moe(x, routing, layer.experts.gate_up.detach(), layer.experts.down.detach()))
    first, second = both(layer(x)), both(layer(x))
    torch.testing.assert_close(first, loop, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [[], ["router.scores=sigmoid"], ["router.name=round_robin"]], ids=str)
def test_the_layer_equals_the_loop(pool: Pool, options: list[str]) -> None:
    pool.run(whole_layer, 1, options)


def test_a_run_follows_the_curve_of_the_cpu(pool: Pool, tiny: list[str], tmp_path: Path) -> None:
    """fp32: the same losses as without the GPU; recompute and micro-steps change nothing; bf16 stays near."""
    more = [*tiny, "train.steps=8", "balance.coefficient=0"]
    command = [sys.executable, "-m", "moetrain", "train", *more, "parallel.nproc=1", "run.name=cpu"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = losses(tmp_path / "cpu")
    cases: dict[str, tuple[list[str], dict[str, Any]]] = {
        "fp32": ([], {"rel": 1e-4}),
        "recompute": (["train.recompute=full"], {"rel": 1e-4}),
        "parts": (["train.micro_batch=2"], {"rel": 1e-4}),
        "bf16": (["train.dtype=bf16"], {"rel": 1e-2}),
    }
    for name, (options, near) in cases.items():
        folder = pool.run(run, 1, [*more, *options, f"run.name={name}"])[0]
        assert losses(folder) == pytest.approx(expected, **near), name


def test_a_run_goes_on_from_its_checkpoint(pool: Pool, tiny: list[str]) -> None:
    more = [*tiny, "train.steps=10", "checkpoint.every=5"]
    whole = Path(pool.run(run, 1, [*more, "run.name=whole"])[0])
    saved = f"checkpoint.resume={whole}/checkpoints/step_5"
    part = pool.run(run, 1, [*more, "run.name=part", saved])[0]
    assert losses(part) == pytest.approx(losses(whole)[5:], rel=1e-5)
