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
from tests.hf.families import build
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
