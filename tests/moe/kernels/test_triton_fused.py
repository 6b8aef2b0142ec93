"""The Triton kernels under Triton's interpreter, against plain torch; compiled for a GPU, but not run."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from moetrain.moe.kernels import api as kernels
from moetrain.moe.kernels.api import KernelChoice
from moetrain.moe.kernels.bags import Bags

triton = pytest.importorskip("triton", reason="Triton is there on x86-64 Linux only")
interpreted = pytest.mark.skipif(  # with numpy 2.4
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9), reason="no loops with loaded bounds"
)
KINDS = [torch.float32, torch.bfloat16, torch.float16]


def rows_of(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows that do not follow one another without a gap."""
    return torch.randn(num_rows, width + 3, dtype=torch.float32).to(dtype)[:, :width]


def choose(backend: str, dtype: torch.dtype) -> kernels.Backend:
    return KernelChoice(backend).choose(torch.device("cpu"), dtype)


@interpreted
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(
    ("sizes", "left", "width"),
    [
        ([], 0, 8),
        ([], 2, 8),
        ([0, 0], 0, 8),
        ([0, 0], 3, 1),
        ([1], 0, 40),
        ([*range(9), 0], 2, 40),
        ([0, 4, 1], 1, 2053),
    ],
    ids="{}".format,
)
def test_sums_equal_those_of_torch_bit_for_bit(sizes: list[int], left: int, width: int, dtype: torch.dtype) -> None:
    """Weighted, not weighted, and on top of an own row; bags of any size, `left` rows in none, in any order."""
    torch.manual_seed(0)
    num_rows = sum(sizes) + left
    bags = Bags(torch.randperm(num_rows), torch.tensor([0, *sizes]).cumsum(0), max(sizes, default=0))
    rows, own, weight = rows_of(num_rows, width, dtype), rows_of(len(sizes), width, dtype), torch.rand(num_rows)

    def found(backend: str) -> list[Tensor]:
        chosen = choose(backend, dtype)
        return [chosen.sum_rows(rows, w, bags, o) for w, o in ((weight, None), (None, None), (None, own))]

    for ours, theirs in zip(found("triton"), found("torch"), strict=True):
        if dtype == torch.bfloat16:  # which the interpreter does not round but cuts
            torch.testing.assert_close(ours, theirs, rtol=torch.finfo(dtype).eps, atol=0)
        else:
            assert torch.equal(ours, theirs)


@interpreted
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 8), (1, 1), (13, 40), (2, 9001)])
def test_cross_entropy_equals_that_of_torch(num_rows: int, width: int, dtype: torch.dtype) -> None:
    """Against torch in fp64; columns of several blocks, logits of very different sizes."""
    torch.manual_seed(0)
    logits, grad = rows_of(num_rows, width, dtype) * 20, torch.rand(num_rows)
    target = torch.randint(width, (num_rows,))

    def found(backend: str, wide: torch.dtype) -> list[Tensor]:
        chosen = choose(backend, wide)
        nats, lse = chosen.cross_entropy(logits.to(wide, copy=True), target)
        return [nats, lse, chosen.cross_entropy_backward(logits.to(wide, copy=True), target, lse.float(), grad)]

    for ours, theirs in zip(found("triton", dtype), found("torch", torch.float32), strict=True):
        eps = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=max(eps, 2e-5), atol=2e-5)


@interpreted
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 8), (1, 1), (13, 40), (3, 1029)])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # infinity is right; the interpreter is numpy
def test_swiglu_equals_that_of_torch(num_rows: int, width: int, dtype: torch.dtype) -> None:
    """Against torch in fp64, to a rounding of the dtype; gates near and far from zero."""
    torch.manual_seed(0)
    gate_up, grad = rows_of(num_rows, 2 * width, dtype) * 4, rows_of(num_rows, width, dtype)
    gate_up[:, : min(width, 4)] = torch.tensor([-200.0, 200.0, 0.0, 88.0])[:width]
    weight = torch.rand(num_rows)

    def found(backend: str, wide: torch.dtype) -> list[Tensor]:
        changed = [gate_up.to(wide, copy=True), grad.to(wide, copy=True)]
        chosen = choose(backend, wide)
        hidden = chosen.swiglu(changed[0])
        of_weight = chosen.swiglu_backward(*changed, weight.to(torch.promote_types(wide, torch.float32)))
        return [hidden, *changed, of_weight]

    for ours, theirs in zip(found("triton", dtype), found("torch", torch.float64), strict=True):
        eps = torch.finfo(ours.dtype).eps
        rounding = {"rtol": eps, "atol": 1e-6} if ours.dtype != torch.float32 else {"rtol": 2e-5, "atol": 2e-5}
        torch.testing.assert_close(ours.double(), theirs.double(), **rounding)


COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moetrain.moe.kernels import triton_fused as ours

sums, gated = (ours.SUM_BLOCK, ours.SUM_WARPS), (ours.SWIGLU_BLOCK, ours.SWIGLU_WARPS)
logits = ours.LOGITS_BLOCK, ours.LOGITS_WARPS
for kernel, (block, warps), *kinds in (  # of the arguments; None: left out
    (ours._sum_rows, sums, "*bf16", "*fp32", "*i64", "*i64", None, "*bf16", "i32", "i32", "i32"),
    (ours._sum_rows, sums, "*bf16", None, "*i64", "*i64", "*bf16", "*bf16", "i32", "i32", "i32"),
    (ours._swiglu, gated, "*bf16", "*bf16", "i32", "i32"),
    (ours._swiglu_backward, gated, "*bf16", "*bf16", "*fp32", "*fp32", "i32", "i32", "i32"),
    (ours._cross_entropy_backward, logits, "*bf16", "*i64", "*fp32", "*fp32", "i32", "i32"),
):
    kinds = [*(kind or "constexpr" for kind in kinds), "constexpr"]
    fixed = {(at,): None for at, kind in enumerate(kinds) if kind == "constexpr"} | {(len(kinds) - 1,): block}
    even = {(at,): [["tt.divisibility", 16]] for at in range(len(kinds)) if (at,) not in fixed}
    source = ASTSource(kernel, dict(zip(kernel.arg_names, kinds, strict=True)), fixed, even)
    print(compile(source, GPUTarget("cuda", 90, 32), {"num_warps": warps, "enable_fp_fusion": False}).asm["ptx"])
"""


def test_kernels_compile_for_a_gpu_and_read_16_bytes_at_once() -> None:
    """For an H100, which need not be there: of bf16, no thread reads or writes one element alone, or runs out of
    registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = done.stdout.split(".visible .entry")[1:]
    assert len(kernels) == 5
    for kernel in kernels:
        assert re.search(r"ld.global[.\w]*.v4.b32", kernel)
        assert "st.global.v4.b32" in kernel
        assert not re.search(r"(ld|st).global[.\w]*.b16|__local_depot", kernel)


def test_without_a_gpu_that_triton_can_use_it_is_plain_torch() -> None:
    kernels.find_triton.cache_clear()
    with pytest.warns(UserWarning, match="no Triton kernels, plain torch is slower: "):
        assert kernels.find_triton() is None
