"""`moetrain verify` finds what it is there to find, and nothing else."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import Mesh
from moetrain.verify import huggingface, preset
from moetrain.verify.compare import Case, compare, render_table
from moetrain.verify.huggingface import FAULTS, VerifyStep
from moetrain.verify.run import HF_CASES, hf_step
from tests.hf.families import config_of
from tests.pool import Pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config_of("gpt_oss").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def step(folder: Path) -> VerifyStep:
    return VerifyStep(str(folder), layers=2, sequences=8, planner=huggingface.FORCED, cases=HF_CASES)


@pytest.fixture(scope="module")
def alone(step: VerifyStep) -> dict[str, Any]:
    return huggingface.run_alone(step)


def find_cases(mesh: Mesh, step: VerifyStep, alone: dict[str, Any]) -> list[Case]:
    return huggingface.run_spread(step, mesh, alone)


def test_a_right_layout_is_equal(pool: Pool, step: VerifyStep, alone: dict[str, Any]) -> None:
    for case in pool.run(find_cases, 4, step, alone, ep=2)[0]:
        assert case.bad == []
        assert case.guests > 0
        assert case.flips == 0
        assert len(case.differences) == len(alone["result"]) > 70


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(pool: Pool, step: VerifyStep, alone: dict[str, Any], fault: str) -> None:
    broken = replace(step, fault=fault, cases=((False, 1),))
    (case,) = pool.run(find_cases, 4, broken, alone, ep=2)[0]
    found = {each.name.split()[0] for each in case.bad}
    expected = {
        "dropped-reduction": {"gradient", "norm", "next"},
        "wrong-divisor": {"loss", "gradient", "norm", "next"},
        "transposed-expert": {"loss", "gradient", "norm", "next"},
        "expert-missing-in-norm": {"norm"},
    }
    assert found == expected[fault]
    assert "DIFFERS" in render_table([case], 1e-5)


@pytest.mark.parametrize("fault", [None, "dropped-reduction", "wrong-divisor", "transposed-expert"])
def test_bf16_is_as_far_from_fp32_as_in_one_process(pool: Pool, step: VerifyStep, fault: str | None) -> None:
    rounded = replace(step, dtype="bf16", fault=fault, cases=((True, 2),))
    alone = huggingface.run_alone(rounded)
    (case,) = pool.run(find_cases, 4, rounded, alone, ep=2)[0]
    found = {each.name.split()[0] for each in case.bad}
    assert ("gradient" in found) if fault else (case.bad == [])
    assert case.worst("gradient") > 1e-3  # type: ignore[operator]
    assert "of one process in bf16" in render_table([case], 1e-5)


def run_preset(mesh: Mesh, overrides: list[str], sequences: int) -> Any:
    return preset.run_step(preset.settle_alone(overrides, 2, sequences), mesh)[0]


def find_preset_cases(mesh: Mesh, overrides: list[str], alone: Any) -> list[Case]:
    return preset.run_cases(overrides, 2, 8, mesh, alone)


@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_a_preset_is_equal(pool: Pool, engine: str) -> None:
    overrides = ["model=tiny", "parallel.ep=2", f"engine={engine}"]
    alone = pool.run(run_preset, 1, overrides, 8)[0]
    for case in pool.run(find_preset_cases, 4, overrides, alone, ep=2)[0]:
        assert case.bad == []
    assert any(name.startswith("gradient of") for name in alone)


def test_what_is_missing_or_not_a_number_differs() -> None:
    expected = {"loss": torch.tensor(1.0), "norm": torch.tensor(2.0), "counts of a": torch.tensor([3, 1])}
    found = {"loss": torch.tensor(float("nan")), "counts of a": torch.tensor([2, 2])}
    assert [each.is_good for each in compare(found, expected)] == [False, False, False]
    assert all(each.is_good for each in compare(expected, expected))


def test_bad_input_is_one_line(tmp_path: Path, step: VerifyStep) -> None:
    def refuse(**fields: Any) -> str:
        with pytest.raises(ConfigError) as error:
            huggingface.build_model(replace(step, **fields))
        return str(error.value)

    assert refuse(folder=str(tmp_path)).endswith("has no config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}))
    assert "has code of its own (auto_map); --trust-remote-code runs it" in refuse(folder=str(tmp_path))
    dense = {"model_type": "llama", "hidden_size": 16, "vocab_size": 32, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    assert "is not covered" in refuse(folder=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(dense | {"num_attention_heads": 32}))
    assert "The hidden size (16) is not a multiple" in refuse(folder=str(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.path: model=hf needs the folder"):
        hf_step(["model=hf"], 2, 2, False, None)
    with pytest.raises(ConfigError, match=r"train\.seed: `moetrain verify model=hf` takes"):
        hf_step(["model=hf", "model.path=x", "train.seed=1"], 2, 2, False, None)


def test_the_command_says_so_by_its_exit_code(folder: Path) -> None:
    command = [sys.executable, "-m", "moetrain", "verify", "model=hf", f"model.path={folder}", "--json"]
    done = subprocess.run([*command, "--fault", "wrong-divisor"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["good"]
    assert found["cases"][0]["worst"]["loss"] > 0.5
