"""With `balance.accumulate=exact` a step is that of one device on the whole batch, however the batch is split."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain import config
from moetrain.config.core_options import balance_options
from moetrain.data import prepare
from moetrain.data.loader import Corpus, Loader
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.engine.native import NativeEngine
from moetrain.moe.planning.cost import default_costs
from moetrain.moe.routing.balance import BalanceLoss
from moetrain.training.step import Batch, build, micro_batches, optimizer_step
from tests.grid import sample

NEAR = 3e-5  # of the largest element
LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]  # ranks, ranks of an expert group
LOSSES = ["coefficient=1", "sequence_coefficient=0.2", "device_coefficient=0.2", "device_groups=4"]
LOSSES += ["entropy_coefficient=0.1", "z_coefficient=0.1", "bias=sign", "bias_rate=0.01"]
STEP = ["train.global_batch=16", "train.seq_len=16", "router.skew=0.5", "optim.clip=0"]
STEP += ["optim.eps=0.01"]  # an update that is smooth in the gradient: without it AdamW's first is its sign


def started(mesh: Mesh, overrides: list[str]) -> tuple[NativeEngine, config.RunSpec, list[Any]]:
    settings = config.load(overrides)
    corpus = Corpus(prepare.ensure(settings.data))
    settings = config.resolve(settings, mesh.world, corpus.vocab_size, "fp32")
    engine = NativeEngine(build(settings), mesh, settings)
    engine.plan_with(replace(default_costs(), row_forward=1.0, row_backward=2.0))  # lending is nothing against rows
    return engine, settings, list(micro_batches(settings, mesh, Loader(corpus, settings.train.seq_len, 0), 0))


class Part(NamedTuple):
    """What a rank has of a tensor."""

    values: Tensor
    is_cut: bool  # along its first dimension, over ranks; else every rank has all of it

    @classmethod
    def take(cls, name: str, tensor: Tensor) -> "Part":
        is_cut = isinstance(tensor, DTensor)
        return cls((tensor.to_local() if is_cut else tensor).detach().clone(), is_cut or ".experts." in name)


Found = dict[str, Part]  # by name


def join(parts: list[Part], name: str, ep: int) -> list[Tensor]:
    """The tensor that ranks have parts of, once, or as often as it is whole on one."""
    values = [part.values for part in parts]
    if not parts[0].is_cut:
        return values
    groups = [values[e::ep] for e in range(ep)] if ".experts." in name else [values]
    return [torch.cat([torch.cat(group) for group in groups])]


def steps(mesh: Mesh, base: list[str], variants: list[list[str]]) -> list[tuple[Found, int]]:
    """For every variant of the overrides one step: (loss, gradients, new weights and biases; guests)."""
    out = []
    for variant in variants:
        engine, settings, shares = started(mesh, [*base, *variant])
        found: Found = {}

        def keep(*_: Any, engine: NativeEngine = engine, found: Found = found) -> None:
            for name, parameter in engine.model.named_parameters():
                assert parameter.grad is not None, name
                found[f"gradient of {name}"] = Part.take(name, parameter.grad)

        engine.optimizer.register_step_pre_hook(keep)
        step = optimizer_step(engine, settings, shares, lr=0.05)
        tokens = settings.train.global_batch * settings.train.seq_len
        loss = torch.stack([part.nats.sum() / tokens + part.losses.weighted for part in step.parts]).sum()
        found["loss"] = Part.take("loss", all_reduce_sum(loss))
        found |= {name: Part.take(name, parameter) for name, parameter in engine.model.named_parameters()}
        found |= {name: Part.take(name, buffer) for name, buffer in engine.model.named_buffers()}
        out.append((found, sum(len(s.plan.guests()) for part in step.parts for s in part.stats)))
    return out


def exact(micro_steps: int, ranks: int) -> list[str]:
    size = 16 // (ranks * micro_steps)
    return ["balance.accumulate=exact", f"train.micro_batch={size}", *(f"balance.{x}" for x in LOSSES)]


def assert_equal(ranks: list[Found], ep: int, theirs: dict[str, Tensor], case: Any) -> None:
    assert all(found.keys() == theirs.keys() for found in ranks)
    for name, value in theirs.items():
        for ours in join([found[name] for found in ranks], name, ep):
            assert (ours - value).abs().max() <= NEAR * value.abs().max(), (case, name)


@pytest.fixture(scope="module")
def one_device(pool, data) -> dict[str, Tensor]:
    found: Found = pool.run(steps, 1, [*SMALL, *data], [exact(1, 1)])[0][0][0]
    return {name: part.values for name, part in found.items()}


SMALL = ["model=tiny", "train.dtype=fp32", *STEP]


@pytest.mark.parametrize(("ranks", "ep"), sample(LAYOUTS, every=2))
def test_a_step_is_that_of_one_device(pool, data, one_device, ranks: int, ep: int) -> None:
    """Loss, all gradients, next weights and biases; 1, 2 and 4 micro-steps, recompute off and on, experts moved."""
    cases = [(1, "none", "makespan"), (2, "full", "makespan"), (4, "none", "home"), (4, "full", "makespan")]
    variants = [[*exact(m, ranks), f"train.recompute={r}", f"planner={p}"] for m, r, p in cases]
    results = pool.run(steps, ranks, [*SMALL, *data], variants, ep=ep)
    for case, *found in zip(cases, *results, strict=True):
        assert_equal([of_rank for of_rank, _ in found], ep, one_device, (ranks, ep, case))
        for _, guests in found:
            assert (guests > 0) == (ep > 1 and case[2] == "makespan"), case


def test_the_papers_buffer_is_not(pool, data, one_device) -> None:
    """Its first micro-steps see less than the whole batch; at one micro-step it is exact."""
    for micro_steps in (1, 4):
        variant = [*exact(micro_steps, 1), "balance.accumulate=buffer"]
        found = pool.run(steps, 1, [*SMALL, *data], [variant])[0][0][0]
        if micro_steps == 1:
            assert_equal([found], 1, one_device, "buffer")
        else:
            name = "gradient of layers.0.moe.router.weight"
            assert (found[name].values - one_device[name]).abs().max() > 100 * NEAR * one_device[name].abs().max()


def of_balance_alone(mesh: Mesh, overrides: list[str]) -> Tensor:
    """The routers' gradients of the balance loss and nothing else."""
    engine, settings, shares = started(mesh, overrides)
    balance = BalanceLoss(balance_options(settings.balance), engine.model.routers, 16 * 16, 16)
    batches = [Batch.from_sequences(share, settings, mesh.device) for share in shares]
    ahead = [balance.foresee(engine.model.count(b.tokens, *b.about)) for b in batches[1:]]
    for number, (batch, choices) in enumerate(zip(batches, [None, *ahead], strict=True)):
        _, stats = engine.model(batch.tokens, batch.targets, *batch.about, choices)
        engine.backward(balance.losses(stats).weighted, last=number == len(batches) - 1)
    grads = [p.grad for router in engine.model.routers for p in router.parameters()]
    return torch.cat([g.flatten() for g in grads if g is not None])


