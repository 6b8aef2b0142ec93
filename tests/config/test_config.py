"""Configuration: shipped YAML, golden files, and one clear line for every mistake."""

from pathlib import Path

import pytest
import yaml

from moetrain import cli, config
from moetrain.config import ConfigError, messages, unused
from moetrain.config.fields import all_fields
from moetrain.moe.routing import ROUTERS

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "default": [],
    "tiny": ["model=tiny"],
    "olmoe_1b7b": ["model=olmoe_1b7b"],
    "qwen3_30b_a3b": ["model=qwen3_30b_a3b"],
    "qwen3_235b_a22b": ["model=qwen3_235b_a22b"],
    "deepseek_v3_like": ["model=deepseek_v3_like"],
    "home": ["planner=home"],
    "makespan": ["planner=makespan"],
    "eplb": ["planner=eplb"],
    "static": ["planner=static"],
    "auto": ["planner=auto"],
    "debian": ["data=debian"],
    "folder": ["data=folder", "data.path=tests"],
    "tokens": ["data=tokens", "data.sources.web.path=corpora/web", "data.sources.code.path=code.idx"],
    "chat": ["data=chat", "data.path=tests"],
    "deepspeed": ["engine=deepspeed"],
    "hf": ["model=hf", "model.path=tests/config/tiny_qwen3_moe"],
    "lora": ["model=hf", "model.path=tests/config/tiny_qwen3_moe", "lora.rank=8"],
    "sft_lora": ["experiment=sft", "data.path=tests", "lora.rank=8"],
    **{path.stem: [f"experiment={path.stem}"] for path in (ROOT / "configs" / "experiment").glob("*.yaml")},
    "sft": ["experiment=sft", "data.path=tests"],
    "replay": ["experiment=sft", "data.path=tests", "router.replay=choices.npz"],
    "dpo": ["experiment=dpo", "data.path=tests"],
}


@pytest.mark.parametrize("name", CASES)
def test_the_resolved_config_is_the_golden_one(name: str, monkeypatch) -> None:
    """`python -m tests.config.test_config` writes the golden files anew, for a review to see what a default became."""
    monkeypatch.chdir(ROOT)
    assert config.dump(config.load(CASES[name])) == (GOLDEN / f"{name}.yaml").read_text()


def test_every_shipped_yaml_is_in_a_golden_config() -> None:
    shipped = {p.stem for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "cluster"}
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


def test_a_file_of_ones_own_wins_over_the_shipped_one_of_its_name(tmp_path: Path) -> None:
    """A preset, an experiment and the defaults list of config.yaml; what they name may still be shipped."""
    for folder in ("model", "experiment"):
        (tmp_path / folder).mkdir()
    mine = {**yaml.safe_load((ROOT / "configs/model/tiny.yaml").read_text()), "dim": 96}
    (tmp_path / "model" / "tiny.yaml").write_text(yaml.safe_dump(mine))
    experiment = "# @package _global_\ndefaults: [override /model: tiny, _self_]\ntrain: {steps: 7}\n"
    (tmp_path / "experiment" / "router_topk.yaml").write_text(experiment)
    found = config.load(["experiment=router_topk"], str(tmp_path))
    assert (found.model.dim, found.train.steps) == (96, 7)
    whole = (ROOT / "configs" / "config.yaml").read_text()
    changed = whole.replace("model: small", "model: tiny").replace("planner: makespan", "planner: home")
    (tmp_path / "config.yaml").write_text(changed.replace("decay_fraction: 0.2", "decay_fraction: 0.3"))
    found = config.load([], str(tmp_path))
    assert (found.model.dim, found.planner.name, found.optim.decay_fraction) == (96, "home", 0.3)
    assert config.load(["model=tiny"]).model.dim == 64  # without the folder, as before


