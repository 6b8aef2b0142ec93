"""Every family of routers and experts: equal to a slow loop, and the same at every layout, planner and recompute."""

import dataclasses
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain import config, train
from moetrain.comm import all_gather
from moetrain.data import prepare
from moetrain.data.loader import Corpus, Loader
from moetrain.engine.native import NativeEngine
from moetrain.mesh import Mesh
from moetrain.moe.cost import default_costs
from moetrain.moe.experts import Experts

ZERO_COMPUTE = ["model.zero_experts=1", "model.copy_experts=2", "model.constant_experts=2"]
FAMILIES = {
    "topk": [],
    "sigmoid": ["router.scores=sigmoid", "router.scaling=2.5", "router.normalise=false"],
    "noise": ["router.noise=0.5"],
    "group-limited": ["router.scores=sigmoid", "router.groups=4", "router.top_groups=2"],
    "expert choice": ["router.name=expert_choice"],
    "top-p": ["router.name=top_p", "router.top_p=0.3"],
    "grouped": ["router.name=grouped"],
    "frozen": ["router.name=frozen", "router.top_k=4"],
    "gating residual": ["router.name=gating_residual", *ZERO_COMPUTE],
    "recurrent": ["router.name=recurrent", "router.state_dim=16"],
    "zero-compute": ZERO_COMPUTE,
    "chain": ["model.chain=3", "model.num_shared_experts=1"],
    "schedule": ["model.expert_schedule=descending", "model.min_experts=4", "router.k_schedule=ascending"],
}
LAYOUTS = [  # ranks, ep, overrides; a batch of 8 sequences
    (2, 2, ["planner=makespan", "train.recompute=full"]),
    (2, 2, ["planner=llep", "planner.min_rows=1", "train.micro_batch=2", "engine.guest_memory_mib=0"]),
    (4, 2, ["planner=makespan", "train.micro_batch=1", "train.recompute=full"]),
    (4, 4, ["planner=llep", "planner.min_rows=1", "train.micro_batch=1", "engine.max_rows=16"]),
]


class Watched(NativeEngine):
    """Keeps the gradients of the last step, gathered."""

    def step(self, lr: float) -> float:
        self.seen: dict[str, Tensor] = {}
        experts = {name for name, module in self.model.named_modules() if isinstance(module, Experts)}
        for name, parameter in self.model.named_parameters():
            grad = parameter.grad
            if grad is None:
                assert not parameter.requires_grad, name
                continue
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            if name.rpartition(".")[0] in experts:
                whole = all_gather(whole, self.mesh.ep.rows).flatten(0, 1)
            self.seen[name] = whole.clone()
        return super().step(lr)


def two_steps(mesh: Mesh, overrides: list[str]) -> tuple[list[float], dict[str, Tensor], int]:
    """Loss of two optimizer steps summed over ranks, gradients of the first, and how many guests there were."""
    settings = config.load(overrides)
    corpus = Corpus(prepare.ensure(settings.data))
    settings = train.with_vocabulary(settings, corpus)
    engine = Watched(train.build(settings), mesh, settings)
    engine.plan_with(dataclasses.replace(default_costs(), row_forward=1e-3, row_backward=2e-3))  # moving rows pays
    loader, losses, guests, seen = Loader(corpus, settings.train.seq_len, 0), [], 0, {}
    for step in range(2):
        engine.model.at_step(step, settings.train)
        shares = list(train.micro_batches(settings, mesh, loader, 8 * step))
        parts = train.optimizer_step(engine, settings, shares, lr=1e-2).parts
        seen = seen or engine.seen
        losses.append(float(sum(part.nats.sum() for part in parts)))
        guests += sum(len(s.plan.guests()) for part in parts for s in part.stats)
    return losses, seen, guests


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_agrees(pool: Any, tiny: list[str], family: str) -> None:
    """Losses of two steps and all gradients, to fp32 rounding, with experts moved."""
    more = [*tiny, *FAMILIES[family], "router.skew=0.7", "balance.coefficient=0", "model.init_std=0.1"]
    ((reference, gradients, _),) = pool.run(two_steps, 1, [*more, "planner=home"])
    for ranks, ep, options in LAYOUTS:
        found = pool.run(two_steps, ranks, [*more, *options], ep=ep)
        assert [sum(x) for x in zip(*(losses for losses, *_ in found), strict=True)] == pytest.approx(
            reference, rel=1e-5
        ), options
        assert family in ("expert choice", "top-p") or found[0][2] > 0, options
        for _, ours, _ in found:
            assert ours.keys() == gradients.keys()
            for name, grad in ours.items():
                scale = gradients[name].abs().max()
                assert (grad - gradients[name]).abs().max() <= 3e-5 * scale, (options, name)
