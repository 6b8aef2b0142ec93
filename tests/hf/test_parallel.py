"""`moetrain.hf.expert_parallel`: what is refused, in one line, and what is saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moetrain import hf
from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import ExpertGroup, Mesh
from tests.hf import exact
from tests.hf.families import build, config_of, make_class
from tests.pool import Pool


def refuse(mesh: Mesh) -> list[str]:
    """The messages of what does not fit."""
    spread = build("qwen3_moe")
    hf.expert_parallel(spread, mesh.ep, "home")
    odd = build("qwen3_moe", num_experts=7)
    narrow: Any = build("qwen3_moe")
    narrow.model.layers[1].mlp.experts.num_experts = 6
    found = []
    for model, planner in (
        (nn.Linear(2, 2), "home"),
        (spread, "home"),
        (odd, "home"),
        (narrow, "home"),
        (build("qwen3_moe"), "best"),
    ):
        with pytest.raises(ConfigError) as error:
            hf.expert_parallel(model, mesh.ep, planner)
        found.append(str(error.value))
    return found


def test_bad_input_is_one_line(pool: Pool) -> None:
    for found in pool.run(refuse, 2):
        assert all("\n" not in line for line in found)
        assert found[0] == "model: Linear is not covered: none of its modules carries @use_experts_implementation"
        assert found[1] == "model: Qwen3MoeForCausalLM is spread over ranks already"
        assert found[2] == "group: its 2 ranks do not divide the 7 experts of model.layers.0.mlp.experts"
        assert found[3].startswith("model.layers.1.mlp.experts: shapes ")
        assert "best" in found[4]


def test_the_function_alone_is_refused() -> None:
    from moetrain.hf import spread

    spread.register()
    model: Any = build("qwen3_moe")
    model.set_experts_implementation("moetrain")
    with pytest.raises(ConfigError, match=r"moetrain\.hf\.expert_parallel\(model, group\) comes first"):
        model(input_ids=exact.batch())


def save(mesh: Mesh, folder: Path, name: str) -> None:
    model = build(name, seed=mesh.rank)  # rank 0's weights count
    hf.expert_parallel(model, mesh.ep, "home").save_pretrained(folder)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_all_experts_are_saved_and_load(pool: Pool, tmp_path: Path, name: str) -> None:
    pool.run(save, 2, tmp_path, name)
    whole: Any = build(name)
    for key, value in type(whole).from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(value, whole.state_dict()[key]), key


def test_one_rank_alone() -> None:
    model: Any = build("gpt_oss")
    whole, _, _ = exact.reference("gpt_oss")
    handle = hf.expert_parallel(model, ExpertGroup.alone())
    ids = exact.batch()
    with handle.step():
        exact.loss_of(model(input_ids=ids).logits, ids).backward()
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7, msg=name)
    counts = handle.statistics()[0].counts
    assert counts.sum() == ids.numel() * 2


def count_passes(mesh: Mesh, name: str) -> tuple[int, int, int]:
    """Layers, passes through the experts and plans made in a forward and backward with recompute."""
    model: Any = build(name)
    handle = hf.expert_parallel(model, mesh.ep, "home", reduction="sum")
    model.activation_checkpointing_enable()
    passes, plans = [], []
    for one in handle.experts:
        before, planner = one.watcher, one.planner
        one.planner = lambda *args, planner=planner: (plans.append(1), planner(*args))[1]
        assert before is handle
        one.module.register_forward_pre_hook(lambda *args: passes.append(1))
    exact.loss_of(model(input_ids=exact.batch()).logits, exact.batch()).backward()
    return len(handle.experts), len(passes), len(plans)


def test_recompute_passes_again_and_plans_once(pool: Pool) -> None:
    for layers, passes, plans in pool.run(count_passes, 2, "gpt_oss"):
        assert (layers, passes, plans) == (2, 4, 2)


def shard_the_rest(mesh: Mesh, name: str) -> float:
    """The largest difference of a gradient under FSDP2 around the dense part, of its largest element."""
    from torch.distributed.fsdp import fully_shard

    whole, _, pins = exact.reference(name)
    model: Any = build(name)
    handle = hf.expert_parallel(model, mesh.ep, "home")
    for one in handle.experts:
        one.planner = exact.forced
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh.dense, ignored_params=handle.expert_parameters())
    fully_shard(model, mesh=mesh.dense, ignored_params=handle.expert_parameters())
    each = exact.SEQUENCES // mesh.world
    begin = mesh.rank * each
    ids = exact.batch()[begin : begin + each]
    with handle.step(), pins.part(begin, begin + each, exact.SEQUENCES).replay():
        logits = model(input_ids=ids).logits
        (exact.loss_of(logits, ids) * mesh.world).backward()  # FSDP2 averages over ranks
    found, worst = handle.full_gradients(), 0.0
    for key, parameter in whole.named_parameters():
        assert parameter.grad is not None
        worst = max(worst, float((found[key] - parameter.grad).abs().max() / parameter.grad.abs().max()))
    squares = [p.grad.double().square().sum() for p in whole.parameters() if p.grad is not None]
    norm = float(torch.stack(squares).sum().sqrt())
    return max(worst, abs(handle.clip_grad_norm_(1e9) - norm) / norm)


def test_fsdp2_around_the_dense_part(pool: Pool) -> None:
    assert max(pool.run(shard_the_rest, 2, "qwen3_moe")) < 1e-5


def train_from_meta(mesh: Mesh, name: str) -> list[dict[str, torch.Tensor]]:
    """Gradients and weights of a model that is spread whole, and of one that is spread on the meta device."""
    found = []
    for on_meta in (False, True):
        whole: Any = build(name)
        if on_meta:
            with torch.device("meta"):
                model: Any = make_class(name)(config_of(name))
        else:
            model = build(name)
        handle = hf.expert_parallel(model, mesh.ep, "home", reduction="mean")
        if on_meta:
            assert all(parameter.is_meta for parameter in model.parameters())
            with pytest.raises(ConfigError, match="is on the meta device"):
                handle.experts[0](torch.zeros(1, 64), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
            model.to_empty(device="cpu")
            model.init_weights()
            handle.load_full_state_dict(whole.state_dict())
            model.train()
        ids = exact.batch()[2 * mesh.rank : 2 * mesh.rank + 2]
        with handle.step():
            exact.loss_of(model(input_ids=ids).logits, ids).backward()
        handle.reduce_dense_gradients()
        found.append({**handle.full_state_dict(), **{f"grad of {k}": v for k, v in handle.full_gradients().items()}})
    return found


def test_a_model_on_the_meta_device(pool: Pool) -> None:
    for whole, meta in pool.run(train_from_meta, 2, "deepseek_v3"):
        assert whole.keys() == meta.keys()
        assert all(torch.equal(whole[key], meta[key]) for key in whole)
