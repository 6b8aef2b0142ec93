"""Import, then export: the tensors of the files again, bit by bit, and every other file of the folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from moetrain import cli
from moetrain.hf.folder import open_folder
from moetrain.hf.quantized import dequantise
from tests.hf import folders
from tests.pool import Pool
from tests.training.test_train import run

UNCHANGED = ["optim.lr=1e-300", "optim.min_lr=1e-300", "optim.warmup=0", "train.steps=1"]  # no weight moves


def make_mtp(path: Path) -> None:
    """DeepSeek-V3 in FP8 blocks, with a layer of multi-token prediction behind its two."""
    folders.make("deepseek_v3", path, vocab_size=512, num_nextn_predict_layers=1)
    mtp = {"model.layers.2.eh_proj.weight": torch.randn(64, 128), "model.layers.2.hnorm.weight": torch.randn(64)}
    folders.replace(path, folders.load(path) | mtp)
    folders.quantise_fp8(path, (128, 128))


def make_mxfp4(path: Path) -> None:
    folders.make("gpt_oss", path, intermediate_size=32, vocab_size=512)
    folders.quantise_mxfp4(path)


def make_bf16(path: Path) -> None:
    folders.make("minimax_m2", path, vocab_size=512)
    kept = "e_score_correction_bias"  # in fp32, as MiniMax has it
    files = folders.load(path)
    folders.replace(path, {key: value if kept in key else value.bfloat16() for key, value in files.items()})
    folders.edit_config(path, dtype="bfloat16")


KINDS: dict[str, Callable[[Path], object]] = {
    "a key an expert": lambda path: folders.make("qwen3_moe", path, vocab_size=512),
    "OLMoE": lambda path: folders.make("olmoe", path, vocab_size=512),
    "bf16 under other names": make_bf16,
    "interleaved, with biases": lambda path: folders.make("gpt_oss", path, vocab_size=512),
    "MXFP4": make_mxfp4,
    "FP8 blocks, prediction layer": make_mtp,
    "transposed": lambda path: folders.make("aria", path, vocab_size=512),
    "text model of one that sees": lambda path: folders.make_qwen3_5_moe(path, vocab_size=512),
    "tied": lambda path: folders.make("qwen3_moe", path, vocab_size=512, tie_word_embeddings=True),
}


def read_plain(path: Path) -> dict[str, Tensor]:
    """What the files stand for; quantised ones in bfloat16."""
    folder = open_folder(path)
    found = {key: lazy.read() for key, lazy in dequantise(folder).items()}
    return {
        k: v.bfloat16() if k not in folder.tensors or folder.tensors[k].dtype != v.dtype else v
        for k, v in found.items()
    }


def train(pool: Pool, tiny: list[str], source: Path, ranks: int = 2) -> str:
    more = ["model=hf", f"model.path={source}", "run.name=run", *UNCHANGED]
    folder: str = pool.run(run, ranks, [word for word in tiny if word != "model=tiny"] + more, ep=ranks)[0]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_is_the_import(pool: Pool, tiny: list[str], tmp_path: Path, kind: str) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    KINDS[kind](source)
    (source / "special_tokens_map.json").write_text("{}")
    expected = read_plain(source)
    assert cli.main(["export", train(pool, tiny, source), "--out", str(out), "--shard-size", "150KB"]) == 0
    found = folders.load(out)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key
    others = {path.name for path in source.iterdir() if ".safetensors" not in path.name}
    assert {path.name for path in out.iterdir() if ".safetensors" not in path.name} == others
    about = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in about
    is_plain = not json.loads((source / "config.json").read_text()).get("quantization_config")
    assert not is_plain or (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
    _model, told = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(told[name] for name in ("missing_keys", "mismatched_keys"))


def test_an_export_when_the_folder_is_gone(
    pool: Pool, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    make_bf16(source)
    expected, folder = read_plain(source), train(pool, tiny, source, 1)
    shutil.rmtree(source)
    assert cli.main(["export", folder, "--out", str(out)]) == 0
    found = folders.load(out)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    capsys.readouterr()
    assert cli.main(["export", folder, "--out", str(tmp_path / "wide"), "--dtype", "fp32", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == ["weights are written in float32"]
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"


def test_what_is_not_trained_must_be_there(
    pool: Pool, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    make_mtp(source)
    folder = train(pool, tiny, source, 1)
    shutil.rmtree(source)
    assert cli.main(["export", folder, "--out", str(tmp_path / "out")]) == 2
    assert f"model.path={source}: is gone, and with it model.layers.2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_folder_is_refused_before_there_are_workers(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    folders.make("qwen3_moe", source, vocab_size=512)
    file = sorted(source.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-9])
    own = [word for word in tiny if word != "model=tiny"]
    assert cli.main(["train", *own, "model=hf", f"model.path={source}", "run.name=run", "parallel.nproc=2"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert f"model.path={source}: {file.name} is damaged or cut" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda path: folders.make_qwen3_vl_moe(path, hidden=48),
            "qwen3_vl_moe sees or hears, and its text model cannot be loaded without the rest: lm_head.weight",
        ),
        (folders.make_llama4, "Llama4ForCausalLM is not covered: none of its modules carries"),
    ],
    ids=["qwen3_vl_moe", "llama4"],
)
def test_a_model_that_sees_is_refused_before_there_are_workers(
    make: Callable[[Path], object], said: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    make(source)
    own = [word for word in tiny if word != "model=tiny"]
    assert cli.main(["train", *own, "model=hf", f"model.path={source}", "run.name=run", "parallel.nproc=2"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert f"model.path={source}: {said}" in line
    assert not (tmp_path / "run").exists()


def test_what_is_not_trained_is_said_before_there_are_workers(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    folders.make_qwen3_5_moe(source, vocab_size=512)
    own = [word for word in tiny if word != "model=tiny"]
    wrong = ["parallel.nproc=3", "parallel.ep=3"]  # refused where workers would start: a batch of 8 on 3 ranks
    assert cli.main(["train", *own, "model=hf", f"model.path={source}", "run.name=run", *wrong]) == 2
    printed = capsys.readouterr()
    assert "error: train.global_batch=8: must be a multiple of 3 ranks" in printed.err
    assert "starting" not in printed.out
    assert f"21 tensors of {source} are not trained: model.visual.blocks.0" in printed.out
