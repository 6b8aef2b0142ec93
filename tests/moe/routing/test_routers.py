"""Every family of routers and experts: equal to a slow loop, and the same at every layout, planner and recompute."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain import config
from moetrain.config.core_options import router_options
from moetrain.data import prepare
from moetrain.data.loader import Corpus, Loader
from moetrain.distributed.comm import all_gather
from moetrain.distributed.mesh import Mesh
from moetrain.engine.native import NativeEngine
from moetrain.models.transformer import build_moe
from moetrain.moe.experts import Experts
from moetrain.moe.layer import MoE
from moetrain.moe.planning.cost import default_costs
from moetrain.moe.routing import ROUTERS, Place
from moetrain.training.loop import train
from moetrain.training.step import build, micro_batches, optimizer_step
from tests.grid import on_grid

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
    settings = config.resolve(settings, mesh.world, corpus.vocab_size, "fp32")
    engine = Watched(build(settings), mesh, settings)
    engine.plan_with(dataclasses.replace(default_costs(), row_forward=1e-3, row_backward=2e-3))  # moving rows pays
    loader, losses, guests, seen = Loader(corpus, settings.train.seq_len, 0), [], 0, {}
    for step in range(2):
        engine.model.at_step(step, settings.train)
        shares = list(micro_batches(settings, mesh, loader, 8 * step))
        parts = optimizer_step(engine, settings, shares, lr=1e-2).parts
        seen = seen or engine.seen
        losses.append(float(sum(part.nats.sum() for part in parts)))
        guests += sum(len(s.plan.guests()) for part in parts for s in part.stats)
    return losses, seen, guests


SOME = ("topk", "expert choice", "zero-compute", "chain")


@pytest.mark.parametrize("family", [name if name in SOME else on_grid(name) for name in FAMILIES])
def test_every_layout_agrees(pool: Any, tiny: list[str], family: str) -> None:
    """Losses of two steps and all gradients, to fp32 rounding, with experts moved."""
    more = [*tiny, *FAMILIES[family], "router.skew=0.7", "balance.coefficient=0.1", "balance.accumulate=exact"]
    more += ["model.init_std=0.1"]
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


def layer_of(overrides: list[str]) -> tuple[config.Config, MoE]:
    """A layer of the tiny model with random weights, and the carry's maker drawn too."""
    settings = config.load(["model=tiny", "planner=llep", "planner.min_rows=1", *overrides])
    layer = build_moe(settings.model, settings.router, settings.planner)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
    return settings, layer


