"""The loss is the mean over the global batch's targets, exactly, whatever padding, packing, ranks and micro-steps."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moetrain import config
from moetrain.data.loader import Sequences
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.engine.native import NativeEngine
from moetrain.models.initialise import initialise
from moetrain.moe.planning.cost import default_costs
from moetrain.training.step import build, micro_batches, optimizer_step
from tests.grid import sample
from tests.system.test_exact import Found, Part, assert_equal

VOCABULARY, BATCH = 64, 8
LENGTHS = (9, 3, 12, 5, 12, 2, 7, 6)  # tokens of each row's conversation
TARGETS = (4, 0, 7, 1, 0, 1, 6, 0)  # of them at the end, that are to be predicted: two neighbours have none
BASE = ["model=tiny", "train.dtype=fp32", f"train.global_batch={BATCH}", "optim.clip=0", "optim.eps=0.01"]
BASE += [f"model.vocab_size={VOCABULARY}", "router.skew=0.5", "data.attend_within_documents=true"]
LOSSES = ["coefficient=1", "sequence_coefficient=0.2", "entropy_coefficient=0.1", "z_coefficient=0.1", "bias=sign"]
EXACT = ["balance.accumulate=exact", *(f"balance.{x}" for x in LOSSES)]
ALONE = ["balance.coefficient=0", "balance.z_coefficient=0"]


def conversation(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, VOCABULARY, LENGTHS[number])


class Rows:
    """A conversation a row, then padding up to `length` + 1 tokens; its last token is predicted and does not go in."""

    def __init__(self, length: int) -> None:
        self.length = length

    def samples(self, begin: int, end: int) -> Sequences:
        shape = (end - begin, self.length + 1)
        tokens, document, target = np.zeros(shape, np.int64), np.full(shape, -1), np.zeros(shape, bool)
        for row, number in enumerate(range(begin, end)):
            size = LENGTHS[number]
            tokens[row, :size], document[row, : size - 1] = conversation(number), 0
            target[row, size - TARGETS[number] : size] = True
        return Sequences(tokens, np.zeros_like(tokens), document, np.arange(begin, end), target)

    def count_tokens(self, end: int) -> int:
        raise NotImplementedError


class Packed(Rows):
    """As many conversations as fit, one after another, in rows of `length` + 1 tokens; the other rows are padding."""

    def samples(self, begin: int, end: int) -> Sequences:
        found = Rows(max(LENGTHS) - 1).samples(0, BATCH)
        shape = (BATCH, self.length + 1)
        tokens, document, target = np.zeros(shape, np.int64), np.full(shape, -1), np.zeros(shape, bool)
        row = at = 0
        for number, size in enumerate(LENGTHS):
            if at + size > self.length + 1:
                row, at = row + 1, 0
            here = slice(at, at + size)
            tokens[row, here], document[row, at : at + size - 1] = found.tokens[number, :size], number
            target[row, here] = found.target[number, :size]  # type: ignore[index]
            at += size
        mine = slice(begin, end)
        return Sequences(tokens[mine], np.zeros_like(tokens[mine]), document[mine], np.arange(begin, end), target[mine])


def steps(mesh: Mesh, variants: list[tuple[str, int, list[str]]]) -> list[tuple[Found, tuple[int, int], int]]:
    """For every variant one step: gradients, new weights and the loss; the batch's size; guests."""
    out = []
    for rows, length, overrides in variants:
        settings = config.resolve_early(config.load([*BASE, f"train.seq_len={length}", *overrides]), mesh.world)
        engine = NativeEngine(build(settings), mesh, settings)
        engine.plan_with(replace(default_costs(), row_forward=1.0, row_backward=2.0))
        found: Found = {}

        def keep(*_: Any, engine: NativeEngine = engine, found: Found = found) -> None:
            for name, parameter in engine.model.named_parameters():
                if parameter.grad is not None:
                    found[f"gradient of {name}"] = Part.take(name, parameter.grad)

        engine.optimizer.register_step_pre_hook(keep)
        loader = {"rows": Rows, "packed": Packed}[rows](length)
        step = optimizer_step(engine, settings, list(micro_batches(settings, mesh, loader, 0)), lr=0.05)
        loss = torch.stack([part.nats.sum() / step.size.targets + part.losses.weighted for part in step.parts]).sum()
        found["loss"] = Part.take("loss", all_reduce_sum(loss))
        found |= {name: Part.take(name, parameter) for name, parameter in engine.model.named_parameters()}
        found |= {name: Part.take(name, buffer) for name, buffer in engine.model.named_buffers()}
        guests = sum(len(s.plan.guests()) for part in step.parts for s in part.stats)
        out.append((found, tuple(step.size), guests))
    return out


