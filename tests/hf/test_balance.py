"""The balance loss of a transformers model: that of one process on the whole batch, however it is split."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain import BalanceOptions, hf
from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import ExpertGroup, Mesh
from tests.hf import exact
from tests.hf.families import build
from tests.pool import Pool

COEFFICIENT = 0.5  # large, so that it shows in the gradients
SIGMOID = ("deepseek_v3",)


def losses_of(name: str) -> tuple[Any, Tensor, Tensor]:
    """In one process, from what transformers returns: the model after a backward, its loss and the balance loss."""
    model: Any = build(name)
    ids = exact.batch()
    found = model(input_ids=ids, use_cache=False, output_router_logits=True)
    total = torch.zeros(())
    for logits_TE, router in zip(found.router_logits, [m.mlp.gate for m in model.model.layers], strict=True):
        scores = logits_TE.sigmoid() if name in SIGMOID else logits_TE.softmax(-1)
        with torch.no_grad():
            biased = scores + router.e_score_correction_bias if name in SIGMOID else scores
            if name in SIGMOID:  # one of two groups, by the sum of its two best
                groups = biased.view(-1, 2, 4)
                best = groups.topk(2, -1).values.sum(-1).argmax(-1)
                biased = (
                    torch.full_like(groups, -1.0)
                    .scatter(
                        1, best[:, None, None].expand(-1, 1, 4), groups.gather(1, best[:, None, None].expand(-1, 1, 4))
                    )
                    .flatten(1)
                )
            counts_E = torch.bincount(biased.topk(2).indices.flatten(), minlength=8)
        mean_E = (scores / scores.sum(-1, keepdim=True)).mean(0)
        total = total + 8 * (counts_E / counts_E.sum() * mean_E).sum()
    loss = exact.loss_of(found.logits, ids)
    (loss + COEFFICIENT * total).backward()
    return model, loss.detach(), COEFFICIENT * total.detach()


def balance_spread(mesh: Mesh, name: str, recompute: bool, micro_steps: int, idle: bool) -> float:
    """The largest difference, of the largest element, in loss and gradients; choices are counted ahead."""
    whole, _, expected = losses_of(name)
    model: Any = build(name)
    replicas = mesh.expert_data if mesh.expert_data.size() > 1 else None
    balance = BalanceOptions(coefficient=COEFFICIENT, accumulate="exact")
    handle = hf.expert_parallel(model, mesh.ep, "home", replicas=replicas, reduction="sum", balance=balance)
    for one in handle.experts:
        one.planner = exact.forced
    if recompute:
        model.activation_checkpointing_enable()
    sizes = exact.shares(mesh.world, idle)
    begin = sum(sizes[: mesh.rank])
    mine = exact.batch()[begin : begin + sizes[mesh.rank]]
    total, batches = torch.zeros(()), mine.chunk(micro_steps)
    with handle.step(micro_steps):
        recorded = []
        for ids in batches if micro_steps > 1 else ():
            with torch.no_grad(), handle.record_choices() as choices:
                model(input_ids=ids)
            recorded.append(choices)
        for number, ids in enumerate(batches):
            if len(ids):
                with handle.replay_choices(recorded[number]) if recorded else nullcontext():
                    loss = exact.loss_of(model(input_ids=ids, use_cache=False).logits, ids)
            else:
                loss = handle.join_without_tokens()
            share = handle.balance_loss()
            (loss + share).backward()
            total += share.detach()
    handle.reduce_dense_gradients()
    worst = abs(float(handle._gradients.sum_over_ranks(total) - expected)) / float(expected)
    sums = sum(float(one.probs_E.sum()) for one in handle.statistics() if one.probs_E is not None)
    assert sums == pytest.approx(2 * 2 * mine.numel() if recorded else 2 * mine.numel(), rel=1e-5)
    found = handle.full_gradients()
    for key, parameter in whole.named_parameters():
        assert parameter.grad is not None
        worst = max(worst, float((found[key] - parameter.grad).abs().max() / parameter.grad.abs().max()))
    return worst


@pytest.mark.parametrize(
    ("name", "recompute", "micro_steps", "idle"),
    [("qwen3_moe", False, 1, False), ("qwen3_moe", True, 2, False), ("deepseek_v3", True, 1, True)],
)
def test_loss_and_gradients_equal_one_process(
    pool: Pool, name: str, recompute: bool, micro_steps: int, idle: bool
) -> None:
    assert max(pool.run(balance_spread, 2, name, recompute, micro_steps, idle)) < 1e-5


def test_ranks_that_hold_the_same_experts_share_the_batch(pool: Pool) -> None:
    assert max(pool.run(balance_spread, 4, "qwen3_moe", False, 1, False, ep=2)) < 1e-5


def one_rank(name: str, **options: Any) -> tuple[Any, hf.HFExpertParallel]:
    model: Any = build(name)
    return model, hf.expert_parallel(model, ExpertGroup.alone(), balance=BalanceOptions(**options))


def test_the_bias_and_the_held_counts_change_at_the_end_of_a_step() -> None:
    model, handle = one_rank("deepseek_v3", coefficient=0.01, bias="sign", bias_rate=0.25, accumulate="hold")
    before = model.model.layers[0].mlp.gate.e_score_correction_bias.clone()
    with handle.step():
        loss = exact.loss_of(model(input_ids=exact.batch()).logits, exact.batch())
        (loss + handle.balance_loss()).backward()
    counts = torch.from_numpy(handle.statistics()[0].counts)
    step = 0.25 * (counts.double().mean() - counts).sign().float()
    torch.testing.assert_close(model.model.layers[0].mlp.gate.e_score_correction_bias, before + step)
    held = handle.experts[0].router.held
    torch.testing.assert_close(held, (counts / counts.sum()).float())


def test_what_a_family_does_not_have_is_refused_by_name() -> None:
    def refuse(name: str, **options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            one_rank(name, **options)
        return str(error.value)

    assert refuse("zaya").startswith("router scores: not for ZayaRouter at model.layers.0.mlp.gate")
    message = "balance.bias=sign: Qwen3MoeTopKRouter at model.layers.0.mlp.gate has no e_score_correction_bias"
    assert refuse("qwen3_moe", bias="sign").startswith(message)
    assert "gives probabilities, not logits" in refuse("gemma4", z_coefficient=0.1)
    assert refuse("qwen3_moe", sequence_coefficient=0.1).startswith("balance.sequence_coefficient: not for")
    handle = hf.expert_parallel(build("qwen3_moe"), ExpertGroup.alone())
    with pytest.raises(ConfigError, match="balance_loss: none was asked for"):
        handle.balance_loss()


def test_exact_counts_of_micro_steps_that_were_not_recorded_are_refused() -> None:
    model, handle = one_rank("qwen3_moe", accumulate="exact")
    handle.begin_step(3)
    with torch.no_grad(), handle.record_choices():
        model(input_ids=exact.batch())
    logits = model(input_ids=exact.batch()).logits
    assert logits.requires_grad
    with pytest.raises(RuntimeError, match=r"1 micro-steps to come were recorded by record_choices\(\), of 3"):
        handle.balance_loss()
