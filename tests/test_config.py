"""Configuration: shipped YAML, golden files, and one clear line for every mistake."""

from pathlib import Path

import pytest
import yaml

from moetrain import config
from moetrain.config import ConfigError
from moetrain.moe.routers import ROUTERS

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "default": [],
    "tiny": ["model=tiny"],
    "olmoe_1b7b": ["model=olmoe_1b7b"],
    "qwen3_30b_a3b": ["model=qwen3_30b_a3b"],
    "deepseek_v3_like": ["model=deepseek_v3_like"],
    "home": ["planner=home"],
    "makespan": ["planner=makespan"],
    "eplb": ["planner=eplb"],
    "debian": ["data=debian"],
    "folder": ["data=folder", "data.path=tests"],
    "deepspeed": ["engine=deepspeed"],
    **{path.stem: [f"experiment={path.stem}"] for path in (ROOT / "configs" / "experiment").glob("*.yaml")},
}


@pytest.mark.parametrize("name", CASES)
def test_the_resolved_config_is_the_golden_one(name: str, monkeypatch) -> None:
    """`python tests/test_config.py` writes the golden files anew, for a review to see what a default became."""
    monkeypatch.chdir(ROOT)
    assert config.dump(config.load(CASES[name])) == (GOLDEN / f"{name}.yaml").read_text()


def test_every_shipped_yaml_is_in_a_golden_config() -> None:
    shipped = {p.stem for p in (ROOT / "configs").glob("*/*.yaml")}
    assert shipped <= {"small", "local", "llep", "native", *CASES}


def test_a_resolved_config_loads_again(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(config.load(["train.steps=7"])))
    assert config.load_resolved(path, ["train.seed=3"]) == config.load(["train.steps=7", "train.seed=3"])


def test_text_is_taken_literally(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(config.load(["run.name=2024"])))
    assert config.load_resolved(path).run.name == "2024"
    for prompt in ("def main():", "# hello", "12", "a: b"):
        assert config.load_resolved(path, [f"generate.prompt={prompt}"]).generate.prompt == prompt
    with pytest.raises(ConfigError, match="planner=home: a run's groups are fixed"):
        config.load_resolved(path, ["planner=home"])


