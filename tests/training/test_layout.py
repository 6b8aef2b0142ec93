"""`parallel.layout=auto`: what is given or was chosen before stays, the rest is the simulator's choice."""

from pathlib import Path

import pytest
import yaml

from moetrain import config
from moetrain.config import ConfigError, fields_of
from moetrain.config.compose import config_dir
from moetrain.training.layout import OPEN, ChosenLayout, choose_layout

AUTO = ["model=tiny", "train.seq_len=64", "train.global_batch=8", "parallel.layout=auto", "parallel.cluster=h100"]


def choose(*more: str, world: int = 4) -> ChosenLayout:
    overrides = [*AUTO, *more]
    return choose_layout(config.load(overrides), set(fields_of(overrides)), world)


def test_what_is_given_stays() -> None:
    kept = choose("parallel.ep=2", "train.recompute=full")
    assert kept.fields["parallel.ep"] == 2
    assert kept.fields["train.recompute"] == "full"
    assert "the fastest of" in kept.reason
    assert "ep 2" in kept.reason
    everything = choose(*kept.overrides())
    assert everything == ChosenLayout(kept.fields, "")


def test_the_choice_is_the_fastest_that_the_trainer_can_run() -> None:
    chosen = choose()
    assert chosen == choose()  # every rank chooses by itself
    assert chosen.fields["train.micro_batch"] is None  # one micro-step, as without a choice
    assert config.find_ep(config.vary(config.load(AUTO), chosen.fields), 4) == chosen.fields["parallel.ep"]
    assert chosen.overrides()[-1] in ("engine.reshard_after_forward=false", "engine.reshard_after_forward=true")


def test_a_run_that_goes_on_keeps_its_layout(tmp_path: Path) -> None:
    place = [f"run.dir={tmp_path}", "run.name=first"]
    earlier = config.load([*AUTO, *place, "parallel.ep=1", "train.micro_batch=1", "train.recompute=selective"])
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.yaml").write_text(config.dump(earlier))
    found = choose(*place)
    assert found.fields == {**OPEN, "parallel.ep": 1, "train.micro_batch": 1, "train.recompute": "selective"}
    assert not found.reason
    assert choose(*place, "parallel.ep=2").fields["parallel.ep"] == 2
    assert choose(*place, "checkpoint.resume=none").reason
    wide = config.dump(config.load([*AUTO, *place, "parallel.ep=4"]))
    (tmp_path / "first" / "config.yaml").write_text(wide)
    fewer = choose(*place, world=2)  # too few for the layout of the earlier start
    assert fewer.reason
    assert fewer.fields["parallel.ep"] in (1, 2)


def test_what_cannot_be_chosen_is_refused(tmp_path: Path) -> None:
    small = yaml.safe_load((config_dir() / "cluster" / "h100.yaml").read_text())
    small["memory"] |= {"capacity": 1e6, "context": 0}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    with pytest.raises(ConfigError, match=r"no layout of 4 ranks fits on small: out of memory"):
        choose(f"parallel.cluster={tmp_path}/small.yaml")
    with pytest.raises(ConfigError, match=r"engine=deepspeed: must be native for parallel\.layout=auto"):
        choose("engine=deepspeed")
    with pytest.raises(ConfigError, match=r"cluster=nowhere: there is no such file"):
        choose("parallel.cluster=nowhere")
