"""Memory beside the estimate of a dry run: states agree exactly, and the peak is where the backward begins or ends."""

from dataclasses import replace

import pytest

from moetrain import config
from moetrain.observe.estimate import estimate
from moetrain.simulate import request
from moetrain.simulate.memory import predict_memory
from moetrain.simulate.predict import predict

QWEN = ["model=qwen3_30b_a3b", "parallel.ep=8", "train.seq_len=4096", "train.micro_batch=1", "train.global_batch=64"]
OLMOE = ["model=olmoe_1b7b", "parallel.ep=8", "train.seq_len=4096", "train.micro_batch=1", "train.global_batch=8"]


@pytest.mark.parametrize(("words", "world"), [(QWEN, 64), (OLMOE, 8)])
def test_states_are_those_of_the_estimate(words: list[str], world: int) -> None:
    settings = config.resolve_early(config.load([*words, f"parallel.nproc={world}"]), world)
    counted = estimate(settings)
    asked = request.read([*words, f"cluster=h100x{world}"])
    parts = predict(asked.job, "balanced", asked.planner).memory.parts
    assert parts["masters"] == pytest.approx(counted.masters, rel=1e-3)
    assert parts["moments"] == pytest.approx(counted.moments, rel=1e-3)
    assert parts["parameters in use"] == pytest.approx(counted.gathered, rel=0.25)
    assert parts["gradients"] in (0.0, pytest.approx(counted.masters, rel=1e-3))


def test_activations_and_gradients_are_not_there_at_once() -> None:
    job = request.read([*QWEN, "cluster=h100x64"]).job
    none, full = (
        predict(replace(job, work=replace(job.work, recompute=recompute))).memory.parts
        for recompute in ("none", "full")
    )
    assert none["gradients"] == 0  # activations are more
    assert full["activations"] < none["activations"]
    steps = replace(job, work=replace(job.work, global_batch=128))  # two micro-steps: gradients stay
    assert predict(steps).memory.parts["gradients"] > 0


def test_what_lies_elsewhere_is_not_on_the_device() -> None:
    job = request.read([*QWEN, "cluster=h100x64"]).job
    there = predict_memory(replace(job, work=replace(job.work, offload=True)), [])
    assert there.on_device == pytest.approx(there.total - there.parts["states in host memory"])
    assert there.fits(job.cluster)
    small = job.cluster.model_copy(update={"memory": job.cluster.memory.model_copy(update={"capacity": 1e9})})
    assert not there.fits(small)


def test_pipeline_stages_hold_micro_batches_in_flight() -> None:
    job = request.read([*QWEN, "cluster=h100x64", "train.global_batch=512"]).job
    totals = []
    for pp in (1, 2, 4):
        layout = replace(job.layout, pp=pp)
        totals.append(predict_memory(replace(job, layout=layout), []).parts["activations"])
    assert totals[1] == pytest.approx(totals[0], rel=0.05)  # half of the layers, two micro-batches
    assert totals[2] == pytest.approx(totals[0], rel=0.05)
