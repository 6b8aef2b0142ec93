"""Kinds from outside the package: an installed package with entry points, and the decorators."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import moetrain
from moetrain.common.errors import ConfigError
from moetrain.common.registry import Options, Registry, option
from moetrain.moe.options import PLANNERS

ROOT = Path(__file__).parents[2]

ROUTING = """
from dataclasses import dataclass

import torch.nn.functional as F

from moetrain.common.registry import option
from moetrain.moe.options import NoisyOptions
from moetrain.moe.routing.topk import TopK


@dataclass(frozen=True, kw_only=True)
class CosineOptions(NoisyOptions):
    temperature: float = option(0.1, "what cosines are divided by", above=0)


class Cosine(TopK):
    Options = CosineOptions

    def logits(self, x_TD, carry, place):
        token_TD, expert_ED = (F.normalize(x.float(), dim=-1) for x in (x_TD, self.weight))
        return F.linear(token_TD, expert_ED) / self.options.temperature, carry
"""
PLANNING = """
from moetrain.moe.planning.plan import stay_home


def nowhere(counts, home_, costs=None, limits=None, state=None):
    return stay_home(counts, home_)
"""
WRITING = """
from dataclasses import dataclass

from moetrain.common.registry import Options, option


@dataclass(frozen=True, kw_only=True)
class CountingOptions(Options):
    documents: int = option(40, "Documents of the corpus.", at_least=2)


def counting(data, left_out):
    for number in range(data.documents):
        yield "numbers", " ".join(map(str, range(number, number + 60))), f"document {number}"


counting.Options = CountingOptions
"""
OPTIMIZING = """
from dataclasses import dataclass
from typing import ClassVar

import torch

import moetrain
from moetrain.common.registry import option


@dataclass(frozen=True, kw_only=True)
class MomentumOptions(moetrain.OptimizerOptions):
    state_names: ClassVar = ("momentum_buffer",)
    momentum: float = option(0.9, "Decay of the velocity per optimizer step.", at_least=0, below=1)


class Momentum(torch.optim.SGD):
    Options = MomentumOptions
"""
ENTRY_POINTS = """
[moetrain.routers]
cosine = their_kinds.routing:Cosine

[moetrain.planners]
nowhere = their_kinds.planning:nowhere

[moetrain.optimizers]
momentum = their_kinds.optimizing:Momentum

[moetrain.corpora]
counting = their_kinds.writing:counting
"""
USE = """
import torch
import moetrain
from moetrain.common.errors import ConfigError

assert {"cosine", "topk"} <= set(moetrain.ROUTERS)
assert "nowhere" in moetrain.PLANNERS
layer = moetrain.MoE(16, 16, 4, 2, router="cosine", router_options={"temperature": 0.5}, planner="nowhere")
assert layer.router.options.temperature == 0.5
layer(torch.randn(5, 16)).sum().backward()
assert layer.router.weight.grad.abs().sum() > 0
for options in ({"temperature": -1}, {"temperature": "hot"}, {"heat": 1}):
    try:
        moetrain.MoE(16, 16, 4, 2, router="cosine", router_options=options)
    except ConfigError as error:
        print(error)

from moetrain import config

made = config.load(["model=tiny", "router.name=cosine", "+router.temperature=0.25", "planner=home"])
assert made.router.temperature == 0.25
try:
    config.load(["model=tiny", "router.name=cosine", "+router.temperature=0"])
except ConfigError as error:
    print(error)

import tempfile
from pathlib import Path

from moetrain.data import files, spool

made = config.load(["data.source=counting", "data.documents=3"])
left_out = files.LeftOut()
(texts,) = spool.collect(made.data, Path(tempfile.mkdtemp()), left_out, lambda number: None).shards
print([texts.read(number).name for number in range(len(texts.rows))], left_out.found)
assert config.load(["optim.name=momentum", "optim.momentum=0.5"]).optim.momentum == 0.5
for overrides in (["optim.name=momentum", "optim.momentum=1"], ["optim.name=momentum", "optim.betas=[0.8,0.9]"]):
    try:
        config.load(overrides)
    except ConfigError as error:
        print(error)
