"""MoE layers in a loop that is not ours: one device as built, and `expert_parallel` around any module."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import moetrain
from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import Mesh
from tests import oracle

D, H, E = 16, 24, 8
FORCED = {"planner": "llep", "planner_options": {"min_rows": 1, "threshold": 1.0}}


class Model(nn.Module):
    """Two layers of experts between dense ones; `again` puts a checkpoint around each."""

    def __init__(self, again: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, D), nn.Linear(D, 8)
        skewed = {"skew": 3.0}
        self.moes = nn.ModuleList(moetrain.MoE(D, H, E, 2, router_options=skewed, init_std=0.3) for _ in range(2))
        self.again, self.reentrant = again, reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for moe in self.moes:
            run = lambda y, m=moe: y + m(torch.tanh(y))  # noqa: E731
            x = checkpoint(run, x, use_reentrant=self.reentrant) if self.again else run(x)
        return self.leave(x)


def make_model(**options: Any) -> Model:
    torch.manual_seed(3)
    return Model(**options)


def batch(rank: int, micro: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + micro)
    x, target = (torch.randn(tokens, 8, generator=generator) for _ in range(2))
    return x, target


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return (model(x) - target).square().sum()


def one_device(tokens: list[int], num_micro: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Gradients of the concatenated batch on one device, by name."""
    model = make_model()
    for micro in range(num_micro):
        parts = [batch(rank, micro, count) for rank, count in enumerate(tokens)]
        x, target = (torch.cat([part[i] for part in parts]) for i in range(2))
        (scale * loss_of(model, x, target)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def compare(handle: Any, model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Gradients of what is on this rank."""
    owners = {f"moes.{i}.experts": moe for i, moe in enumerate(model.moes)}
    for name, parameter in model.named_parameters():
        whole, owner = expected[name], owners.get(name.rpartition(".")[0])
        if owner is not None:
            whole = whole[owner.experts.own_experts()]
        grad = parameter.grad
        assert grad is not None, name
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(grad, whole, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("tokens", [20, 0])
def test_a_layer_runs_on_one_device_as_it_is_built(tokens: int) -> None:
    """No process group, no shard(), no profile; output and every gradient are those of the slow loop."""
    assert not dist.is_initialized()
    torch.manual_seed(0)
    layer = moetrain.MoE(dim=D, hidden=H, experts=E, top_k=2, init_std=0.3)
    x, upstream = torch.randn(tokens, D, requires_grad=True), torch.randn(tokens, D)
    layer(x).backward(upstream)
    found = {"x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}
    slow = copy.deepcopy(layer)
    slow.zero_grad()
    x2 = x.detach().clone().requires_grad_()
    routing, _ = slow.router(x2)
    y = oracle.moe(x2, routing, slow.experts.gate_up, slow.experts.down)
    torch.testing.assert_close(layer(x), y)
    if tokens:
        y.backward(upstream)
        theirs = {"x": x2.grad, **{name: p.grad for name, p in slow.named_parameters()}}
        for name, grad in theirs.items():
            torch.testing.assert_close(found[name], grad, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    sequences = torch.randn(2, 5, D)
    assert layer(sequences).shape == sequences.shape
    assert 0 < layer.experts.down.std() < 1


def plain_loop(mesh: Mesh, tokens: list[int], num_micro: int, model_options: dict[str, Any], options: Any) -> None:
    model = make_model(**model_options)
    if mesh.rank:
        torch.manual_seed(7)  # parameters become rank 0's
        model = Model(**model_options)
    in_steps = options.pop("in_steps", True)
    handle = moetrain.expert_parallel(model, dist.group.WORLD, **FORCED, **options)
    for _ in range(2):  # a second step finds nothing of the first
        model.zero_grad()
        if in_steps:
            handle.begin_step(num_micro)
        for micro in range(num_micro):
            x, target = batch(mesh.rank, micro, tokens[mesh.rank])
            loss_of(model, x, target).backward()
        if in_steps:
            handle.end_step()
        handle.reduce_dense_gradients()
        compare(handle, model, one_device(tokens, num_micro))
    found = handle.statistics()
    assert [layer.name for layer in found] == ["moes.0", "moes.1"]
    for layer in found:
        assert layer.counts.sum() == 2 * sum(tokens) * (num_micro if in_steps else 1)
        assert layer.loads_after.sum() == layer.loads_before.sum() == layer.counts.sum()
        assert layer.guests
        assert layer.imbalance_after < layer.imbalance_before


@pytest.mark.parametrize("num_micro", [1, 3])
@pytest.mark.parametrize(
    ("model_options", "options"),
    [
        ({}, {}),
        ({}, {"in_steps": False}),
        ({}, {"guest_slots": 0}),
        ({}, {"recompute": "selective"}),
        ({}, {"recompute": "full", "max_rows": 8}),
        ({"again": True}, {}),
        ({"again": True, "reentrant": True}, {}),
    ],
    ids=str,
)
def test_gradients_in_a_plain_loop_equal_one_device(
    pool: Any, num_micro: int, model_options: Any, options: Any
) -> None:
    pool.run(plain_loop, 2, [14, 9], num_micro, model_options, options)


def test_a_rank_without_tokens_does_its_part(pool: Any) -> None:
    pool.run(plain_loop, 2, [14, 0], 2, {}, {})


def under_ddp(mesh: Mesh) -> None:
    model = make_model()
    handle = moetrain.expert_parallel(model, dist.group.WORLD, **FORCED)
    wrapped = DistributedDataParallel(model)
    with handle.step(2):
        for micro in range(2):
            x, target = batch(mesh.rank, micro, 12)
            context = wrapped.no_sync() if micro == 0 else torch.enable_grad()
            with context:
                loss_of(wrapped, x, target).backward()
    assert handle.averages
    compare(handle, model, one_device([12, 12], 2, scale=0.5))


def test_with_ddp_around_the_module(pool: Any) -> None:
    """The gradient of the mean of the ranks' losses, experts' too; DDP leaves experts alone."""
    pool.run(under_ddp, 2)


def under_fsdp(mesh: Mesh) -> float:
    model = make_model()
    handle = moetrain.expert_parallel(model, dist.group.WORLD, **FORCED)
    axis = init_device_mesh("cpu", (2,), mesh_dim_names=("all",))
    fully_shard(model, mesh=axis, ignored_params=handle.expert_parameters())
    with handle.step():
        x, target = batch(mesh.rank, 0, 12)
        loss_of(model, x, target).backward()
    assert handle.averages
    compare(handle, model, one_device([12, 12], 1, scale=0.5))
    whole = handle.full_state_dict()
    for name, value in make_model().state_dict().items():
        torch.testing.assert_close(whole[name], value, rtol=0, atol=0)
    handle.load_full_state_dict({name: value + 1 for name, value in whole.items()})
    again = handle.full_state_dict()
    assert all(torch.equal(again[name], value + 1) for name, value in whole.items())
    return handle.clip_grad_norm_(0.0)


def test_with_fsdp2_around_the_dense_part(pool: Any) -> None:
    expected = torch.stack([grad.norm() for grad in one_device([12, 12], 1, scale=0.5).values()]).norm()
    assert pool.run(under_fsdp, 2) == pytest.approx([float(expected)] * 2, rel=1e-4)


def clipped(mesh: Mesh) -> float:
    """Two groups of two ranks, which hold the same experts: a mesh of two axes."""
    axes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "ep"))
    model = make_model()
    handle = moetrain.expert_parallel(model, axes["ep"], replicas=axes["data"], **FORCED)
    with handle.step():
        x, target = batch(mesh.rank, 0, 6)
        loss_of(model, x, target).backward()
    handle.reduce_dense_gradients()
    expected = one_device([6] * 4, 1)
    compare(handle, model, expected)
    norm = handle.clip_grad_norm_(1.0)
    compare(handle, model, {name: grad / norm for name, grad in expected.items()})
    return norm


def test_replicas_of_experts_and_the_exact_norm(pool: Any) -> None:
    expected = torch.stack([grad.norm() for grad in one_device([6] * 4, 1).values()]).norm()
    assert pool.run(clipped, 4) == pytest.approx([float(expected)] * 4, rel=1e-5)


OPTIONS = {"coefficient": 0.1, "z_coefficient": 0.01}


def balanced(mesh: Mesh, reduction: str) -> tuple[float, Tensor]:
    """The ranks' shares of the balance loss, and the router's gradient of it alone."""
    model = make_model()
    options = moetrain.BalanceOptions(**OPTIONS)
    handle = moetrain.expert_parallel(model, dist.group.WORLD, **FORCED, reduction=reduction, balance=options)
    with handle.step():
        y = model(batch(mesh.rank, 0, 12)[0])  # whose graph keeps the statistics
        loss = handle.balance_loss()
        loss.backward(inputs=list(model.moes[0].router.parameters()))
    assert len(y) == 12
    return float(loss.detach()), model.moes[0].router.weight.grad


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_balance_loss_is_that_of_the_global_batch(pool: Any, reduction: str) -> None:
    model = make_model()
    x = torch.cat([batch(rank, 0, 12)[0] for rank in range(2)])
    alone = moetrain.expert_parallel(model, None, balance=moetrain.BalanceOptions(**OPTIONS))
    y = model(x)
    expected = alone.balance_loss()
    expected.backward(inputs=list(model.moes[0].router.parameters()))
    assert len(y) == 24
    (one, first), (two, second) = pool.run(balanced, 2, reduction)
    share = 2 if reduction == "mean" else 1
    assert (one + two) / share == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close((first + second) / share, model.moes[0].router.weight.grad)


def measured(mesh: Mesh) -> list[float]:
    """A fresh loop with a skewed router, without costs."""
    torch.manual_seed(0)
    layer = moetrain.MoE(dim=64, hidden=256, experts=4, top_k=1, router_options={"skew": 20.0})
    handle = moetrain.expert_parallel(layer, dist.group.WORLD)
    with handle.step():
        layer(torch.randn(1024, 64)).sum().backward()
    found = handle.statistics()[0]
    return [found.imbalance_before, found.imbalance_after, len(found.guests)]


def test_makespan_lends_without_a_profile(pool: Any) -> None:
    first, second = pool.run(measured, 2)
    assert first == second
    assert first[0] == 2.0
    assert first[1] < 1.5
    assert first[2] >= 1


def refusals(mesh: Mesh) -> None:
    for arguments, rule in (
        ((nn.Linear(8, 8), dist.group.WORLD), "module: has no moetrain.MoE layer"),
        ((moetrain.MoE(8, 8, 1, 1), dist.group.WORLD), "group: has 2 ranks"),
        ((make_model(), init_device_mesh("cpu", (1, 2))), "group: must be one axis"),
        ((make_model(), dist.group.WORLD, "magic"), "planner.name=magic: known planners are home"),
        ((make_model(), dist.group.WORLD, "llep", {"alpha": 0.5}), "planner.alpha=0.5: must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=rule):
            moetrain.expert_parallel(*arguments)
    model = make_model()
    handle = moetrain.expert_parallel(model, dist.group.WORLD, **FORCED)
    with pytest.raises(RuntimeError, match=r"begin_step\(2\): the layer moes.0 has had fewer backwards"):
        with handle.step(2):
            loss_of(model, *batch(mesh.rank, 0, 12)).backward()


def test_mistakes_are_told_in_one_line(pool: Any) -> None:
    pool.run(refusals, 2)


def test_options_are_checked_without_a_configuration() -> None:
    for arguments, rule in (
        ({"top_k": 9}, "top_k=9: must be at most the number of experts, 8"),
        ({"router": "magic"}, "router.name=magic: known routers are topk"),
        ({"router_options": {"heat": 1}}, "router.heat=1: the router topk has no such option"),
        ({"router_options": {"noise": -1}}, "router.noise=-1.0: must be at least 0"),
        ({"router_options": {"scores": "relu"}}, "router.scores=relu: must be one of softmax, sigmoid"),
    ):
        with pytest.raises(ConfigError, match=rule):
            moetrain.MoE(D, H, E, **arguments)
    with pytest.raises(ConfigError, match="dim=12: must be a multiple of 8"):
        moetrain.MoE(12, H, E)


def test_counts_of_micro_steps_to_come_are_not_invented() -> None:
    layer = moetrain.MoE(dim=16, hidden=16, experts=4)
    handle = moetrain.expert_parallel(layer, None, balance=moetrain.BalanceOptions(accumulate="exact"))
    handle.begin_step(2)
    y = layer(torch.randn(8, 16))
    assert y.requires_grad
    with pytest.raises(ConfigError, match=r"balance\.accumulate=exact: does not know the micro-steps to come"):
        handle.balance_loss()