WITHOUT_EFFECT = [
    (["data.path=tests"], "data.path=tests: has an effect only with data=folder; data=local, which is"),
    (["data.on_bad=skip"], "data.on_bad=skip: has an effect only with data=folder, not data=local"),
    (
        ["data.tokenizer=README.md", "data.vocab_size=300"],
        "data.vocab_size=300: has no effect with data.tokenizer, which",
    ),
    (["optim.decay_fraction=0.3"], "optim.decay_fraction=0.3: has an effect only with optim.schedule=wsd, not cosine"),
    (
        ["optim={decay_fraction:0.3}"],
        "optim.decay_fraction=0.3: has an effect only with optim.schedule=wsd, not cosine",
    ),
    (
        ["balance.coefficient=0", "balance.scope=micro"],
        "balance.scope=micro: has an effect only with balance.coefficient or",
    ),
    (
        ["balance.scope=micro", "balance.accumulate=exact"],
        "balance.accumulate=exact: has an effect only with balance.scope=global",
    ),
    (
        ["balance.coefficient=0", "balance.micro_fraction=1"],
        "balance.micro_fraction=1.0: has an effect only with balance.coefficient",
    ),
    (
        ["balance.device_groups=2"],
        "balance.device_groups=2: has an effect only with balance.device_coefficient above 0",
    ),
    (["balance.bias_rate=0.1"], "balance.bias_rate=0.1: has an effect only with balance.bias=sign or proportional"),
    (["router.top_p=0.4"], "router.top_p=0.4: the router topk has no such option"),
    (["router.state_dim=8"], "router.state_dim=8: the router topk has no such option"),
    (
        ["router.zero_compute_tau=0.5"],
        "router.zero_compute_tau=0.5: has an effect only with model.zero_experts, copy_experts or",
    ),
    (
        ["router.name=top_p", "router.k_schedule=ascending"],
        "router.k_schedule=ascending: has no effect with router.name=top_p",
    ),
    (
        ["generate.temperature=0", "generate.seed=3"],
        "generate.seed=3: has an effect only with generate.temperature above 0",
    ),
    (["track.wandb=false", "track.project=x"], "track.project=x: has an effect only with track.wandb=true"),
    (["track.wandb=false", "track.entity=x"], "track.entity=x: has an effect only with track.wandb=true"),
    (["track.wandb=false", "track.group=x"], "track.group=x: has an effect only with track.wandb=true"),
    (["track.wandb=false", "track.tags=[x]"], "track.tags=('x',): has an effect only with track.wandb=true"),
    (["track.wandb=false", "track.job_type=x"], "track.job_type=x: has an effect only with track.wandb=true"),
    (["track.wandb=false", "track.notes=x"], "track.notes=x: has an effect only with track.wandb=true"),
    (["track.profile_steps=5"], "track.profile_steps=5: has an effect only with track.profile_from=STEP"),
    (
        ["model=tiny", "model.dense_hidden=64"],
        "model.dense_hidden=64: has an effect only with model.num_dense_layers above 0",
    ),
    (
        ["model.min_experts=4"],
        "model.min_experts=4: has an effect only with a model.expert_schedule other than uniform",
    ),
    (["engine.offload_dir=/tmp"], "engine.offload_dir=/tmp: has an effect only with engine.offload=disk, not none"),
    (
        ["planner=home", "engine.guest_memory_mib=5"],
        "engine.guest_memory_mib=5: has an effect only with a planner that lends",
    ),
    (["planner=home", "+planner.replicas=1"], "planner.replicas=1: the planner home has no such option"),
]


@pytest.mark.parametrize(("overrides", "line"), WITHOUT_EFFECT)
def test_what_is_set_and_has_no_effect_is_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(overrides)
    assert str(caught.value).startswith(line)


def test_every_option_is_refused_somewhere_or_has_an_effect_by_itself() -> None:
    """Set to what it is already, an option of config.yaml is accepted unless the table above has it."""
    refused = {line.partition("=")[0] for _, line in WITHOUT_EFFECT}
    default = config.load([])
    for section in ("run", "train", "optim", "parallel", "balance", "eval", "checkpoint", "recovery", "track"):
        for field in type(getattr(default, section)).model_fields:
            name = f"{section}.{field}"
            if name not in refused:
                unused.check(default, [name])