for overrides in (["optim.name=momentum", "engine=deepspeed"], ["optim.name=adam"]):
    try:
        config.load(overrides)
    except ConfigError as error:
        print(error)
for overrides in (["data.source=counting", "data.documents=1"], ["data.source=count"], ["data.documents=3"]):
    try:
        config.load(overrides)
    except ConfigError as error:
        print(error)
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder for sys.path with a package of somebody else's, as pip installs it."""
    package, about = tmp_path / "their_kinds", tmp_path / "their_kinds-1.0.dist-info"
    package.mkdir()
    about.mkdir()
    (package / "__init__.py").write_text("")
    (package / "routing.py").write_text(ROUTING)
    (package / "planning.py").write_text(PLANNING)
    (package / "writing.py").write_text(WRITING)
    (package / "optimizing.py").write_text(OPTIMIZING)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-kinds\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


def run_python(code: str, *paths: Path) -> list[str]:
    path = ":".join(map(str, (ROOT, *paths)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_kinds_of_an_installed_package_are_known_and_checked(installed: Path) -> None:
    assert run_python(USE, installed) == [
        "router.temperature=-1.0: must be above 0",
        "router.temperature=hot: must be a number",
        "router.heat=1: the router cosine has no such option; it has top_k, scores, normalise, scaling, skew, "
        "capacity_factor, noise, temperature",
        "router.temperature=0: must be greater than 0",
        "['document 0', 'document 1', 'document 2'] {}",
        "optim.momentum=1: must be less than 1",
        "optim.betas=(0.8, 0.9): the optimizer momentum has no such option",
        "optim.name=momentum: must be adamw under engine=deepspeed",
        "optim.name=adam: known optimizers are adamw, momentum",
        "data.documents=1: must be greater than or equal to 2",
        "data.source=count: known corpora are local, debian, folder, chat, tokens, counting",
        "data.documents=3: no such field in this data preset",
    ]


def test_the_door_is_lazy() -> None:
    """Every name is there, and planning loads no torch."""
    code = """
import sys, numpy as np, moetrain
costs = moetrain.default_costs()
counts = np.array([[90, 10], [90, 10]])
plan = moetrain.PLANNERS["makespan"](counts, np.array([0, 1]), costs)
assert moetrain.layer_time(plan, counts, np.array([0, 1]), costs).total > 0
assert set(moetrain.__all__) <= set(dir(moetrain))
print("torch" in sys.modules)
for name in moetrain.__all__:
    getattr(moetrain, name)
try:
    moetrain.nothing
except AttributeError as error:
    print(error)
"""
    assert run_python(code) == ["False", "module 'moetrain' has no attribute 'nothing'"]
    assert (Path(moetrain.__file__).parent / "py.typed").is_file()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Few(Options):
    share: float = option(0.5, "of something", above=0, at_most=1)
    count: int | None = option(None, "of others", at_least=1)


def test_the_decorator_registers() -> None:
    try:

        @moetrain.register_planner("mine", options=Few)
        def plan_mine(counts: object, home: object, **options: object) -> None: ...

        assert PLANNERS["mine"] is plan_mine
        assert PLANNERS.make_options("mine", {"share": 1, "count": "3"}) == Few(share=1.0, count=3)
        with pytest.raises(ConfigError, match=r"planner.share=1.5: must be at most 1"):
            PLANNERS.make_options("mine", {"share": 1.5})
        with pytest.raises(ConfigError, match=r"there is a planner of that name already"):
            moetrain.register_planner("mine")(run_python)
    finally:
        del PLANNERS["mine"]
    with pytest.raises(
        ConfigError, match=r"planner.name=mine: known planners are home, llep, makespan, eplb, static, auto"
    ):
        PLANNERS["mine"]


@pytest.mark.parametrize("value", [True, "three", 2.5, float("nan")])
def test_a_value_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"count=.*: must be an integer"):
        Few(count=value)  # type: ignore[arg-type]


def test_groups_of_entry_points() -> None:
    groups = [Registry(sort, {}).group for sort in ("router", "planner", "optimizer", "corpus")]
    assert groups == ["moetrain.routers", "moetrain.planners", "moetrain.optimizers", "moetrain.corpora"]
