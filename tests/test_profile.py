"""Measured costs: sound, the same on every rank, kept with the run, its checkpoints and the machine."""

import dataclasses
from pathlib import Path

import pytest
import torch

from moetrain import profile
from moetrain.mesh import Mesh
from moetrain.moe.cost import Costs, default_costs

LAYER = profile.Layer(32, 48, 2, torch.float32)


def through_json(mesh: Mesh, costs: Costs) -> str:
    return profile.to_json(costs, mesh)


def test_costs_survive_json(pool) -> None:
    costs = dataclasses.replace(default_costs(), nodes=(0, 0, 1))
    (text,) = pool.run(through_json, 1, costs)
    assert profile.from_json(text) == costs


def obtain(mesh: Mesh, cache: str, run: str, saved: str | None) -> list[Costs]:
    """Twice, with the machine's folder for profiles in `cache`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", cache)
        return [profile.obtain(mesh, LAYER, Path(run), saved and Path(saved)) for _ in range(2)]


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
    assert profile.of_checkpoint(first) == a

    assert pool.run(obtain, 2, str(cache), str(second), None)[0][0] == a  # the machine's
    (kept,) = (cache / "moetrain" / "profiles").iterdir()
    (text, _) = pool.run(through_json, 2, dataclasses.replace(a, overlap=0.25))
    kept.write_text(text)
    assert pool.run(obtain, 2, str(cache), str(second), None)[0][0] == a  # the run's own goes before

    third = tmp_path / "third"
    third.mkdir()
    assert pool.run(obtain, 2, str(cache), str(third), str(first))[0][0] == a  # and the checkpoint's before all
    assert profile.of_checkpoint(third) == a
    assert pool.run(obtain, 2, str(cache), str(third), str(first), ep=1)[0][0].row_bytes == 64  # another layout: anew