def alone(mesh: Mesh) -> dict[str, torch.Tensor]:
    """Gradients of the mean over all targets, each conversation by itself without padding; torch's cross entropy."""
    settings = config.load([*BASE, *ALONE])
    model = build(settings).to_empty(device="cpu")
    model.head.weight = model.embed.weight
    initialise(model, settings.train.seed)
    total = torch.zeros(())
    for number, size in enumerate(LENGTHS):
        if TARGETS[number]:
            tokens = torch.from_numpy(conversation(number))[None]
            logits, _ = model(tokens[:, :-1])
            first = size - TARGETS[number]
            total = total + F.cross_entropy(logits[0, first - 1 :], tokens[0, first:], reduction="sum")
    loss = total / sum(TARGETS)
    loss.backward()
    grads = {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: Part.take(name, grad).values for name, grad in grads.items()} | {"loss": loss.detach()}


def test_padding_and_packing_change_nothing(pool) -> None:
    """The gradients of padded and of packed rows are those of conversations on their own."""
    theirs = pool.run(alone, 1)[0]
    variants = [("rows", 11, ALONE), ("rows", 19, ALONE), ("packed", 17, ALONE), ("packed", 29, ALONE)]
    for found, size, _ in pool.run(steps, 1, variants)[0]:
        assert size[1] == sum(TARGETS)
        assert_equal([{name: found[name] for name in theirs}], 1, theirs, size)


def test_padding_counts_in_no_statistic(pool) -> None:
    """All losses of the router, the next biases and weights are the same with more padding, and in packed rows but for
    the loss within sequences."""
    whole = [*EXACT, "balance.sequence_coefficient=0"]
    variants = [("rows", 11, EXACT), ("rows", 19, EXACT), ("rows", 11, whole), ("packed", 19, whole)]
    results = pool.run(steps, 1, variants)[0]
    for (one, *_), (other, size, _) in zip(results[::2], results[1::2], strict=True):
        assert size == (sum(LENGTHS) - BATCH, sum(TARGETS), 0)
        assert_equal([other], 1, {name: part.values for name, part in one.items()}, size)


@pytest.mark.parametrize(("ranks", "ep"), sample([(2, 2), (4, 2), (2, 1), (4, 4)], every=2))
def test_a_layout_changes_nothing(pool, ranks: int, ep: int) -> None:
    """Ranks, expert groups, micro-steps, recompute and moved experts; a rank without any target is among them."""
    theirs = {name: part.values for name, part in pool.run(steps, 1, [("rows", 11, EXACT)])[0][0][0].items()}
    cases = [(1, "none"), (BATCH // ranks, "full")]
    variants = [
        ("rows", 11, [*EXACT, f"train.micro_batch={BATCH // ranks // number}", f"train.recompute={again}"])
        for number, again in cases
    ]
    results = pool.run(steps, ranks, variants, ep=ep)
    for case, *found in zip(cases, *results, strict=True):
        assert_equal([each for each, _, _ in found], ep, theirs, (ranks, ep, case))
        assert all(size[1] == sum(TARGETS) for _, size, _ in found)
        assert all((guests > 0) == (ep > 1) for _, _, guests in found)


def test_frozen_routers_stay_and_pass_gradients_on(pool) -> None:
    """With `router.freeze` every gradient but the routers' is as before, and the routers' weights do not change."""
    frozen = [*ALONE, "router.freeze=true"]
    (free, _, _), (ours, _, _) = pool.run(steps, 1, [("rows", 11, ALONE), ("rows", 11, frozen)])[0]
    routers = {name for name in free if name.endswith("router.weight")}
    assert {name for name in free if name not in ours} == {name for name in routers if name.startswith("gradient")}
    theirs = {name: part.values for name, part in free.items() if name not in routers}
    assert_equal([{name: part for name, part in ours.items() if name not in routers}], 1, theirs, "freeze")
    start = build(config.load([*BASE, *frozen]))
    assert not any(p.requires_grad for router in start.routers for p in router.parameters())
    for name in routers - set(theirs) - {name for name in routers if name.startswith("gradient")}:
        assert not torch.equal(free[name].values, ours[name].values)
