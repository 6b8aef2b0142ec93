"""The logits and probabilities of every family's own router."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moetrain.common.errors import ConfigError
from moetrain.hf.layout import is_experts
from moetrain.hf.scores import FamilyRouter, find_router
from moetrain.moe.routing.base import Scores
from tests.grid import sample
from tests.hf.families import FAMILIES, build

REFUSED = {"zaya"}
NOT_PROPORTIONAL = {"phimoe"}  # its weights are a maximum over what is left, one expert after the other
BIASED = {"deepseek_v3": "gate.e_score_correction_bias", "minimax_m2": "e_score_correction_bias"}


def listen(model: nn.Module) -> tuple[dict[str, FamilyRouter], dict[str, Scores], dict[str, tuple[Tensor, Tensor]]]:
    """The routers by experts module; what they tell in forwards to come, and what the experts are given."""
    routers: dict[str, FamilyRouter] = {}
    told: dict[str, Scores] = {}
    given: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_modules():
        if is_experts(module):
            routers[name] = router = find_router(model, name)
            router.watch(lambda logits, n=name, r=router: told.update({n: r.score(logits)}))
            module.register_forward_pre_hook(
                lambda _, args, kwargs, n=name: given.update({n: (*args, *kwargs.values())[1:3]}), with_kwargs=True
            )
    return routers, told, given


@pytest.mark.parametrize("name", sample([name for name in FAMILIES if name not in REFUSED], 11))
def test_probabilities_are_what_the_family_weighs_experts_by(name: str) -> None:
    """The weights of a token's experts stand to each other as their probabilities do."""
    model = build(name)
    for key, value in model.named_parameters():
        if key.endswith(("gate.weight", "router.weight")):
            value.data.normal_(std=0.5, generator=torch.Generator().manual_seed(3))  # far from uniform
    _, told, given = listen(model)
    ids = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids, use_cache=False)
    assert given
    for layer, (index_TK, weight_TK) in given.items():
        logits_TE, probs_TE = told[layer]
        assert logits_TE.shape == probs_TE.shape == (16, 8)
        torch.testing.assert_close(probs_TE.sum(-1), torch.ones(16))
        assert probs_TE.requires_grad
        if name not in NOT_PROPORTIONAL:
            chosen_TK = probs_TE.gather(1, index_TK)
            shares = [each / each.sum(-1, keepdim=True) for each in (weight_TK, chosen_TK)]
            torch.testing.assert_close(*shares, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BIASED)
def test_the_bias_of_the_choice_is_found(name: str) -> None:
    model: Any = build(name)
    router = find_router(model, "model.layers.1.mlp.experts")
    buffer = model.model.layers[1].mlp.get_buffer(BIASED[name])
    assert router.bias is buffer
    before = buffer.clone()
    router.bias += torch.ones(8)
    assert torch.equal(model.model.layers[1].mlp.get_buffer(BIASED[name]), before + 1)
    assert find_router(build("qwen3_moe"), "model.layers.1.mlp.experts").bias is None


def test_a_recompute_is_not_told() -> None:
    model: Any = build("qwen3_moe")
    model.activation_checkpointing_enable()
    told: list[Tensor] = []
    router = find_router(model, "model.layers.1.mlp.experts")
    router.watch(told.append)
    passes: list[int] = []
    router.module.register_forward_hook(lambda *_: passes.append(1))
    model(input_ids=torch.arange(8)[None], use_cache=False).logits.sum().backward()
    assert (len(told), len(passes)) == (1, 2)


def test_what_is_not_known_is_refused_by_name() -> None:
    name = "model.layers.1.mlp.experts"
    with pytest.raises(ConfigError, match=r"router scores: not for ZayaRouter at model\.layers\.1\.mlp\.gate: tokens"):
        find_router(build("zaya"), name)
    model: Any = build("qwen3_moe")
    model.model.layers[1].mlp.gate = nn.Linear(64, 8)
    with pytest.raises(ConfigError, match=r"how Linear at model\.layers\.1\.mlp\.gate makes probabilities"):
        find_router(model, name)
    del model.model.layers[1].mlp.gate
    with pytest.raises(ConfigError, match=r"Qwen3MoeExperts at model\.layers\.1\.mlp\.experts has no gate or router"):
        find_router(model, name)