def test_its_gradient_does_not_scale_with_the_ranks(pool, data) -> None:
    base = [*SMALL, *data, "balance.coefficient=1", "balance.z_coefficient=0", "balance.accumulate=exact"]
    alone = pool.run(of_balance_alone, 1, base)[0]
    assert alone.norm() > 1e-3
    for ranks, micro_steps in ((2, 1), (4, 1), (1, 4), (4, 4)):
        for found in pool.run(of_balance_alone, ranks, [*base, f"train.micro_batch={16 // ranks // micro_steps}"]):
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


def times_chosen(mesh: Mesh, overrides: list[str]) -> list[int]:
    """How often every router chose in one step; and its count of selections."""
    engine, settings, shares = started(mesh, overrides)
    calls = [0] * len(engine.model.routers)
    for number, router in enumerate(engine.model.routers):

        def choose(*args: Any, number: int = number, original: Any = router.choose) -> Any:
            calls[number] += 1
            return original(*args)

        router.choose = choose  # type: ignore[method-assign]
    counts = optimizer_step(engine, settings, shares, lr=0.05).counts
    assert [int(counts_E.sum()) for counts_E in counts] == [16 * 16 * settings.router.top_k] * len(calls)
    return calls


def test_a_choice_is_made_once_and_counted_once(pool, data) -> None:
    more = ["train.micro_batch=2", "train.recompute=full", "balance.accumulate=exact"]
    assert pool.run(times_chosen, 2, [*SMALL, *data, *more]) == [[4, 4], [4, 4]]
