"""Recorded choices replayed in models of transformers: exactly them, with fresh probabilities, in every family."""

import pytest
import torch
from torch import Tensor, nn

from moetrain import hf
from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import Mesh
from tests.grid import sample
from tests.hf import exact
from tests.hf.families import FAMILIES, build
from tests.pool import Pool

COVERED = [name for name in FAMILIES if name not in ("zaya", "deepseek_v4")]  # zaya skips experts, the other hashes


def count_experts(model: nn.Module) -> int:
    return next(int(module.num_experts) for module in model.modules() if hasattr(module, "is_transposed"))  # type: ignore[arg-type]


def draw_like(experts: Tensor, num_experts: int) -> Tensor:
    """Other experts for every token and layer, as a router with two groups of which a token uses one might choose."""
    draw, half = torch.Generator().manual_seed(2), num_experts // 2
    order = torch.rand(*experts.shape[:2], half, generator=draw).argsort(-1)[..., : experts.shape[2]]
    return order + half * torch.randint(0, 2, (*experts.shape[:2], 1), generator=draw)


@pytest.mark.parametrize("name", sample(COVERED, 8))
def test_every_family_gets_the_experts_that_are_set(name: str) -> None:
    model, ids = build(name), exact.batch()
    with torch.no_grad(), hf.record_choices(model) as own:
        expected = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad(), hf.replay_choices(model, own.experts):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    other = draw_like(own.experts, count_experts(model))
    with torch.no_grad(), hf.replay_choices(model, other), hf.record_choices(model) as made:
        moved = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(made.experts, other)
    assert not torch.equal(moved, expected)
    other[::2] = -1
    with torch.no_grad(), hf.replay_choices(model, other, missing="route"), hf.record_choices(model) as made:
        model(input_ids=ids, use_cache=False)
    assert torch.equal(made.experts[1::2], other[1::2])
    assert torch.equal(made.experts[::2, 0], own.experts[::2, 0])


def weigh(name: str, logits: Tensor, index: Tensor) -> Tensor:
    """The weights of experts that are given, as the family's router would make them."""
    if name == "gpt_oss":  # softmax over the chosen ones
        return logits.gather(1, index).softmax(-1)
    if name == "qwen3_moe":  # norm_topk_prob is false in the tiny one
        return logits.softmax(-1).gather(1, index)
    weights = logits.sigmoid().gather(1, index)  # bias and groups matter to the choice alone
    return 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)


def give_experts(model: nn.Module, name: str, told: dict[str, Tensor]) -> None:
    """Have the experts modules get `told["experts"]` [T, L, K], and the weights that the router makes of its logits."""
    layers = [m for m in model.modules() if hasattr(m, "experts") and hasattr(m.experts, "is_transposed")]
    for layer, block in enumerate(layers):
        router: nn.Module = block.gate if hasattr(block, "gate") else block.router  # type: ignore[assignment]
        heard: list[Tensor] = []
        router.register_forward_hook(
            lambda m, a, out, heard=heard: heard.append(out[0] if isinstance(out, tuple) else out)
        )

        def give(module: nn.Module, args: tuple, layer: int = layer, heard: list = heard) -> tuple:
            index = told["experts"][:, layer]
            return args[0], index, weigh(name, heard.pop().reshape(len(index), -1), index)

        block.experts.register_forward_pre_hook(give)  # type: ignore[union-attr, operator]


def train_by_hand(name: str, experts: Tensor) -> nn.Module:
    """The model after one backward of transformers alone."""
    model, ids = exact.model_of(name), exact.batch()
    give_experts(model, name, {"experts": experts})
    exact.loss_of(model(input_ids=ids, use_cache=False).logits, ids).backward()
    return model


def train_replayed(mesh: Mesh, name: str, recompute: bool) -> float:
    """The largest difference of a gradient from `train_by_hand`, of its largest element."""
    model, ids = exact.model_of(name), exact.batch()
    with torch.no_grad(), hf.record_choices(model) as own:
        model(input_ids=ids, use_cache=False)
    experts = draw_like(own.experts, count_experts(model))
    whole = train_by_hand(name, experts)
    handle = exact.spread_forced(mesh, model)
    if recompute:
        model.activation_checkpointing_enable()  # type: ignore[operator]
    each = exact.SEQUENCES // mesh.world
    mine = slice(mesh.rank * each, (mesh.rank + 1) * each)
    part = experts.view(exact.SEQUENCES, exact.LENGTH, *experts.shape[1:])[mine]
    handle.begin_step()
    with hf.replay_choices(model, part):
        loss = exact.loss_of(model(input_ids=ids[mine], use_cache=False).logits, ids[mine])
    loss.backward()
    handle.end_step()
    handle.reduce_dense_gradients()
    found, worst = handle.full_gradients(), 0.0
    for key, parameter in whole.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            worst = max(worst, float((found[key] - parameter.grad).abs().max() / parameter.grad.abs().max()))
    return worst


LAYOUTS = [(1, 1, False), (2, 2, True), (4, 2, False)]  # ranks, ranks of an expert group, recompute


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_gradients_are_those_of_forced_experts(pool: Pool, name: str) -> None:
    for ranks, ep, recompute in LAYOUTS:
        assert max(pool.run(train_replayed, ranks, name, recompute, ep=ep)) < 1e-5, (ranks, ep)


def test_what_is_of_another_model_or_missing_is_refused() -> None:
    model, ids = build("qwen3_moe"), exact.batch()
    with torch.no_grad(), hf.record_choices(model) as own:
        model(input_ids=ids)
    experts = own.experts.view(*ids.shape, 2, 2)

    def refuse(experts: Tensor, **more: str) -> str:
        with pytest.raises(ConfigError) as caught, hf.replay_choices(model, experts, **more):
            pass
        return str(caught.value)

    layers = "experts: (4, 8, 3, 2) must be [tokens, layers, experts a token], with 2 layers"
    assert refuse(torch.zeros(4, 8, 3, 2)) == layers
    assert refuse(experts + 8) == "experts: 15 is none of the 8 experts"
    experts[:, -1] = -1
    assert refuse(experts) == (
        "missing=error: 4 of 32 tokens have no recorded choice; route has the router choose for them"
    )
    with pytest.raises(RuntimeError, match="of 32 tokens, but there are 8"):
        with hf.replay_choices(model, experts, missing="route"):
            model(input_ids=ids[:1])
    with pytest.raises(RuntimeError, match="does not choose by a top-k over scores of all experts"):
        with hf.replay_choices(model, own.experts[..., :1]):
            model(input_ids=ids)
    with pytest.raises(ConfigError, match="Linear is not covered"), hf.record_choices(nn.Linear(2, 2)):
        pass


def test_a_rollout_is_read_with_the_layers_of_the_model() -> None:
    model = build("deepseek_v3", num_hidden_layers=3, first_k_dense_replace=1, mlp_layer_types=None)
    ids = exact.batch()[:1]
    with torch.no_grad(), hf.record_choices(model) as made:
        model(input_ids=ids[:, :-1])
    sent = torch.zeros(ids.shape[1] - 1, 3, 2, dtype=torch.int32)  # a server has a row for the dense layer too
    sent[:, 1:] = made.experts
    experts = hf.read_rollout(model, ids[0].tolist(), sent.numpy())
    assert torch.equal(experts[:-1], made.experts)
    assert (experts[-1] == -1).all()
    facts = hf.describe_choices(model)
    assert (facts.model_type, facts.num_experts, facts.num_layers, facts.top_k) == ("deepseek_v3", 8, 2, 2)
