"""Runs with LoRA: they go on at any layout beside what they adapt, peft loads them, mistakes are one line."""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor

from moetrain import cli, config
from moetrain.checkpoint import manifest, newest
from moetrain.config.spec import resolve
from moetrain.distributed.mesh import Mesh
from moetrain.engine import build_engine
from moetrain.models.adapters import adapters_off
from moetrain.moe.planning.cost import default_costs
from moetrain.training.step import build, micro_batches, optimizer_step
from moetrain.training.tasks import evaluate_run
from tests.hf import families, folders
from tests.hf.test_training import LR, RandomSamples, options
from tests.pool import Pool
from tests.training.test_train import losses, rows_of, run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
STEADY = ["optim.lr=0.01", "optim.min_lr=0.01", "optim.warmup=0", "track.trace_every=0"]
LORA = ["lora.rank=4", "lora.alpha=32"]


def evaluate(mesh: Mesh, folder: str) -> str:
    """What `moetrain eval` finds."""
    place = Path(folder)
    settings = config.load_resolved(place / "config.yaml", [], {"run.dir": str(place.parent), "run.name": place.name})
    with redirect_stdout(StringIO()) as out:
        evaluate_run(settings, mesh, as_json=True)
    return out.getvalue()


def compute_logits(model: torch.nn.Module) -> Tensor:
    ids = torch.arange(2 * 24).view(2, 24) * 7 % 250
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def load_whole(folder: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")


def check_exports(lora: str, base: Path, tmp_path: Path) -> None:
    """peft computes of the adapters what transformers computes of the merged model."""
    adapters, merged = tmp_path / "adapters", tmp_path / "merged"
    assert cli.main(["export", lora, "--out", str(adapters)]) == 0
    assert cli.main(["export", lora, "--out", str(merged), "--merge", "--dtype", "fp32"]) == 0
    assert sorted(path.name for path in adapters.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    before = compute_logits(load_whole(base))
    with_adapters = compute_logits(peft.PeftModel.from_pretrained(load_whole(base), adapters))
    torch.testing.assert_close(compute_logits(load_whole(merged)), with_adapters, atol=1e-5, rtol=1e-5)
    assert (with_adapters - before).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "shared"), [("qwen3_moe", True), ("gpt_oss", False)])
def test_a_run_of_a_folder_goes_on_at_another_layout_and_peft_loads_it(
    pool: Pool, tiny: list[str], name: str, shared: bool, tmp_path: Path
) -> None:
    families.build(name, vocab_size=512).save_pretrained(tmp_path / "base")
    plain = ["model=hf", f"model.path={tmp_path / 'base'}", "data.attend_within_documents=false"]
    own = [*[word for word in tiny if word != "model=tiny"], *plain, *STEADY, *LORA, f"lora.shared={shared}"]
    whole = pool.run(run, 1, [*own, "run.name=whole", "train.steps=3"])[0]
    parts = pool.run(run, 2, [*own, "run.name=parts", "train.steps=2"], ep=2)[0]
    assert parts == pool.run(run, 4, [*own, "run.name=parts", "train.steps=3"], ep=2)[0]
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    saved = newest(Path(parts))
    assert saved is not None
    assert all("lora_" in entry for entry in manifest.read_entries(saved))
    found = json.loads(pool.run(evaluate, 4, parts, ep=2)[0])
    at_end = next(row["eval/loss"] for row in reversed(rows_of(parts)) if "eval/loss" in row)
    assert found["eval/loss"] == pytest.approx(at_end, rel=1e-5)
    check_exports(parts, tmp_path / "base", tmp_path)


def test_a_preset_adapts_the_checkpoint_it_began_with(pool: Pool, tiny: list[str], tmp_path: Path) -> None:
    short = [*tiny, *STEADY]
    first = pool.run(run, 2, [*short, "run.name=first", "train.steps=2"], ep=2)[0]
    base, own = tmp_path / "base", [*short, *LORA, "run.name=lora", f"init_from={first}", "engine.max_rows=100"]
    assert cli.main(["export", first, "--out", str(base)]) == 0
    pool.run(run, 2, [*own, "train.steps=1"], ep=2)
    pool.run(run, 2, [*short, "run.name=first", "train.steps=3"], ep=2)  # a newer checkpoint, which is another model
    lora = pool.run(run, 1, [*own, "train.steps=2"])[0]
    assert config.load_resolved(Path(lora) / "config.yaml").init_from == f"{first}/checkpoints/step_2"
    check_exports(lora, base, tmp_path)
    said = " ".join(Path(lora, "log.txt").read_text().split())
    assert "LoRA: adapters of rank 4 beside 8 linear layers" in said


def compare_off(mesh: Mesh, overrides: list[str]) -> tuple[bool, bool, bool]:
    """Whether logits are those of the base: at first; after steps; and then without the adapters."""
    spec = resolve(config.load(overrides), mesh.world, 512, "fp32")
    engine = build_engine(build(spec), mesh, spec)
    engine.plan_with(default_costs())
    tokens = torch.from_numpy(RandomSamples().samples(mesh.rank, mesh.rank + 1).tokens)

    @torch.no_grad()
    def compute() -> Tensor:
        return engine.model(tokens)[0].clone()

    with adapters_off(engine.model):
        base = compute()
    same = [torch.equal(compute(), base)]
    for number in range(2):
        optimizer_step(engine, spec, list(micro_batches(spec, mesh, RandomSamples(), 8 * number)), LR)
    same.append(torch.equal(compute(), base))
    with adapters_off(engine.model):
        same.append(torch.equal(compute(), base))
    frozen = [p for p in engine.model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)
    assert len(engine.optimizer.state) == len(list(engine.model.parameters())) - len(frozen)
    return same[0], same[1], same[2]


def test_without_its_adapters_a_model_is_what_it_began_as_bit_by_bit(pool: Pool, tmp_path: Path) -> None:
    folders.make("gpt_oss", tmp_path, vocab_size=512)
    assert pool.run(compare_off, 2, options(tmp_path, *LORA), ep=2) == [(True, False, True)] * 2


def test_bad_input_is_one_line(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders.make("qwen3_moe", tmp_path / "base", vocab_size=512)
    of_folder = f"model=hf model.path={tmp_path / 'base'}"
    cases = {
        "lora.rank=-1": "lora.rank=-1: must be greater than or equal to 0",
        "lora.alpha=8": "lora.alpha=8.0: has an effect only with lora.rank above 0",
        "lora.rank=4 lora.targets=[]": "lora.targets=[]: must name something",
        "lora.rank=4 lora.targets=[q_proj,query]": "lora.targets=query: matches no linear layer or matrix of experts; "
        "there are q_proj, k_proj, v_proj, o_proj, experts.gate_up_proj, experts.down_proj",
        "lora.rank=4 lora.targets=[lm_head]": "lora.targets=lm_head: is a router or the output head",
        "lora.rank=4 lora.targets=[mlp.gate]": "lora.targets=mlp.gate: is a router or the output head",
        "lora.rank=4 balance.bias=sign": "balance.bias=sign: must be none with lora.rank > 0",
        "lora.rank=4 engine=deepspeed": "engine.name=deepspeed: must be native with lora.rank > 0",
        f"lora.rank=4 lora.targets=[w1] {of_folder}": "lora.targets=w1: matches no linear layer",
    }
    capsys.readouterr()
    for words, said in cases.items():
        assert cli.main(["train", *tiny, *words.split()]) == 2, words
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
    assert not list(tmp_path.glob("*/config.yaml"))
