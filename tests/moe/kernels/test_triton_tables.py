"""Index tables in Triton under its interpreter: those of torch, bit for bit."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.moe.kernels.tables import Incoming, IndexTables, Outgoing, TorchTables, Travel
from moetrain.moe.planning import PLANNERS, default_home
from moetrain.moe.planning.plan import Plan

triton = pytest.importorskip("triton", reason="Triton is there on x86-64 Linux only")
if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):  # with numpy 2.4
    pytest.skip("no loops with loaded bounds", allow_module_level=True)
tables = pytest.importorskip("moetrain.moe.kernels.triton_tables")

CPU = torch.device("cpu")
EXPERTS = 8
Choice = tuple[Tensor, Tensor, Tensor]  # token, expert and weight of each selection


def draw(num_tokens: int, top_k: int, hot: float, seed: int) -> Choice:
    """Distinct experts for every token, the first one with probability `hot`; not all tokens choose equally many."""
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(EXPERTS)[: generator.integers(1, top_k + 1)] for _ in range(num_tokens)]
    for experts in chosen:
        if generator.random() < hot and 0 not in experts:
            experts[0] = 0
    token = np.repeat(np.arange(num_tokens), [len(experts) for experts in chosen])
    expert = np.concatenate([*chosen, np.empty(0, np.int64)]).astype(np.int64)
    weight = torch.from_numpy(generator.random(len(expert)).astype(np.float32))
    return torch.from_numpy(token), torch.from_numpy(expert), weight


def travel(plan: Plan, rank: int, num_tokens: int, step: int) -> Travel:
    return Travel(rank, num_tokens, plan.rows(rank), plan.received(rank), plan.slots(rank), step)


def build(
    kind: type[IndexTables], plan: Plan, choices: list[Choice], num_tokens: list[int], step: int
) -> list[tuple[Outgoing, Incoming, list[Tensor]]]:
    """What every rank finds, announcements carried from rank to rank."""
    travels = [travel(plan, rank, num, step) for rank, num in enumerate(num_tokens)]
    made = [kind(one, CPU) for one in travels]  # type: ignore[call-arg]
    out = [one.announce(*choice) for one, choice in zip(made, choices, strict=True)]
    parts = [o.announcements.split((t.to_rank + 1).tolist()) for o, t in zip(out, travels, strict=True)]
    found = []
    for rank, one in enumerate(made):
        incoming = one.read(torch.cat([part[rank] for part in parts]))
        token_C, bags = one.list_copies(int(incoming.copies[0].sum()), len(made) - 1)
        found.append((out[rank], incoming, [token_C, bags.row_M, bags.begin_B]))
    return found


@pytest.mark.parametrize("step", [1, 16], ids="rows in steps of {}".format)
@pytest.mark.parametrize("planner", ["home", "llep"])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "hot"),
    [([9], 2, 0.5), ([0], 1, 0.0), ([300, 30], 3, 0.9), ([5, 0, 7, 1], EXPERTS, 0.5), ([0, 0], 2, 0.0)],
    ids=str,
)
def test_tables_equal_those_of_torch(num_tokens: list[int], top_k: int, hot: float, planner: str, step: int) -> None:
    """Ranks with nothing to send, experts without rows, guests, every expert of a token on one rank."""
    choices = [draw(num, top_k, hot, seed) for seed, num in enumerate(num_tokens)]
    counts = np.stack([np.bincount(expert.numpy(), minlength=EXPERTS) for _, expert, _ in choices])
    options = {"min_rows": 1} if planner == "llep" else {}
    plan = PLANNERS[planner](counts, default_home(EXPERTS, len(num_tokens)), None, None, None, **options)
    ours, theirs = (build(kind, plan, choices, num_tokens, step) for kind in (tables.TritonTables, TorchTables))
    for rank, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        header = np.cumsum(plan.rows(rank).sum(0) + 1) - plan.rows(rank).sum(0) - 1
        for out in (one[0], other[0]):
            out.announcements[header, 1] = 0  # beside the number of copies nothing is said
        for found, expected in zip((*one[0], *one[1], *one[2]), (*other[0], *other[1], *other[2]), strict=True):
            assert torch.equal(found.to(torch.float64), expected.to(torch.float64)), (rank, found, expected)


COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moetrain.moe.kernels import triton_tables as ours

wide = {"sorted_", "token", "selection", "announcement", "arrived", "row", "pool", "copy", "begin"}
arrays = wide | {"runs", "cell", "goes", "place", "weight", "out", "received", "bag", "copies"}
for kernel in (ours._order_selections, ours._write_announcements, ours._list_copies, ours._read_announcements):
    kinds = {name: ("*i64" if name in wide else "*i32") if name in arrays else "i32" for name in kernel.arg_names}
    if "weight" in kinds:
        kinds["weight"] = "*fp32"
    source = ASTSource(kernel, {**kinds, "BLOCK": "constexpr"}, {"BLOCK": ours.BLOCK})
    print(compile(source, GPUTarget("cuda", 90, 32), {"num_warps": ours.WARPS}).asm["ptx"])
"""


def test_tables_compile_for_a_gpu() -> None:
    """For an H100, which need not be there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = done.stdout.split(".visible .entry")[1:]
    assert len(kernels) == 4
    assert not any("__local_depot" in kernel for kernel in kernels)
