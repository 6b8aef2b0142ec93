"""`moetrain export`: what transformers loads from it gives the logits of the run; what cannot be exported is named."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from moetrain import cli, config
from moetrain.distributed.mesh import Mesh
from moetrain.training import tasks
from tests.hf import folders
from tests.pool import Pool
from tests.training.test_train import run

TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(0))
SHAPES = {
    "qwen3": ["model.num_dense_layers=1", "model.num_layers=3", "model.tied_embeddings=false", "router.top_k=3"],
    "tied": ["router.normalise=false"],
    "olmoe": ["model.qk_norm=full", "model.norm_eps=1e-5", "router.top_k=1"],
}


def compute_logits(mesh: Mesh, folder: str) -> Tensor:
    settings = config.load_resolved(Path(folder) / "config.yaml", [])
    _, model, *_ = tasks.restore_run(settings, mesh)
    with torch.no_grad():
        logits: Tensor = model(TOKENS)[0]
    return logits


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_gives_the_logits_of_the_run(pool: Pool, tiny: list[str], tmp_path: Path, shape: str) -> None:
    more = ["train.steps=2", f"run.name={shape}", "optim.lr=0.01", "optim.warmup=0", *SHAPES[shape]]
    folder = pool.run(run, 2, [*tiny, *more], ep=2)[0]
    ours = pool.run(compute_logits, 1, folder)[0]
    out = tmp_path / "out"
    assert cli.main(["export", folder, "--out", str(out), "--shard-size", "200KB"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert type(model).__name__ == ("OlmoeForCausalLM" if shape == "olmoe" else "Qwen3MoeForCausalLM")
    with torch.no_grad():
        theirs = model(TOKENS).logits
    assert (theirs - ours).abs().max() <= 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.decode(tokenizer("alpha beta, one two").input_ids) == "alpha beta, one two"
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    model.save_pretrained(tmp_path / "again", max_shard_size="10MB")
    assert folders.load(out).keys() == folders.load(tmp_path / "again").keys()


@pytest.fixture(scope="module")
def trained(pool: Pool, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    shape = ["model=tiny", "train.dtype=fp32", "train.seq_len=32", "train.global_batch=4", "track.wandb=false"]
    more = [*shape, *data, f"run.dir={folder}", "run.name=x", "train.steps=2", "checkpoint.every=1", "eval.every=0"]
    return Path(pool.run(run, 1, more)[0])


def test_an_earlier_step_in_bf16(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(trained), "--out", str(tmp_path / "out"), "--step", "1", "--dtype", "bf16", "--json"]
    assert cli.main(arguments) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["checkpoint"].endswith("step_1")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16}


def test_into_a_store(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"file://{tmp_path}/store/out"
    before = sorted(trained.iterdir())
    assert cli.main(["export", str(trained), "--out", url, "--shard-size", "200KB"]) == 0
    assert sorted(trained.iterdir()) == before
    assert len(list((tmp_path / "store" / "out").glob("model-*.safetensors"))) > 1
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "store" / "out")
    capsys.readouterr()
    assert cli.main(["export", str(trained), "--out", url]) == 2
    _check_refused(capsys, "is there already")
    assert cli.main(["export", str(trained), "--out", "nosuch://x"]) == 2
    _check_refused(capsys, "--out=nosuch://x: Protocol not known: nosuch")


def edit_config(folder: Path, line: str, other: str) -> None:
    file = folder / "config.yaml"
    text = file.read_text()
    assert line in text
    file.write_text(text.replace(line, other, 1))


BAD = {
    "there": ([], "is there already"),
    "size": (["--shard-size", "5 parsecs"], "--shard-size=5 parsecs: must be a number and a unit"),
    "step": (["--step", "7"], "--step=7: .* has checkpoints of the steps 1, 2"),
    "nowhere": (["--out", "/proc/nobody/x"], "--out=/proc/nobody/x: cannot be written"),
    "no run": (["nobody"], "run=nobody: must be a run's folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    more, said = BAD[case]
    out = tmp_path / "out"
    if case == "there":
        out.mkdir()
    run_of = [] if case == "no run" else [str(trained)]
    assert cli.main(["export", *run_of, "--out", str(out), *more]) == 2
    _check_refused(capsys, said)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if case == "there" else [])


FEATURES = {
    "router.skew=": ("skew: 0.0", "skew: 1.0"),
    "model.chain=2": ("chain: 1", "chain: 2"),
    "model.zero_experts=1": ("zero_experts: 0", "zero_experts: 1"),
    "router.scores=sigmoid": ("scores: softmax", "scores: sigmoid"),
    "model.qk_norm=none": ("qk_norm: head", "qk_norm: none"),
}


@pytest.mark.parametrize("field", FEATURES)
def test_what_no_architecture_has_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    edit_config(tmp_path / "run", *FEATURES[field])
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    _check_refused(capsys, f"{field}.*: no architecture of transformers has it")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step_2" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 2
    _check_refused(capsys, "rank_00000.safetensors is damaged")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _check_refused(capsys: pytest.CaptureFixture[str], said: str) -> None:
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, line), line
