"""What the papers of the router families state: numbers of experts, sizes, capacities, choices."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain import config
from moetrain.config.core_options import router_options
from moetrain.distributed.mesh import Mesh
from moetrain.models.initialise import initialise
from moetrain.models.transformer import Transformer, rope_table
from moetrain.moe.routing import ROUTERS, Choice, Place, Scores, capacity
from moetrain.moe.routing.noise import normal
from moetrain.observe.estimate import estimate
from moetrain.training.step import build
from tests.moe.routing.test_routers import FAMILIES


def scores_of(probs: Tensor) -> Scores:
    return Scores(probs.log(), probs)


def router_of(overrides: list[str], num_experts: int, dim: int = 16) -> Any:
    options = config.load(["model=tiny", *overrides]).router
    router = ROUTERS[options.name](dim, num_experts, router_options(options))
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    return router


def chosen_of(choice: Choice) -> list[int]:
    """How many experts each token has."""
    kept = choice.token_N if choice.chosen_N is None else choice.token_N[choice.chosen_N]
    return torch.bincount(kept).tolist()


def test_top_p_takes_one_two_and_seven() -> None:
    """methods of Huang et al.: (.5 .3 .15 .05) -> 1, (.3 .3 .2 .2) -> 2 at p = .4; uniform over 16 -> 7."""
    router = router_of(["router.name=top_p"], 4)
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.3, 0.3, 0.2, 0.2]])
    choice = router.choose(scores_of(probs))
    assert chosen_of(choice) == [1, 2]
    routing = router.weigh(scores_of(probs), choice)
    assert routing.weight_N[choice.chosen_N].tolist() == pytest.approx([0.5, 0.3, 0.3])  # not normalised
    assert not routing.weight_N[~choice.chosen_N].any()
    assert chosen_of(router_of(["router.name=top_p"], 16).choose(scores_of(torch.full((3, 16), 1 / 16)))) == [7] * 3
    drawn = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)
    counts = [
        chosen_of(router_of(["router.name=top_p", f"router.top_p={p}"], 16).choose(scores_of(drawn)))
        for p in (0.01, 0.3, 0.6, 1.0)
    ]
    assert counts[0] == [1] * 50  # as top-1
    assert all(a <= b for less, more in pairwise(counts) for a, b in zip(less, more, strict=True))


def test_expert_choice_is_even_within_every_sequence() -> None:
    router = router_of(["router.name=expert_choice"], 8)
    scores, _ = router.score(torch.randn(30, 16), None, Place(10))
    choice = router.choose(scores, Place(10))
    pairs = torch.zeros(3, 8, dtype=torch.int64)
    for token, expert in zip(choice.token_N.tolist(), choice.expert_N.tolist(), strict=True):
        pairs[token // 10, expert] += 1
    assert (pairs == 3).all()  # ceil(10 * 2 / 8)
    assert (choice.token_N.diff() >= 0).all()
    gate = scores.probs_TE[:10, 5]
    mine = choice.token_N[(choice.expert_N == 5) & (choice.token_N < 10)]
    assert set(mine.tolist()) == set(gate.topk(3).indices.tolist())


def test_frozen_k_grows_as_in_the_paper() -> None:
    """8 to 16 over 400k steps: one more every 50k. The router has no gradient and no place in the optimizer."""
    options = config.load(["model=tiny", "model.num_experts=16", "router.name=frozen", "router.top_k=16"])
    router = ROUTERS["frozen"](16, 16, replace(router_options(options.router), k_start=8))
    found = []
    for step in range(0, 400_001, 50_000):
        router.at_step(step, 400_000, 0)
        found.append(router.k)
    assert found == [8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert not router.weight.requires_grad


def test_recurrent_routers_have_the_papers_size() -> None:
    """8 layers, width 352, state 128, 16 experts: 475,136; 24 layers of width 1280: 3.588M more than linear routers."""

    def size(layers: int, dim: int) -> int:
        options = router_options(config.load(["model=tiny", "router.name=recurrent"]).router)
        each = ROUTERS["recurrent"](dim, 16, options)
        shared = ROUTERS["recurrent"].shared(options)
        assert shared is not None
        return layers * sum(p.numel() for p in each.parameters()) + sum(p.numel() for p in shared.parameters())

    assert size(8, 352) == 475_136
    assert size(24, 1280) - 24 * 1280 * 16 == 3_588_096


def test_capacity_of_experts_that_compute_and_that_do_not() -> None:
    """MoE++: 8 + 4 experts, tau .75, factor 1.1, 1000 selections: 82.5 and 110, together 1.1 · 1000."""
    counts = torch.tensor([1000] + [0] * 11)
    assert capacity.room(counts, 1.1, [0.75] * 8 + [1.0] * 4).tolist() == [83] * 8 + [110] * 4
    assert capacity.room(counts, 1.2).tolist() == [100] * 12


def test_group_limited_choice_equals_deepseek_v3() -> None:
    """Experts and weights of transformers' router, bias included."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    shape = {"hidden_size": 16, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2}
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(**shape, routed_scaling_factor=2.5, norm_topk_prob=True))
    more = ["model.num_experts=16", "router.top_k=4", "router.scores=sigmoid", "router.scaling=2.5"]
    ours = router_of([*more, "router.groups=4", "router.top_groups=2"], 16)
    ours.bias = torch.randn(16, generator=torch.Generator().manual_seed(2)) * 0.3
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(ours.bias)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    _, weight_TK, expert_TK = theirs(x)
    routing, _ = ours(x)
    dense = [torch.zeros(50, 16) for _ in range(2)]
    dense[0].scatter_(1, expert_TK, weight_TK.detach())
    dense[1][routing.token_N, routing.expert_N] = routing.weight_N.detach()
    torch.testing.assert_close(dense[1], dense[0])