def test_a_file_of_ones_own_may_not_set_what_has_no_effect(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\noptim: {decay_fraction: 0.5}\n")
    with pytest.raises(ConfigError, match=r"optim\.decay_fraction=0\.5: has an effect only with optim\.schedule=wsd"):
        config.load(["experiment=mine"], str(tmp_path))
    assert config.load(["experiment=mine", "optim.schedule=wsd"], str(tmp_path)).optim.decay_fraction == 0.5


@pytest.mark.parametrize(
    ("verb", "override"),
    [
        ("eval", "optim.lr=1"),
        ("eval", "generate.tokens=4"),
        ("eval", "run.dir=elsewhere"),
        ("generate", "eval.every=5"),
        ("generate", "train.steps=3"),
        ("data", "train.steps=3"),
        ("data", "model=tiny"),
        ("profile", "data=folder"),
        ("profile", "track.wandb=false"),
        ("bench", "generate.tokens=4"),
    ],
)
def test_what_a_verb_does_not_use_is_refused(verb: str, override: str, capfd: pytest.CaptureFixture) -> None:
    words = {"bench": ["step"], "eval": ["runs/any"], "generate": ["runs/any"]}.get(verb, [])
    assert cli.main([verb, *words, override]) == 2
    assert capfd.readouterr().err == f"error: {override.partition('=')[0]}: `moetrain {verb}` does not use it\n"


QUOTED = "a value with = : ~ , brackets, quotes or letters beyond ASCII is quoted twice"


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["train.stepz=5"], "train.stepz: no such field; did you mean train.steps?"),
        (
            ["+parallel.tp=5"],
            "parallel.tp=5: no such field; parallel has nproc, ep, r, dp_shard, dp_replicate, "
            "backend, layout, cluster, exchange, flow_splits, chunks, uneven",
        ),
        (["lr=1e-3"], "lr: no such field; did you mean optim.lr?"),
        (["model.hidden_size=64"], "model.hidden_size: no such field; did you mean model.dim?"),
        (["expert_model_parallel_size=2"], "expert_model_parallel_size: no such field; did you mean parallel.ep?"),
        (["train.lr=1e-3"], "train.lr: no such field; did you mean optim.lr?"),
        (["seed=3"], "seed: no such field; did you mean train.seed or generate.seed?"),
        (["batch_size=3"], "batch_size: no such field"),
        (["model.layers=3"], "model.layers: no such field; did you mean model.num_layers?"),
        (
            ["parallel.tp=2"],
            "parallel.tp: no such field; parallel has nproc, ep, r, dp_shard, dp_replicate, "
            "backend, layout, cluster, exchange, flow_splits, chunks, uneven",
        ),
        (
            ["optim.rule=muon"],
            "optim.rule: no such field; optim has name, lr, min_lr, schedule, warmup, decay_fraction, betas, eps, "
            "weight_decay, clip, state_dtype",
        ),
        (["optim.name=muon"], "optim.name=muon: known optimizers are adamw"),
        (["run.name=lr=0.1"], f"run.name=lr=0.1: {QUOTED}, \"run.name='lr=0.1'\""),
        (["run.name=é"], f"run.name=é: {QUOTED}, \"run.name='é'\""),
        (["generate.prompt=def f("], f"generate.prompt=def f(: {QUOTED}, \"generate.prompt='def f('\""),
        (["data.path=~/x"], "data.path=~/x: nothing expands ~ here, data.path=$HOME/x means the same"),
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
        (["router.noise=1", "router.name=top_p"], "router.noise=1: the router top_p has no such option"),
        (["router.top_p=0.5"], "router.top_p=0.5: the router topk has no such option"),
        (
            ["router.name=top_p", "balance.bias=sign"],
            "balance.bias=sign: must be none for the router top_p, which has no use for a bias",
        ),
        (["router.groups=4"], "router.groups=4: must be set together with router.top_groups, which is null"),
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
            "router.k_schedule=descending: must leave every layer enough experts; one has 8 for 11 per token",
        ),
        (
            ["router.name=gating_residual", "model.expert_schedule=ascending", "model.min_experts=4"],
            "model.expert_schedule=ascending: must be uniform for the router gating_residual, which adds the logits "
            "of the layer before",
        ),
        (
            [
                "model.expert_schedule=ascending",
                "model.min_experts=4",
                "parallel.nproc=8",
                "parallel.ep=8",
                "parallel.r=1",
            ],
            "parallel.r=1: must give each rank of parallel.ep=8 a slice of the experts, of one layer=4",
        ),
        (["planner=best"], "planner=best: must be one of auto, eplb, home, llep, makespan, static"),
        (["planner.name=best"], "planner.name=best: known planners are home, llep, makespan, eplb, static, auto"),
        (["planner=home", "+planner.alpha=1.5"], "planner.alpha=1.5: the planner home has no such option"),
        (["planner.alpha=1.5"], "planner.alpha=1.5: the planner makespan has no such option"),
        (["engine=fsdp"], "engine=fsdp: must be one of deepspeed, native"),
        (["engine.name=fsdp"], "engine.name=fsdp: must be one of 'native', 'deepspeed'"),
        (["+engine.zero_stage=1"], "engine.zero_stage=1: no such field in this engine preset"),
        (["engine.max_rows=0"], "engine.max_rows=0: must be greater than 0"),
        (["engine.guest_memory_mib=-1"], "engine.guest_memory_mib=-1: must be greater than or equal to 0"),
        (["planner=llep", "planner.alpha=0.5"], "planner.alpha=0.5: must be greater than or equal to 1"),
        (
            ["parallel.nproc=16", "parallel.ep=16", "model.expert_hidden=24", "model.num_experts=2"],
            "parallel.ep=16: model.expert_hidden=24 has no slices of equal widths, multiples of 8, that give "
            "every rank one of model.num_experts=2",
        ),
        (["parallel.nproc=2", "parallel.r=3"], "parallel.r=3: must cut model.expert_hidden=256 into multiples of 8"),
        (["parallel.nproc=2", "parallel.r=0"], "parallel.r=0: must be auto or a whole number above 0"),
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
        (["model.dim=100"], "model.dim=100: must be a multiple of 8: grouped GEMMs need rows of 16 bytes"),
        (["model.num_kv_heads=3"], "model.num_kv_heads=3: must divide model.num_heads=4"),
        (
            ["model.num_dense_layers=4"],
            "model.num_dense_layers=4: must be below model.num_layers=4, so that one layer has experts",
        ),
        (["track.project=a/b"], "track.project=a/b: must not contain any of / \\ # ? % :"),
        (["track.entity=a/b"], "track.entity=a/b: must not contain any of / \\ # ? % :"),
        (["track.group=''"], "track.group=: must have 1 to 128 characters"),
        (["track.tags=['']"], "track.tags=['']: must be words of 1 to 64 characters"),
        (["data=folder"], "data.path: must be given"),
        (["data=folder", "data.path=/nowhere"], "data.path=/nowhere: there is no such file or folder"),
        (["data.tokenizer=/nowhere"], "data.tokenizer=/nowhere: must be an existing file"),
        (["train.steps"], "train.steps: an override reads field=value"),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_rule(overrides: list[str], line: str) -> None:
    def laid_out() -> None:
        settings = config.load(overrides)
        config.find_ep(settings, settings.parallel.nproc or 1)

    with pytest.raises(ConfigError) as caught:
        laid_out()
    assert str(caught.value) == line


def test_the_words_of_others_lead_to_fields_that_exist() -> None:
    assert set(messages.ELSEWHERE) <= set(all_fields())
    words = [word for text in messages.ELSEWHERE.values() for word in text.split()]
    assert len(words) == len(set(words))
    said = "--learning-rate: no such option; fields are set as field=value; did you mean optim.lr=0.1?"
    assert str(messages.unknown_option("--learning-rate", "0.1")) == said


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, overrides in CASES.items():
        (GOLDEN / f"{name}.yaml").write_text(config.dump(config.load(overrides)))