def test_a_folder_of_ones_own_comes_on_top(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    mine = {**yaml.safe_load((ROOT / "configs/model/tiny.yaml").read_text()), "dim": 96}
    (tmp_path / "model" / "mine.yaml").write_text(yaml.safe_dump(mine))
    assert config.load(["model=mine"], str(tmp_path)).model.dim == 96


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.stepz=5"], "train.stepz: no such field; did you mean train.steps?"),
        (["+train.extra=5"], "train.extra=5: no such field; did you mean train.threads?"),
        (["train.steps=many"], "train.steps=many: must be a valid integer"),
        (["train.steps=true"], "train.steps=True: must not be true or false"),
        (["train.steps=0"], "train.steps=0: must be greater than 0"),
        (["train.dtype=fp8"], "train.dtype=fp8: must be 'auto', 'fp32' or 'bf16'"),
        (["optim.lr=-1"], "optim.lr=-1: must be greater than 0"),
        (["optim.lr=nan"], "optim.lr=nan: must be a finite number"),
        (["optim.betas=[0.9]"], "optim.betas.1=[0.9]: must be given"),
        (["optim.min_lr=1"], "optim.min_lr=1.0: must be at most optim.lr=0.005"),
        (["balance.device_groups=9"], "balance.device_groups=9: must be at most model.num_experts=8"),
        (["balance.accumulate=late"], "balance.accumulate=late: must be 'buffer', 'exact' or 'hold'"),
        (["router.top_k=9"], "router.top_k=9: must be at most model.num_experts=8"),
        (
            ["router.name=nope"],
            f"router.name=nope: known routers are {', '.join(ROUTERS)}",
        ),
        (["router.noise=1", "router.name=top_p"], "router.noise=1.0: the router top_p has no such option"),
        (["router.top_p=0.5"], "router.top_p=0.5: the router topk has no such option"),
        (["router.name=top_p", "balance.bias=sign"], "balance.bias=sign: means nothing to the router top_p"),
        (["router.groups=4"], "router.groups=4: goes with router.top_groups, which is None"),
        (["router.groups=3", "router.top_groups=1"], "router.groups=3: must divide the 8 experts of a layer"),
        (["router.groups=2", "router.top_groups=3"], "router.top_groups=3: must be at most router.groups=2"),
        (
            ["router.groups=8", "router.top_groups=1"],
            "router.top_groups=1: must have at least router.top_k=2 experts together",
        ),
        (
            ["router.name=grouped", "router.token_groups=5"],
            "router.token_groups=5: must leave each group at least router.top_k=2 of 8 experts",
        ),
        (
            ["model.expert_schedule=descending"],
            "model.min_experts=null: must be given for model.expert_schedule=descending",
        ),
        (["model.min_experts=3"], "model.min_experts=3: must divide model.num_experts=8"),
        (
            ["router.k_schedule=descending", "router.top_k=6"],
            "router.k_schedule=descending: a layer has top-11 of 8 experts",
        ),
        (
            ["router.name=gating_residual", "model.expert_schedule=ascending", "model.min_experts=4"],
            "model.expert_schedule=ascending: must be uniform for the router gating_residual: it adds the last layer's "
            "logits",
        ),
        (
            ["model.expert_schedule=ascending", "model.min_experts=4", "parallel.nproc=8", "parallel.ep=8"],
            "parallel.ep=8: needs at least as many experts, of one layer=4",
        ),
        (["planner=best"], "planner=best: must be one of eplb, home, llep, makespan"),
        (["planner.name=best"], "planner.name=best: known planners are home, llep, makespan, eplb"),
        (["planner=home", "+planner.alpha=1.5"], "planner.alpha=1.5: the planner home has no such option"),
        (["planner.alpha=1.5"], "planner.alpha: no such field in this planner preset"),
        (["engine=fsdp"], "engine=fsdp: must be one of deepspeed, native"),
        (["engine.name=fsdp"], "engine.name=fsdp: must be one of 'native', 'deepspeed'"),
        (["+engine.zero_stage=1"], "engine.zero_stage=1: no such field in this engine preset"),
        (["engine.max_rows=0"], "engine.max_rows=0: must be greater than 0"),
        (["engine.guest_memory_mib=-1"], "engine.guest_memory_mib=-1: must be greater than or equal to 0"),
        (["planner=llep", "planner.alpha=0.5"], "planner.alpha=0.5: must be greater than or equal to 1"),
        (
            ["parallel.nproc=16", "parallel.ep=16"],
            "parallel.ep=16: needs at least as many experts, model.num_experts=8",
        ),
        (["parallel.nproc=2", "parallel.ep=4"], "parallel.ep=4: must divide the ranks of one replica, 2"),
        (
            ["parallel.nproc=2", "parallel.dp_replicate=3"],
            "parallel.dp_replicate=3: must divide the number of ranks, 2",
        ),
        (
            ["parallel.nproc=4", "parallel.dp_shard=2"],
            "parallel.dp_shard=2: dp_replicate=1 × dp_shard must be the number of ranks, 4",
        ),
        (
            ["parallel.nproc=2", "train.global_batch=7"],
            "train.global_batch=7: must be a multiple of 2 ranks",
        ),
        (
            ["parallel.nproc=2", "train.global_batch=8", "train.micro_batch=3"],
            "train.global_batch=8: must be a multiple of 2 ranks × micro_batch=3",
        ),
        (["model.dim=100"], "model.dim=100: must be a multiple of 8 (grouped GEMM: 16-byte rows)"),
        (["model.num_kv_heads=3"], "model.num_kv_heads=3: must divide model.num_heads=4"),
        (
            ["model.num_dense_layers=4"],
            "model.num_dense_layers=4: must be below model.num_layers=4, so that one layer has experts",
        ),
        (["data=folder"], "data.path: must be given"),
        (["data=folder", "data.path=/nowhere"], "data.path=/nowhere: there is no such file or folder"),
        (["data.tokenizer=/nowhere"], "data.tokenizer=/nowhere: there is no such file"),
        (["train.steps"], "train.steps: an override reads field=value"),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_rule(overrides: list[str], line: str) -> None:
    def laid_out() -> None:
        settings = config.load(overrides)
        settings.layout(settings.parallel.nproc or 1)

    with pytest.raises(ConfigError) as caught:
        laid_out()
    assert str(caught.value) == line


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, overrides in CASES.items():
        (GOLDEN / f"{name}.yaml").write_text(config.dump(config.load(overrides)))