def test_noise_belongs_to_the_sample() -> None:
    """Normal; the same for a sequence wherever it is; another one for every step and layer; none outside training."""
    both, alone = normal((0, 5, 1), torch.tensor([11, 4]), 40, 64), normal((0, 5, 1), torch.tensor([4]), 40, 64)
    assert torch.equal(both[40:], alone)
    assert not torch.equal(normal((0, 6, 1), torch.tensor([4]), 40, 64), alone)
    assert float(both.mean()) == pytest.approx(0, abs=0.03)
    assert float(both.std()) == pytest.approx(1, abs=0.03)
    assert float((both.abs() > 1.96).float().mean()) == pytest.approx(0.05, abs=0.01)
    router = router_of(["router.noise=5"], 8)
    scores, _ = router.score(torch.randn(20, 16), None, None)
    quiet, noisy = router.choose(scores, Place(10)), router.choose(scores, Place(10, torch.tensor([0, 1])))
    assert torch.equal(quiet.expert_N, router.choose(scores).expert_N)
    assert not torch.equal(quiet.expert_N, noisy.expert_N)


def test_a_group_keeps_to_its_experts_whatever_the_bias() -> None:
    router = router_of(["router.name=grouped"], 8)
    router.bias = torch.tensor([9.0] * 4 + [0.0] * 4)
    place = Place(10, None, torch.arange(20) % 3)
    routing, _ = router(torch.randn(20, 16), None, place)
    assert (routing.expert_N % 2 == place.group_T[routing.token_N] % 2).all()
    assert (routing.probs_TE.sum(-1) - 1).abs().max() < 1e-6
    assert len(set((router(torch.randn(20, 16))[0].expert_N % 2).tolist())) == 2  # domain unknown: all are open


def test_parameters_and_flops() -> None:
    """Fine-grained experts (four times as many, a quarter as wide) cost nothing; a chain of two adds routers alone."""

    def of(*overrides: str) -> tuple[int, int, int]:
        settings = config.load(["model=tiny", "model.vocab_size=64", "train.dtype=bf16", *overrides])
        found, model = estimate(config.resolve_early(settings, 1)), build(settings)
        assert found.total == sum(p.numel() for p in model.parameters()), overrides
        routers = sum(p.numel() for r in model.routers for p in r.parameters())
        return found.total - routers, found.active - routers, routers

    plain = of()
    fine = of("model.num_experts=32", "model.expert_hidden=16", "router.top_k=8")
    assert fine[:2] == plain[:2]
    assert of("model.chain=2", "router.top_k=1")[:2] == plain[:2]  # K · C as before: as many rows
    assert of("model.chain=2")[2] == plain[2] + 2 * 8 * 64  # (C - 1) · N · d a layer
    assert of("model.expert_schedule=descending", "model.min_experts=4")[:2] == plain[:2]
    for family in FAMILIES.values():
        of(*family)


def chained(mesh: Mesh) -> None:
    """A chain of one is the plain layer; two passes are two residual blocks over the same experts."""
    settings = config.load(["model=tiny", "model.vocab_size=50", "model.chain=2"])
    model = Transformer(settings.model, settings.router, settings.planner)
    for block in model.layers:
        block.moe.experts.shard(mesh.ep)
    initialise(model, 0)
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    logits, stats = model(tokens)
    assert len(stats) == 4
    x = model.embed(tokens)
    rope = rope_table(12, settings.model.head_dim, settings.model.rope_theta, tokens.device)
    for block in model.layers:
        x = x + block.attn(block.attn_norm(x), rope, None)
        for router in block.moe.routers:
            first, block.moe.router = block.moe.router, router
            x = x + block.moe.forward_with_stats(block.ffn_norm(x).flatten(0, 1))[0].view_as(x)
            block.moe.router = first
    torch.testing.assert_close(logits, model.head(model.norm(x)))
    assert settings.model.pass_names == ["layer_00_0", "layer_00_1", "layer_01_0", "layer_01_1"]


def test_a_chain_is_residual_passes_over_one_pool(pool: Any) -> None:
    pool.run(chained, 1)
