"""The CUDA branches without a GPU: no operation mixes devices, and what the host does for a layer keeps to a budget."""

from collections import Counter
from contextlib import ExitStack
from unittest import mock

import pytest
import torch

from moetrain import config
from moetrain.config.core_options import balance_options
from moetrain.distributed import comm
from moetrain.distributed.mesh import Mesh
from moetrain.models.initialise import initialise
from moetrain.models.transformer import build_moe
from moetrain.moe.kernels.api import KernelChoice, use_kernels
from moetrain.moe.layer import MoE
from moetrain.moe.routing.balance import BalanceLoss
from moetrain.observe.collect.health import RouterSums
from moetrain.training.step import build
from tests.moe.on_device import OnGpu, backward, device, interpreting_triton, to_gpu
from tests.moe.routing.test_routers import FAMILIES
from tests.pool import Pool

LOSSES = ["balance.micro_fraction=0.5", "balance.sequence_coefficient=0.1", "balance.device_coefficient=0.1"]
LOSSES += ["balance.entropy_coefficient=0.1", "balance.bias=sign"]
LENT = ["planner=llep", "planner.min_rows=1", "router.skew=6"]
SETTINGS = {
    **FAMILIES,
    "lent": LENT,
    "recompute": ["train.recompute=full", *LENT],
    "recompute selective": ["train.recompute=selective", "data.attend_within_documents=true", *LENT],
    "in pieces": ["engine.max_rows=16", "router.capacity_factor=1.5", *LENT],
    "losses": LOSSES,
    "hold": ["balance.accumulate=hold", "balance.scope=global"],
    "exact": ["balance.accumulate=exact"],
}
BUDGET = {  # of one MoE layer on one of two ranks: its forward, its backward; products are torch's, one a segment
    ("torch", "balanced"): (
        {"waits": 2, "copies": 1, "launches": 107, "events": 28},
        {"waits": 0, "copies": 0, "launches": 90},
    ),
    ("torch", "lent"): (
        {"waits": 2, "copies": 1, "launches": 113, "events": 28},
        {"waits": 0, "copies": 0, "launches": 94},
    ),
    ("triton", "balanced"): (
        {"waits": 2, "copies": 1, "launches": 49, "events": 28},
        {"waits": 0, "copies": 0, "launches": 46},
    ),
    ("triton", "lent"): (
        {"waits": 2, "copies": 1, "launches": 55, "events": 28},
        {"waits": 0, "copies": 0, "launches": 50},
    ),
}


def one_step(mesh: Mesh, overrides: list[str]) -> int:
    """Forward, all losses and backward of a whole model. Returns how many experts were lent."""
    settings = config.load(["model=tiny", "model.vocab_size=50", "train.seq_len=16", "train.dtype=fp32", *overrides])
    model = build(settings).to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts.shard(mesh.ep, 1, settings.engine.max_rows, settings.train.recompute != "selective")
    initialise(model, 0)
    use_kernels(model, KernelChoice(backend="torch"))
    to_gpu(model)
    model.at_step(0, settings.train)
    generator = torch.Generator().manual_seed(mesh.rank)
    tokens = torch.randint(0, 50, (2, 17), generator=generator)
    about = [torch.zeros(2, 16, dtype=torch.int64) for _ in range(2)]
    document, domain, sample, inputs, targets = (
        OnGpu(x) for x in (*about, torch.arange(2), tokens[:, :-1], tokens[:, 1:])
    )
    with mock.patch.dict(comm._transports, clear=True), device():
        balance = BalanceLoss(balance_options(settings.balance), model.routers, 64, 16, mesh.ep.size)
        within = document if settings.data.attend_within_documents else None
        choices = balance.foresee(model.count(inputs, within, domain, sample)) if balance.looks_ahead else None
        nats, stats = model(inputs, targets, within, domain, sample, choices)
        RouterSums.collect(stats)
        backward(nats.sum() / 64 + balance.losses(stats).weighted, OnGpu(torch.ones(())))
        balance.finish()
    assert all(
        isinstance(p.grad, OnGpu) for p in model.parameters() if p.requires_grad and len(p) and p.grad is not None
    )
    return sum(s.num_lent for s in stats)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_operation_mixes_devices(pool: Pool, name: str) -> None:
    lent = pool.run(one_step, 2, SETTINGS[name])
    assert lent[0] == lent[1]
    assert lent[0] or "router.skew=6" not in SETTINGS[name]


def one_layer(mesh: Mesh, overrides: list[str], backend: str) -> tuple[Counter[str], Counter[str], int]:
    """(forward, backward) what the host does; experts lent."""
    settings = config.load(["model=tiny", *overrides])
    torch.manual_seed(0)
    layer = build_moe(settings.model, settings.router, settings.planner)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.1)
    layer.experts.shard(mesh.ep)
    use_kernels(layer, KernelChoice(backend=backend))
    to_gpu(layer)
    x_TD = OnGpu(torch.randn(64, settings.model.dim)).requires_grad_()
    upstream_TD = OnGpu(torch.randn(64, settings.model.dim))
    with mock.patch.dict(comm._transports, clear=True), device() as counted, ExitStack() as stack:
        if backend == "triton":
            stack.enter_context(interpreting_triton())
        y_TD, stats, _ = layer.forward_with_stats(x_TD)
        forward = counted.copy()
        backward(y_TD, upstream_TD)
    return forward, counted - forward, stats.num_lent


@pytest.mark.parametrize(("backend", "name"), BUDGET)
def test_a_layer_keeps_to_its_budget(pool: Pool, backend: str, name: str) -> None:
    if backend == "triton":
        triton = pytest.importorskip("triton", reason="Triton is there on x86-64 Linux only")
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):  # with numpy 2.4
            pytest.skip("no loops with loaded bounds")
    for forth, back, lent in pool.run(one_layer, 2, LENT if name == "lent" else ["planner=home"], backend):
        assert (lent > 0) == (name == "lent")
        for counted, budget in zip((forth, back), BUDGET[backend, name], strict=True):
            assert all(counted[what] <= most for what, most in budget.items()), (forth, back)
