"""The transformer: parity with Hugging Face on tiny random models, initialisation, the chunked cross entropy."""

import re
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moetrain import config
from moetrain.distributed.mesh import Mesh
from moetrain.models import cross_entropy, linear
from moetrain.models.initialise import initialise
from moetrain.models.transformer import Transformer, attend
from moetrain.moe.kernels import cpu_gemm
from moetrain.moe.kernels.api import KernelChoice
from moetrain.observe.estimate import estimate
from moetrain.training.step import build

HF_NAMES = [  # ours -> theirs; docs/model.md shows the same table
    (r"^embed\.", "model.embed_tokens."),
    (r"^norm\.", "model.norm."),
    (r"^head\.", "lm_head."),
    (r"^layers\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn\.([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.attn\.([qk])_norm\.", r".self_attn.\1_norm."),
    (r"\.mlp\.(gate|up|down)\.", r".mlp.\1_proj."),
    (r"\.moe\.router\.weight", ".mlp.gate.weight"),
    (r"\.moe\.experts\.gate_up", ".mlp.experts.gate_up_proj"),
    (r"\.moe\.experts\.down", ".mlp.experts.down_proj"),
]


def hf_name(name: str) -> str:
    for pattern, replacement in HF_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def pair(kind: str) -> tuple[config.Config, Any]:
    """Our config and a Hugging Face model of the same shape."""
    import transformers

    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "sdpa",
    }
    ours = ["model=tiny", "model.vocab_size=97", "model.dim=32", "model.head_dim=8", "model.expert_hidden=24"]
    ours += ["model.tied_embeddings=false", "balance.coefficient=0", "balance.z_coefficient=0"]
    torch.manual_seed(0)
    if kind == "qwen3":
        theirs = transformers.Qwen3MoeConfig(
            **shape, head_dim=8, moe_intermediate_size=24, norm_topk_prob=True, rms_norm_eps=1e-6, mlp_only_layers=[],
            decoder_sparse_step=1, intermediate_size=48,
        )  # fmt: skip
        return config.load([*ours, "model.qk_norm=head"]), transformers.Qwen3MoeForCausalLM(theirs)
    theirs = transformers.OlmoeConfig(**shape, intermediate_size=24, norm_topk_prob=False, rms_norm_eps=1e-5)
    more = ["model.qk_norm=full", "router.normalise=false", "model.norm_eps=1e-5"]
    return config.load([*ours, *more]), transformers.OlmoeForCausalLM(theirs)


def parity(mesh: Mesh, kind: str) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings, theirs = pair(kind)
    ours = Transformer(settings.model, settings.router, settings.planner)
    for block in ours.layers:
        block.moe.experts.shard(mesh.ep)
    source = dict(theirs.named_parameters())
    assert {hf_name(name) for name, _ in ours.named_parameters()} == set(source)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(source[hf_name(name)])
    tokens = torch.randint(0, 97, (3, 20), generator=torch.Generator().manual_seed(1))
    logits, _ = ours(tokens[:, :-1])
    expected = theirs(tokens[:, :-1]).logits
    torch.testing.assert_close(logits, expected)
    nats, _ = ours(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(nats, F.cross_entropy(expected.transpose(1, 2), tokens[:, 1:], reduction="none"))
    nats.mean().backward()
    F.cross_entropy(expected.transpose(1, 2), tokens[:, 1:]).backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, source[hf_name(name)].grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["qwen3", "olmoe"])
def test_logits_and_gradients_equal_hugging_face(pool, kind: str) -> None:
    pool.run(parity, 1, kind)


def test_presets_build_and_the_estimate_counts_their_parameters() -> None:
    for preset in ("tiny", "small", "olmoe_1b7b"):
        for more in (
            ["train.dtype=bf16"],
            ["train.dtype=fp32", "model.num_shared_experts=2", "model.num_dense_layers=1"],
        ):
            settings = config.load([f"model={preset}", *more])
            if settings.model.vocab_size is None:
                settings = config.load([f"model={preset}", "model.vocab_size=4096", *more])
            model = build(settings)
            counted = sum(p.numel() for p in model.parameters())
            found = estimate(config.resolve_early(settings, 1))
            assert found.total == found.per_rank == counted
            inactive = sum(
                p[0].numel() * (settings.model.num_experts - settings.router.top_k)
                for name, p in model.named_parameters()
                if ".experts." in name
            )
            assert found.active == counted - inactive
    olmoe = estimate(config.resolve_early(config.load(["model=olmoe_1b7b"]), 1))
    assert olmoe.total == 6_919_161_856  # as Hugging Face counts OLMoE-1B-7B
    assert olmoe.active == pytest.approx(1.28e9, rel=0.01)  # as its paper says


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    settings = config.load(["model=tiny", "model.vocab_size=50"])
    models = []
    for seed in (0, 0, 1):
        model = Transformer(settings.model, settings.router, settings.planner)
        initialise(model, seed)
        models.append(dict(model.named_parameters()))
    gate_up = models[0]["layers.0.moe.experts.gate_up"].detach()
    assert all(torch.equal(a, models[1][name]) for name, a in models[0].items())
    assert not torch.equal(gate_up, models[2]["layers.0.moe.experts.gate_up"])
    assert not torch.equal(gate_up[0], gate_up[1])
    assert gate_up.std() == pytest.approx(settings.model.init_std, rel=0.05)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_products_equal_those_of_torch(monkeypatch, dtype: torch.dtype, own: bool) -> None:
    """Against fp64, to the rounding of the dtype: output and both gradients, one product or with an upstream view."""
    if not own:
        monkeypatch.setattr(cpu_gemm, "able", lambda *_: False)
    generator = torch.Generator().manual_seed(0)
    layer = linear.Linear(64, 96).to(dtype)
    x, upstream = (torch.randn(2, 5, n, generator=generator).to(dtype) for n in (64, 192))
    near = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    a, weight = x.clone().requires_grad_(), layer.weight.detach().double().requires_grad_()
    b = x.double().requires_grad_()
    layer(a).backward(upstream[..., ::2])
    F.linear(b, weight).backward(upstream[..., ::2].double())
    torch.testing.assert_close(layer(x).double(), F.linear(x.double(), weight), **near)
    torch.testing.assert_close(a.grad.double(), b.grad, **near)
    torch.testing.assert_close(layer.weight.grad.double(), weight.grad, **near)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kept", [1 << 20, 0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 33), (1, 33), (50, 33), (50, 160)])
