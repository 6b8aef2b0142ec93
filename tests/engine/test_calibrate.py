"""Measured costs: sound, the same on every rank, kept with the run, its checkpoints and the machine."""

import dataclasses
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moetrain import config
from moetrain.bench import virtual
from moetrain.bench.cases import LayerShape
from moetrain.distributed.mesh import Mesh
from moetrain.engine import saved_costs
from moetrain.models.base import LanguageModel
from moetrain.moe import calibrate
from moetrain.moe.kernels import cpu_gemm
from moetrain.moe.kernels.api import PARTS, KernelChoice
from moetrain.moe.planning.cost import Costs, Measured, default_costs
from moetrain.training.loop import train

LAYER = calibrate.Layer(32, 48, 8, 2, torch.float32)
PUBLISHED = {  # width, hidden, experts, top-k
    "gpt-oss-120b": calibrate.Layer(2880, 2880, 128, 4, torch.bfloat16),
    "deepseek-v3": calibrate.Layer(7168, 2048, 256, 8, torch.bfloat16),
}
GIB = 1 << 30


@pytest.mark.parametrize("layer", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_a_gpu_is_measured_at_the_sizes_of_training(layer: calibrate.Layer) -> None:
    sizes = calibrate.Sizes.for_layer(layer, 8, "cuda", 70 * GIB)
    assert sizes.segments == layer.experts // 8
    assert sizes.rows == (512, 4096)
    assert sizes.message_bytes == (1 << 10, 1 << 26)
    narrow, none = (calibrate.Sizes.for_layer(layer, 8, "cuda", free) for free in (8 * GIB, 0))
    assert none.segments == 1 <= narrow.segments < sizes.segments
    assert narrow.segments * 2 * layer.dtype.itemsize * layer.weights < 4 * GIB  # weights and gradients alone
    wide = calibrate.Sizes.for_layer(layer, 128, "cuda", 70 * GIB)
    assert 127 * wide.message_bytes[1] <= GIB  # to all peers together
    assert wide.segments == layer.experts // 128


def test_a_cpu_is_measured_at_what_it_does_in_milliseconds() -> None:
    for layer in (LAYER, *PUBLISHED.values()):
        sizes = calibrate.Sizes.for_layer(layer, 8, "cpu", math.inf)
        few, many = sizes.rows
        assert (sizes.segments, sizes.message_bytes, many) == (4, (1 << 10, 1 << 21), 8 * few)
        assert many == 64 or 6 * layer.weights * 4 * many <= 1e10


def of_a_made_machine(mesh: Mesh, device: str) -> list[Costs]:
    """Costs where a run takes a second and one more for each floating-point operation; at sizes for `device`."""

    def seconds(mesh: Mesh, work: Callable[[], object], clock: object = None) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return 1.0 + counter.get_total_flops()

    chosen = calibrate.Sizes.for_layer(LAYER, 2, device, GIB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_time", seconds)
        patch.setattr(cpu_gemm, "able", lambda *_: False)  # only torch's products are counted
        patch.setattr(calibrate.Sizes, "for_layer", lambda *_: chosen._replace(message_bytes=(1 << 10, 1 << 12)))
        return [calibrate.measure(mesh, LAYER)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_row_and_an_expert_cost_is_found_from_two_sizes(pool, device: str) -> None:
    ((costs,),) = pool.run(of_a_made_machine, 1, device)
    segments = calibrate.Sizes.for_layer(LAYER, 2, device, GIB).segments
    assert costs.row_forward == pytest.approx(2 * LAYER.weights)
    assert costs.row_backward == pytest.approx(4 * LAYER.weights)
    assert costs.segment_forward == pytest.approx(1 / segments)
    assert costs.segment_backward == pytest.approx(1 / segments)


def virtual_costs(mesh: Mesh, num_ranks: int) -> Costs:
    return virtual.measure_costs(
        mesh, LayerShape(16, LAYER.dim, LAYER.hidden, LAYER.experts, LAYER.top_k, "fp32"), num_ranks
    )


def test_virtual_ranks_are_planned_with_the_links_of_as_many(pool) -> None:
    """A row weighs as among eight ranks, and a guest is not free, though one rank measures."""
    (costs,) = pool.run(virtual_costs, 1, 8)
    assert costs.row_bytes == int(32 * 4 * 8 * (1 - (7 / 8) ** 2) / 2) == LAYER.row_bytes(8)
    assert LAYER.row_bytes(1) == 32 * 4 // 2
    reference = default_costs()
    for name in ("inside", "between", "overlap", "handling"):
        assert getattr(costs, name) == getattr(reference, name)
    assert costs.row_forward > 0
    assert costs.row_backward > 0


def through_json(mesh: Mesh, costs: Costs) -> str:
    return calibrate.to_json(costs, mesh)


def test_costs_survive_json(pool) -> None:
    costs = dataclasses.replace(default_costs(), nodes=(0, 0, 1), kernels=(Measured("sums", 2e-3, 1e-3),))
    assert costs.by_torch == ["sums"]
    (text,) = pool.run(through_json, 1, costs)
    assert calibrate.from_json(text) == costs


def obtain(mesh: Mesh, cache: str, run: str, saved: str | None) -> list[Costs]:
    """Twice, with the machine's folder for profiles in `cache`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache)
        return [saved_costs.obtain(mesh, LAYER, Path(run), saved and Path(saved)) for _ in range(2)]


def test_costs_are_measured_once_and_kept(pool, tmp_path: Path) -> None:
    cache, first, second = tmp_path / "cache", tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (a, again), (b, _) = pool.run(obtain, 2, str(cache), str(first), None)
    assert a == again == b
    assert a.nodes == (0, 0)
    assert a.row_bytes == int(32 * 4 * 0.75)  # two experts of a token are on one rank half of the time
    for name in ("row_forward", "row_backward"):
        assert getattr(a, name) > 0
    assert a.inside.bandwidth > 0
    assert 0 <= a.overlap <= 1
    assert saved_costs.of_checkpoint(first) == a

    assert pool.run(obtain, 2, str(cache), str(second), None)[0][0] == a  # the machine's
    (kept,) = (cache / "moetrain" / "profiles").iterdir()
    (text, _) = pool.run(through_json, 2, dataclasses.replace(a, overlap=0.25))
    kept.write_text(text)
    assert pool.run(obtain, 2, str(cache), str(second), None)[0][0] == a  # the run's own goes before

    third = tmp_path / "third"
    third.mkdir()
    assert pool.run(obtain, 2, str(cache), str(third), str(first))[0][0] == a  # and the checkpoint's before all
    assert saved_costs.of_checkpoint(third) == a
    assert pool.run(obtain, 2, str(cache), str(third), str(first), ep=1)[0][0].row_bytes == 64  # another layout: anew


def seconds_by(torch_seconds: dict[str, float]) -> Callable[..., float]:
    """In place of `calibrate._time`: a part of the layer takes a second with our kernels, and so many with torch's."""

    def seconds(mesh: Mesh, work: Callable[[], object], clock: object = None) -> float:
        work()
        part = work.func.__name__ if isinstance(work, partial) else ""
        by_torch = part in PARTS and not work.args[0].has_own(part)
        return torch_seconds.get(part, 1.0) if by_torch else 1.0

    return seconds


def compared(mesh: Mesh, layer: calibrate.Layer, torch_seconds: list[dict[str, float]]) -> tuple[list[str], list[str]]:
    """(the parts compared, those that torch computes from now on) where ranks are as fast as that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_time", seconds_by(torch_seconds[mesh.rank]))
        found = calibrate._compare(mesh, calibrate.TimedExperts.for_layer(layer, 2, 4, mesh.device), None)
    return [each.part for each in found], [each.part for each in found if each.torch_is_faster]


def test_the_faster_kernels_are_used_and_all_ranks_use_the_same(pool) -> None:
    """Ours near a tie; products where this CPU has kernels for them."""
    slow, fast = {"sums": 0.9, "swiglu": 3.0, "products": 2.0}, {"sums": 0.5, "swiglu": 3.0, "products": 2.0}
    for dtype in (torch.float32, torch.bfloat16):
        layer = calibrate.Layer(32, 64, 8, 2, dtype)
        parts = ["sums", "swiglu", "products"][: 3 if cpu_gemm.able(dtype) else 2]
        assert pool.run(compared, 1, layer, [slow])[0] == (parts, [])
        assert pool.run(compared, 2, layer, [fast, slow]) == [(parts, ["sums"])] * 2  # as rank 0 has it


def losses_with(mesh: Mesh, cache: str, parts: list[str], overrides: list[str]) -> tuple[list[float], list[str]]:
    """(losses, what torch computed) of a run on a machine where torch is faster at `parts`; nothing is known of it."""
    chosen: list[KernelChoice] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache)
        use = LanguageModel.use_kernels
        patch.setattr(LanguageModel, "use_kernels", lambda model, choice: (chosen.append(choice), use(model, choice)))
        faster = dict.fromkeys(PARTS, 2.0) | dict.fromkeys(parts, 0.5)
        patch.setattr(calibrate, "_time", seconds_by(faster))
        folder = train(config.load(overrides), mesh)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/lm_loss"] for row in rows if "train/lm_loss" in row], sorted(chosen[-1].left_to_torch)


def test_a_run_goes_on_with_the_kernels_that_it_began_with(pool, tiny, tmp_path: Path) -> None:
    """Bit for bit, on a machine that would choose others now."""

    def of(name: str, steps: int, parts: list[str], cache: str) -> tuple[list[float], list[str]]:
        more = [*tiny, "planner=home", f"run.name={name}", f"train.steps={steps}", "optim.schedule=wsd"]
        return pool.run(losses_with, 1, str(tmp_path / cache), parts, [*more, "optim.decay_fraction=0.01"])[0]

    whole, by_torch = of("whole", 4, ["sums", "swiglu"], "one")
    assert by_torch == ["sums", "swiglu"]
    assert of("part", 2, ["sums", "swiglu"], "two") == (whole[:2], by_torch)
    assert of("part", 4, [], "three") == (whole, by_torch)
