"""`auto`: what it takes of a device, of ranks that differ; what a run began with stays; slow bf16 is said once."""

import json

import pytest
import torch
import yaml

from moetrain import checkpoint, config
from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import Mesh
from moetrain.engine import precision
from moetrain.training.loop import train

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
    monkeypatch.setattr(precision.time, "thread_time", lambda: clock[0])
    assert precision.speed_of_bf16(CPU) == pytest.approx(1 / 20)
    assert clock[0] < 0.1


def agree(mesh: Mesh, speeds: list[float]) -> list[tuple[str, list[str]]]:
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "speed_of_bf16", lambda _: speeds[mesh.rank])
        for asked in ("auto", "bf16", "fp32"):
            said: list[str] = []
            found.append((precision.agree_on_dtype(asked, mesh, said.append), said))
    return found


def test_ranks_take_what_all_of_them_do_well(pool) -> None:
    """Rank 0 says where bf16 is slow, the others say nothing."""
    slow = "bf16 products take 50 times as long as fp32 ones here"
    warned = f"computes in bf16: {slow}; fp32 would be faster"
    for speeds, dtype, told in (
        ([4.0, 3.0], "bf16", [[], [], []]),
        ([4.0, 0.02], "fp32", [[f"computes in fp32: {slow}"], [warned], []]),
    ):
        first, second = pool.run(agree, 2, speeds)
        assert first == list(zip((dtype, "bf16", "fp32"), told, strict=True))
        assert second == [(taken, []) for taken, _ in first]


def refusal(mesh: Mesh, kept: str) -> str:
    try:
        return precision.find_dtype(config.load(["model=tiny", "train.dtype=auto"]), mesh, kept)
    except ConfigError as error:
        return str(error)


def test_a_dtype_that_this_version_does_not_know_is_not_taken_for_another(pool) -> None:
    """As a run of a later version may have it, or a damaged one; only rank 0 has read it."""
    assert pool.run(refusal, 2, "fp8") == ["train.dtype=fp8: must be one of auto, fp32, bf16"] * 2


def trained(mesh: Mesh, speed: float, overrides: list[str]) -> tuple[str, str, str]:
    """(what the run computes in, what its checkpoint says, what it wrote to its log) on such a device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "speed_of_bf16", lambda _: speed)
        folder = train(config.load(overrides), mesh)
    saved = checkpoint.newest(folder)
    assert saved is not None
    manifest = json.loads((saved / "manifest.json").read_text())
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    return kept["train"]["dtype"], manifest["config"]["train"]["dtype"], (folder / "log.txt").read_text()


def test_a_run_keeps_what_it_began_with(pool, tiny) -> None:
    """Whatever the device is later; a run of another name that goes on from its checkpoint keeps it, too."""
    auto = [*tiny, "train.dtype=auto", "checkpoint.every=1"]
    (dtype, of_checkpoint, log) = pool.run(trained, 1, 0.01, [*auto, "run.name=first", "train.steps=1"])[0]
    assert (dtype, of_checkpoint) == ("fp32", "fp32")
    assert log.count("computes in fp32: bf16 products take 100 times as long as fp32 ones here") == 1
    assert pool.run(trained, 1, 4.0, [*auto, "run.name=first", "train.steps=2"])[0][:2] == ("fp32", "fp32")
    (folder,) = (o.removeprefix("run.dir=") for o in tiny if o.startswith("run.dir="))
    first = f"checkpoint.resume={folder}/first/checkpoints/step_1"
    assert pool.run(trained, 1, 4.0, [*auto, first, "run.name=second", "train.steps=2"])[0][0] == "fp32"
    asked = [*auto, first, "run.name=third", "train.steps=2", "train.dtype=bf16"]
    dtype, _, log = pool.run(trained, 1, 0.01, asked)[0]
    assert dtype == "bf16"
    assert (
        log.count("computes in bf16: bf16 products take 100 times as long as fp32 ones here; fp32 would be faster") == 1
    )