def one_by_one(layer: MoE, x_TD: Tensor, gate_up: Tensor, down: Tensor, carry: Any, place: Place) -> Tensor:
    """The specification: every token on its own, every selection on its own."""
    routing, _ = layer.router(x_TD, carry, place)
    zero = layer.zero_compute
    rows = [torch.zeros_like(x) for x in x_TD]
    num_ffn, num_zero, num_copy = len(gate_up), *((zero.num_zero, zero.num_copy) if zero else (0, 0))
    room = {}
    if layer.capacity_factor is not None:
        weights = layer.room_weights or (1.0,) * layer.router.num_experts
        share = [layer.capacity_factor * len(routing.token_N) * w / sum(weights) for w in weights]
        room = {e: -int(-s // 1) for e, s in enumerate(share)}
    selections = list(zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N, strict=True))
    turn = [sum(t == token for t, *_ in selections[:n]) for n, (token, *_) in enumerate(selections)]
    for n in sorted(range(len(selections)), key=lambda n: (turn[n], selections[n][0])):  # first choices come first
        token, expert, weight = selections[n]
        x = x_TD[token]
        if room:
            room[expert] -= 1
            if room[expert] < 0:
                continue
        if expert < num_ffn:
            gate, up = (gate_up[expert] @ x).chunk(2)
            y = down[expert] @ (F.silu(gate) * up)
        elif expert < num_ffn + num_zero:
            y = torch.zeros_like(x)
        elif expert < num_ffn + num_zero + num_copy:
            y = x
        else:
            constant = expert - num_ffn - num_zero - num_copy
            alpha = (zero.mix[constant] @ x).softmax(0)
            y = alpha[0] * x + alpha[1] * zero.vector[constant]
        rows[token] = rows[token] + weight * y
    return torch.stack(rows) if rows else x_TD * 0


def against_the_loop(mesh: Mesh, overrides: list[str], sequences: tuple[int, int] = (2, 2)) -> float:
    """Output and gradients of inputs and small parameters, with so many sequences on the ranks; the share of selections
    that was dropped."""
    settings, layer = layer_of(overrides)
    gate_up, down = layer.experts.gate_up.detach().clone(), layer.experts.down.detach().clone()
    layer.experts.shard(mesh.ep)
    for router in layer.routers:
        router.at_step(settings.train.steps // 2, settings.train.steps, settings.train.seed)
    draw = torch.Generator().manual_seed(mesh.rank)
    count = sequences[mesh.rank]
    x, upstream = (torch.randn(10 * count, settings.model.dim, generator=draw) for _ in range(2))
    place = Place(10, torch.arange(count) + 3 * mesh.rank, torch.randint(0, 4, (10 * count,), generator=draw))
    shared = ROUTERS[settings.router.name].shared(router_options(settings.router))
    if shared is not None:
        for parameter in shared.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    found, carry = [], None if shared is None else shared()
    small = [p for name, p in layer.named_parameters() if "experts" not in name and p.requires_grad]
    for way in ("layer", "loop"):
        leaf = x.clone().requires_grad_()
        if way == "layer":
            y, stats, _ = layer.forward_with_stats(leaf, carry, place)
        else:
            y = one_by_one(layer, leaf, gate_up, down, carry, place)
        found.append([y, *torch.autograd.grad(y, [leaf, *small], upstream, allow_unused=True)])
    for ours, theirs in zip(*found, strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    return 1 - float(stats.kept_E.sum() / stats.counts_E.sum().clamp(min=1)) if count else 0.0


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("chain", "schedule")])
def test_the_layer_equals_the_loop(pool: Any, family: str) -> None:
    assert pool.run(against_the_loop, 2, FAMILIES[family]) == [0.0, 0.0]
    assert pool.run(against_the_loop, 2, FAMILIES[family], (2, 0)) == [0.0, 0.0]


@pytest.mark.parametrize("family", ["topk", "top-p", "zero-compute"])
def test_what_finds_no_room_is_dropped(pool: Any, family: str) -> None:
    """The loop drops one by one, first choices first; the layer all at once."""
    more = [*FAMILIES[family], "router.skew=1", "router.capacity_factor=1"]
    assert all(0.05 < dropped < 0.9 for dropped in pool.run(against_the_loop, 2, more))


def trained(mesh: Mesh, overrides: list[str]) -> str:
    return str(train(config.load(overrides), mesh))


@pytest.mark.parametrize("family", ["frozen", "recurrent", "zero-compute", "chain", "schedule", "top-p"])
def test_a_run_saves_resumes_and_reports(pool: Any, tiny: list[str], family: str) -> None:
    """Two steps, then two more from the checkpoint at another layout: the curve of four in one go."""
    more = [*tiny, *FAMILIES[family], "eval.every=3", "train.steps=4", "checkpoint.every=2"]
    whole = Path(pool.run(trained, 2, [*more, "run.name=whole"])[0])
    saved = whole / "checkpoints" / "step_2"
    part = Path(pool.run(trained, 1, [*more, "run.name=part", f"checkpoint.resume={saved}"])[0])
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (whole, part)]
    curves = [[row["train/lm_loss"] for row in run if "train/loss" in row] for run in rows]
    assert curves[1] == pytest.approx(curves[0][2:], rel=1e-4)
    settings = config.load(more)
    step = rows[0][0]
    assert step["balance/dropped_fraction"] == 0
    expected = {"frozen": 1.0, "top-p": None}.get(family, 2.0)
    assert expected is None or step["balance/experts_per_token"] == pytest.approx(expected)
    for name in settings.model.pass_names:
        assert sum(step[f"balance/{name}/load"]) == pytest.approx(1)