def test_chunked_cross_entropy_equals_the_whole(
    monkeypatch, rows: int, vocabulary: int, kept: int, kernels: bool
) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", vocabulary * 7)
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 3)
    monkeypatch.setattr(cross_entropy, "KEPT_BYTES", kept)
    generator = torch.Generator().manual_seed(0)
    x, weight, upstream = (torch.randn(n, 16, generator=generator) for n in (rows, vocabulary, rows))
    target = torch.randint(0, vocabulary, (rows,), generator=generator)
    results = []
    for function in (
        partial(cross_entropy.linear_cross_entropy, kernels=KernelChoice(None if kernels else "torch")),
        lambda x, w, t: F.cross_entropy(x @ w.T, t, reduction="none"),
    ):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        nats = function(a, b, target)
        (nats * upstream[:, 0]).sum().backward()
        results.append((nats.detach(), a.grad, b.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("positions", [[0, 3, 4, 9], []], ids=str)
def test_cross_entropy_at_some_positions_is_that_of_a_mask(positions: list[int]) -> None:
    """Also where a rank has none of them: the head takes part in the backward all the same."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 5, 16, generator=generator), torch.randn(33, 16, generator=generator)
    target, at = torch.randint(0, 33, (2, 5), generator=generator), torch.tensor(positions, dtype=torch.int64)
    results = []
    for part in (at, None):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        nats = cross_entropy.linear_cross_entropy_at(part, a, b, target)
        mask = torch.zeros(10).index_fill(0, at, 1.0).view(2, 5)
        (nats if part is not None else nats * mask).sum().backward()
        results.append((nats.detach() * mask, a.grad, b.grad))
        assert part is None or torch.equal(nats, nats * mask)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_of_what_is_not_finite(dtype: torch.dtype) -> None:
    """One number of one word's weights is not one: no loss is, whatever the target."""
    weight = torch.randn(100, 32).to(dtype)
    x, target = torch.randn(3, 32).to(dtype), torch.tensor([0, 50, 99])
    weight[70, 0], x[:, 0] = torch.nan, 1.0
    assert cross_entropy.linear_cross_entropy(x, weight, target).isnan().all()
    weight[70, 0] = torch.inf
    assert not cross_entropy.linear_cross_entropy(x, weight, target).isfinite().all()


@pytest.mark.parametrize("logit_bytes", [2, 4, 12])
@pytest.mark.parametrize("vocabulary", [4_096, 50_304, 129_280, 201_088])
def test_a_chunk_of_logits_is_large_enough_for_its_products(vocabulary: int, logit_bytes: int) -> None:
    row = logit_bytes * vocabulary
    large, small = 80 << 30, 2 << 30
    rows = cross_entropy.chunk_rows(vocabulary, large, logit_bytes)
    assert rows >= 1024
    assert rows % 128 == 0
    assert rows * row <= large / 32 or rows == 1024
    assert 1 <= cross_entropy.chunk_rows(vocabulary, small, logit_bytes) * row <= small / 8
    assert 128 <= cross_entropy.chunk_rows(vocabulary, 0, logit_bytes) <= 1024  # a CPU
    assert cross_entropy.chunk_rows(1 << 30, small, logit_bytes) == 1


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_equals_the_formula(dtype: torch.dtype, threads: int) -> None:
    """Against fp64: shared key/value heads, blocks cut short, scores far apart."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 96, heads, 32).mul(3).to(dtype).transpose(1, 2).requires_grad_() for heads in (4, 2, 2))
    upstream = torch.randn(2, 96, 4, 32).to(dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True).transpose(1, 2)
    expected = [expected, *torch.autograd.grad(expected, exact, upstream.double())]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = attend(q, k, v, None)
        found = [found, *torch.autograd.grad(found, (q, k, v), upstream)]
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() / theirs.norm() < (8e-3 if dtype == torch.bfloat16 else 2e-6)


def within_documents(mesh: Mesh) -> None:
    """Two documents packed into one sequence give what each gives alone."""
    settings = config.load(["model=tiny", "model.vocab_size=50"])
    model = Transformer(settings.model, settings.router, settings.planner)
    for block in model.layers:
        block.moe.experts.shard(mesh.ep)
    initialise(model, 0)
    tokens = torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    document = torch.tensor([[0] * 5 + [1] * 7])
    packed = model(tokens, document=document)[0]
    torch.testing.assert_close(packed[:, :5], model(tokens[:, :5])[0])
    torch.testing.assert_close(packed[:, 5:], model(tokens[:, 5:])[0])  # RoPE is relative
    assert not torch.allclose(model(tokens)[0][:, 5:], packed[:, 5:])


def test_attention_stops_at_document_borders(pool) -> None:
    pool.run(within_documents, 1)
