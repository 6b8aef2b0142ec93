"""Choices are recorded and replayed inside every family's own router."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from moetrain import hf
from moetrain.distributed.mesh import Mesh
from moetrain.hf.layout import is_experts
from moetrain.hf.pinning import PinnedChoices
from tests.grid import sample
from tests.hf import exact
from tests.hf.families import FAMILIES, build
from tests.pool import Pool

LOOKED_UP = {"deepseek_v4": [0]}  # layers whose experts stand in a table by token: nothing is chosen
ONE_BY_ONE = {"phimoe"}  # every expert of a token is a maximum of its own


def indices_of(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each experts module is given."""
    found: list[torch.Tensor] = []
    for module in model.modules():
        if is_experts(module):
            module.register_forward_pre_hook(
                lambda _, args, kwargs: found.append(args[1] if len(args) > 1 else kwargs["top_k_index"]),
                with_kwargs=True,
            )
    model(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
    return found


@pytest.mark.parametrize("name", sample(FAMILIES, 11))
def test_every_layer_s_choice_is_caught_once_and_replayed(name: str) -> None:
    ids = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(1))
    model, pins = build(name), PinnedChoices()
    with pins.record(model):
        first = indices_of(model, ids)
    looked_up = LOOKED_UP.get(name, [])
    for layer, sites in enumerate(pins.caught):
        assert len(sites) == (0 if layer in looked_up else 1) or (name in ONE_BY_ONE and len(sites) > 1)
    for same in (pins, pins.part(0, 2, 2)):
        with same.replay():
            again = indices_of(build(name, seed=1), ids)  # which would choose other experts
        for layer, (one, other) in enumerate(zip(first, again, strict=True)):
            assert layer in looked_up or torch.equal(one, other)


def test_more_choices_than_recorded_are_refused() -> None:
    def choose(rows: int) -> torch.Tensor:
        return torch.randn(rows, 8).topk(2).indices

    pins = PinnedChoices()
    with pins.record():
        chosen = choose(4)
    with pins.replay():
        assert torch.equal(choose(4), chosen)
        with pytest.raises(RuntimeError, match="makes more of them than were recorded"):
            choose(4)
    with pins.replay(), pytest.raises(RuntimeError, match="recorded for 4 rows, but there are 3"):
        choose(3)


def train_pinned(mesh: Mesh, name: str) -> tuple[float, bool]:
    """A model trained on the experts that another one chose: the largest difference of a gradient from one process, of
    its largest element; and whether a replay of the model's own choices changes nothing at all."""
    ids, chosen = exact.batch(), PinnedChoices()
    with torch.no_grad(), chosen.record(teacher := build(name)):
        teacher(input_ids=ids)
    whole = build(name, seed=1)
    with chosen.part(0, 1, 1).replay():
        exact.loss_of(whole(input_ids=ids).logits, ids).backward()
    each = exact.SEQUENCES // mesh.world
    ids = ids[mesh.rank * each : (mesh.rank + 1) * each]
    with torch.no_grad(), hf.expert_parallel(teacher, mesh.ep, "home").record_choices() as choices:
        teacher(input_ids=ids)

    model = build(name, seed=1)
    handle = hf.expert_parallel(model, mesh.ep, "home", reduction="sum")
    with torch.no_grad(), handle.record_choices() as own:
        model(input_ids=ids)
    found: list[dict[str, torch.Tensor]] = []
    for pins in (choices, own, None):
        with handle.step(), handle.replay_choices(pins) if pins else nullcontext():
            exact.loss_of(model(input_ids=ids).logits, ids).backward()
        handle.reduce_dense_gradients()
        found.append(handle.full_gradients())
        model.zero_grad()
    worst = 0.0
    for key, parameter in whole.named_parameters():
        assert parameter.grad is not None
        worst = max(worst, float((found[0][key] - parameter.grad).abs().max() / parameter.grad.abs().max()))
    return worst, all(torch.equal(one, found[2][key]) for key, one in found[1].items())


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_gradients_of_pinned_choices_equal_one_process(pool: Pool, name: str) -> None:
    for worst, is_same in pool.run(train_pinned, 2, name):
        assert worst < 1e-5
        assert is_same
