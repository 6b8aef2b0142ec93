"""Choices are recorded and replayed inside every family's own router."""

import pytest
import torch
from torch import nn

from moetrain.hf.layout import is_experts
from moetrain.hf.pinning import PinnedChoices
from tests.grid import sample
from tests.hf.families import FAMILIES, build

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
