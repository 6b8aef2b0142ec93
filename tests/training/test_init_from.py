"""`init_from`: a new run begins with the weights of another, and with nothing else of it."""

import shutil
from pathlib import Path

import pytest

from moetrain import cli, config
from moetrain.config import ConfigError
from tests.pool import Pool
from tests.training.test_train import losses, rows_of, run

SHORT = ["train.steps=3", "optim.lr=0.01", "optim.min_lr=0.01", "optim.warmup=0", "track.trace_every=0"]


@pytest.fixture
def first(pool: Pool, tiny: list[str]) -> Path:
    return Path(pool.run(run, 2, [*tiny, *SHORT, "run.name=first", "checkpoint.every=1"], ep=2)[0])


def test_a_new_run_begins_with_the_weights_alone(pool: Pool, tiny: list[str], first: Path) -> None:
    begun = losses(first)
    more = [*tiny, *SHORT, "run.name=second", f"init_from={first}"]
    second = Path(pool.run(run, 1, more)[0])
    assert [row["step"] for row in rows_of(second) if "train/loss" in row] == [1, 2, 3]
    assert losses(second)[0] < begun[0] - 0.3  # the same batch, with weights that have seen it
    assert config.load_resolved(second / "config.yaml").init_from == str(first)
    named = Path(pool.run(run, 2, [*tiny, *SHORT, "run.name=named", "init_from=first"], ep=2)[0])
    assert losses(named)[0] == pytest.approx(losses(second)[0], rel=1e-5)
    earlier = [*tiny, *SHORT, "run.name=earlier", f"init_from={first}/checkpoints/step_2"]
    assert losses(second)[0] < losses(pool.run(run, 1, earlier)[0])[0] < begun[0]
    shutil.rmtree(first)
    pool.run(run, 1, [*more, "train.steps=5"])  # the run goes on with what is its own
    assert [row["step"] for row in rows_of(second) if "train/loss" in row] == [1, 2, 3, 4, 5]
    said = " ".join((second / "log.txt").read_text().split())  # of broken lines
    assert "not read, the run goes on from step_3 of its own" in said


def test_bad_input_is_one_line(
    pool: Pool, tiny: list[str], first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = [*tiny, "run.name=new"]
    cases = {
        f"{tmp_path}/nobody": f"init_from={tmp_path}/nobody: must be a run's folder or name, or a folder step_N",
        "s3://me:open-sesame@host/x": "init_from=s3://***@host/x: must be a run's folder",
        "first model.dim=128": "model.dim=128: the checkpoint",
        f"first checkpoint.resume={first}/checkpoints/step_2": "init_from=first: must be null where checkpoint.resume",
    }
    for words, said in cases.items():
        choice, *more = words.split()
        assert cli.main(["train", *new, f"init_from={choice}", *more]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert said in line
    assert cli.main(["train", *tiny, "run.name=first", "train.steps=2"]) == 2
    assert f"run.name=NEW init_from={first}/checkpoints/step_3 begins a new run" in capsys.readouterr().err
    with pytest.raises(AssertionError, match="was trained with another tokenizer"):
        pool.run(run, 1, [*new, "data.vocab_size=290", "init_from=first"])
    for path in (first / "checkpoints").iterdir():
        file = path / "rank_00001.safetensors"
        file.write_bytes(file.read_bytes()[:-8] + b"\1" * 8)
    with pytest.raises(AssertionError, match=r"init_from=first: rank_00001\.safetensors is damaged"):
        pool.run(run, 1, [*new, "init_from=first"])
    assert not (tmp_path / "new").exists()


def test_what_is_given_is_checked_at_once(tiny: list[str]) -> None:
    with pytest.raises(ConfigError, match="init_from=x: must be null"):
        config.load([*tiny, "init_from=x", "checkpoint.resume=/y"])
