"""The layer benchmark: whole records, true counts, memory as a hand count has it, virtual ranks that add up."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain import cli
from moetrain.bench import cases, layer, layer_report, virtual
from moetrain.bench.cases import LayerShape
from moetrain.bench.memory import measure_peak
from moetrain.bench.protocol import Grid
from moetrain.distributed.mesh import Mesh
from moetrain.moe.planning import default_home
from tests.pool import Pool

MIB = 1 << 20
SHAPE = LayerShape(tokens=2048, dim=64, hidden=64, experts=8, top_k=1, dtype="fp32")
PATTERNS = ["balanced", "95 % into 1"]
PLANNERS = ["home", "llep", "makespan"]
FIELDS = {"scenario", "planner", "ranks", "forward_ms", "total_ms", "percent_of_balanced", "percent_of_gemm", "spread"}
FIELDS |= {"rows_crossing", "bytes_crossing", "guests", "peak_memory_mib", *vars(SHAPE)}


def measured(mesh: Mesh) -> list[dict[str, Any]]:
    return layer.measure_grid(mesh, Grid([SHAPE], PATTERNS, PLANNERS, repeats=2, warmup=1, seed=0))


def one_after_another(mesh: Mesh, num_ranks: int) -> list[dict[str, Any]]:
    return virtual.measure_grid(mesh, Grid([SHAPE], PATTERNS, PLANNERS, repeats=1, warmup=1, seed=0), num_ranks)


def at_home(scenario: str, num_ranks: int) -> tuple[list[int], int]:
    """(rows of each rank, rows that cross) under standard expert parallelism."""
    counts = cases.count_selections(scenario, num_ranks, SHAPE)
    home = default_home(SHAPE.experts, num_ranks)
    own = sum(int(counts[r, home == r].sum()) for r in range(num_ranks))
    return [int(counts[:, home == r].sum()) for r in range(num_ranks)], int(counts.sum()) - own


def test_records_are_whole_and_count_truly(pool: Pool, tmp_path: Any) -> None:
    first, second = pool.run(measured, 2)
    assert first == second
    assert [(r["scenario"], r["planner"]) for r in first] == [(s, p) for s in PATTERNS for p in PLANNERS]
    for record in first:
        assert set(record) >= FIELDS
        assert 0 < record["forward_ms"] < record["total_ms"]
        assert record["peak_memory_mib"] > 0
        if record["planner"] == "home" or record["scenario"] == "balanced":
            assert (record["rows_crossing"], record["guests"]) == (at_home(record["scenario"], 2)[1], 0)
        # A token has one selection: its row crosses four times. Two headers travel along with the announcements.
        rows = record["rows_crossing"]
        payload = rows * 4 * SHAPE.dim * 4 + (rows + 2) * (8 + 4) + record["guests"] * 2 * SHAPE.weights * 4
        assert record["bytes_crossing"] == payload
    cells = {(r["scenario"], r["planner"]): r for r in first}
    assert cells["balanced", "home"]["memory_ratio"] == 1
    assert cells["95 % into 1", "home"]["memory_ratio"] > 1.5
    assert cells["95 % into 1", "llep"]["guests"] > 0
    layer_report.publish(first, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"layer.json", "layer.md", "layer.png"}


def test_virtual_ranks_add_up(pool: Pool, tmp_path: Any) -> None:
    (found,) = pool.run(one_after_another, 1, 4)
    for record in found:
        assert sum(record["rows"]) == 4 * SHAPE.tokens * SHAPE.top_k
        if record["planner"] == "home":
            assert (record["rows"], record["rows_crossing"]) == at_home(record["scenario"], 4)
        else:
            assert max(record["rows"]) <= max(at_home(record["scenario"], 4)[0])
        parts = ("plan", "forward", "backward", "dispatch", "lend", "combine")
        assert record["total_ms"] == pytest.approx(sum(record[f"{part}_ms"] for part in parts))
        assert 0 < record["percent_of_gemm"] < record["percent_of_gemm_without_links"]
    layer_report.publish_virtual(found, tmp_path)
    assert "modelled" in (tmp_path / "layer.md").read_text()


def test_layers_are_measured_with_each_backend_of_the_kernels(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    options = [
        "--virtual-ranks",
        "2",
        "--experts",
        "4",
        "--tokens",
        "16",
        "--dim",
        "8",
        "--hidden",
        "8",
        "--warmup",
        "1",
    ]
    options += ["--scenario", "balanced", "--planner", "home", "--dtype", "fp32", "--repeats", "1", "--json"]
    assert cli.main(["bench", "layer", *options, "--kernels", "fastest", "torch", "--out", str(tmp_path)]) == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("[{")]
    assert [record["kernels"] for record in json.loads(line)] == ["fastest", "torch"]
    assert "kernels: torch" in (tmp_path / "torch" / "layer.md").read_text()
    assert "kernels" not in (tmp_path / "fastest" / "layer.md").read_text()


def test_the_peak_is_that_of_a_hand_count() -> None:
    before = torch.zeros(MIB // 4)

    def held() -> list[Tensor]:
        one, two = torch.empty(MIB // 4), torch.empty(2 * MIB // 4)
        view = two[1:]
        del one, two  # `view` keeps two of the three MiB
        before.add_(1)
        returned = torch.empty(8 * MIB // 4)
        scratch = [torch.empty(MIB // 4) for _ in range(3)]  # five
        del view, scratch
        return [torch.empty(MIB // 4), returned]

    assert measure_peak(held, before.device) == 5 * MIB


class _Keeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.clone())
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        scratch = torch.empty(3 * len(saved))
        return grad * saved + scratch[:1]


def test_the_peak_counts_what_a_backward_keeps_and_needs() -> None:
    x = torch.ones(MIB // 4, requires_grad=True)

    def both_ways() -> list[Tensor]:
        y = _Keeps.apply(x)
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        return [x.grad]

    # The output, the saved copy, the upstream gradient, three of scratch, and a product before the sum.
    assert measure_peak(both_ways, x.device) == 7 * MIB


def test_selections_are_what_their_names_say() -> None:
    shape = LayerShape(tokens=4096, dim=8, hidden=8, experts=16, top_k=2, dtype="fp32")
    assert (cases.count_selections("balanced", 2, shape) == 512).all()
    for percent, num_hot in ((30, 1), (95, 4)):
        counts = cases.count_selections(f"{percent} % into {num_hot}", 2, shape)
        assert counts[:, :num_hot].sum() / counts.sum() == pytest.approx(percent / 100, abs=0.02)
    for name in cases.list_scenarios(64):
        np.testing.assert_allclose(cases.find_shares(name, 4, 64).sum(1), 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--planner", "nobody"], "--planner nobody: must be one of home"),
        (["--kernels", "torch", "triton"], "--kernels triton: needs a GPU"),
        (["--experts", "7", "--nproc", "2"], "--experts 7: must be a multiple of the 2 ranks"),
        (["--scenario", "sunny"], "--scenario sunny: matches none of: balanced"),
    ],
)
def test_mistakes_are_one_line(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "layer", *options]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
