"""The grouped products in Triton under its interpreter, against one product of torch's for each segment."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from moetrain.moe.kernels.reference import LoopedProducts, Matrices

triton = pytest.importorskip("triton", reason="Triton is there on x86-64 Linux only")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):  # with numpy 2.4
    pytest.skip("no loops with loaded bounds", allow_module_level=True)
products = pytest.importorskip("moetrain.moe.kernels.triton_products")

SIZES = {
    "none": [0, 0],
    "one row": [0, 1, 0],
    "odd": [5, 0, 33, 1, 20],
    "one has nearly all": [2, 50, 1],
    "one slot": [16],
}
NEAR = {torch.float32: 1e-5, torch.float16: 2e-3}  # the interpreter has no products in bf16
POISON = 6e4  # beside what may be read: it would show in a sum


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    """Random numbers, with memory around them that does not belong to them."""
    whole = torch.full((shape[0] + 40, *shape[1:]), POISON, dtype=dtype)
    whole[: shape[0]] = torch.randn(shape)
    return whole[: shape[0]]


def lay_out(kind: str, count: int, rows: int, columns: int, dtype: torch.dtype) -> Matrices:
    """Matrices of some slots: stacked, packed as lent guests are, or each in memory of its own."""
    if kind == "stacked":
        return torch.randn(count, rows, columns).to(dtype)
    if kind == "packed":
        packed = torch.randn(count, 8 + rows * columns).to(dtype)
        return [one[8:].view(rows, columns) for one in packed]
    return [torch.randn(rows, columns).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("kind", ["stacked", "packed", "apart"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_products_equal_those_of_torch(sizes: list[int], kind: str, dtype: torch.dtype) -> None:
    """Both ways through the weights, into a part of a larger tensor, of which nothing else is written."""
    torch.manual_seed(0)
    num = sum(sizes)
    weights = lay_out(kind, len(sizes), 40, 24, dtype)
    for transpose, (wide, narrow) in {True: (24, 40), False: (40, 24)}.items():
        rows = draw(num, wide, dtype=dtype)
        out, expected = torch.full((num + 2, narrow), 7.0, dtype=dtype), torch.empty(num, narrow, dtype=dtype)
        products.segment_mm(rows, weights, sizes, out[1:-1], transpose)
        LoopedProducts.segment_mm(rows, weights, sizes, expected, transpose)
        torch.testing.assert_close(out[1:-1], expected, rtol=NEAR[dtype], atol=10 * NEAR[dtype])
        assert (out[[0, -1]] == 7).all()


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("add", [False, True], ids=["write", "add"])
@pytest.mark.parametrize("kind", ["stacked", "packed", "apart"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_weight_gradients_equal_those_of_torch(sizes: list[int], kind: str, add: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    left, right = draw(sum(sizes), 40, dtype=dtype), draw(sum(sizes), 24, dtype=dtype)
    out = lay_out(kind, len(sizes), 40, 24, dtype)
    expected = [matrix.clone() for matrix in out]
    assert products.segment_outer(left, right, sizes, out, add) is out
    LoopedProducts.segment_outer(left, right, sizes, expected, add)
    for found, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=NEAR[dtype], atol=10 * NEAR[dtype])


COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moetrain.moe.kernels import triton_products as ours

m, n, k = (ours.TILE[name] for name in ("BM", "BN", "BK"))
block = "tensordesc<bf16[{}]>".format
mm = {"rows": block(f"{m}, {k}"), "out": "*bf16", "tiles": "*i32", "num_tiles": "i32"}
outer = {"left": block(f"{k}, {m}"), "right": block(f"{k}, {n}"), "slots": "*i64", "like": "*bf16"}
for kernel, kinds, fixed in (
    (ours._segment_mm, {**mm, "weights": block(f"1, {n}, {k}")}, {"TRANSPOSE": True}),
    (ours._segment_mm, {**mm, "weights": block(f"1, {k}, {n}")}, {"TRANSPOSE": False}),
    (ours._segment_outer, outer, {"ADD": False}),
):
    kinds |= {"A": "i32", "B": "i32"}
    kinds = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    even = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(kinds.values()) if kind[0] in "*i"}
    source = ASTSource(kernel, kinds, {**ours.TILE, **fixed}, even)
    print(compile(source, GPUTarget("cuda", 90, 32), dict(ours.LAUNCH)).asm["ptx"])
"""


def test_products_compile_for_a_gpu_to_instructions_of_hopper() -> None:
    """For an H100, which need not be there: blocks fetched as a whole, products of warp groups, enough registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = done.stdout.split(".visible .entry")[1:]
    assert len(kernels) == 3
    for kernel in kernels:
        assert "wgmma.mma_async" in kernel
        assert "cp.async.bulk.tensor" in kernel
        assert "__local_depot" not in kernel
