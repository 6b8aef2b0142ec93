"""The command line of `moetrain bench step`. No torch."""

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.common.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.config import Config

STEP = """Whole training steps of a model on its data, natural routing against perfect balance: percent of ideal.

Each repetition runs the same optimizer step, on the same micro-batches, under round-robin routing (the ideal) and under
the router's own choices with each planner, one after another in a turning order. The learning rate is zero by then:
nothing drifts. Percentages are medians of the ratios within a repetition.

examples:
  moetrain bench step                                       the default job after 30 steps of training
  moetrain bench step --by-domain                           every rank reads another domain
  moetrain bench step router.skew=2 --planners home,makespan
  moetrain bench step --peers                               in turns with transformers' model of that shape under DDP
  moetrain bench step checkpoint.resume=runs/demo/checkpoints/step_260
"""


def add_to(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("overrides", nargs="*", metavar="field=value", help="overrides of the configuration")
    add("--planners", default="home,llep,makespan", metavar="NAME,NAME", help="default: %(default)s")
    add("--repeats", type=int, default=15, help="default: %(default)s")
    add("--warmup", type=int, default=30, help="ordinary steps first; with a checkpoint at lr 0; default: %(default)s")
    add("--by-domain", action="store_true", help="measure with another domain of the corpus on every rank")
    add("--peers", action="store_true", help="also transformers' Qwen3-MoE of the same shape under DDP")
    add("--out", type=Path, metavar="FOLDER", help="write step.json and step.md")
    add("--json", action="store_true", help="one JSON list")


@dataclass(frozen=True)
class Options:
    planners: list[str]
    repeats: int
    warmup: int
    by_domain: bool = False
    peers: bool = False

    @classmethod
    def of(cls, given: argparse.Namespace) -> "Options":
        """Raises `ConfigError`."""
        from moetrain.moe.planning import PLANNERS

        planners = given.planners.split(",")
        for name in planners:
            if name not in PLANNERS:
                raise ConfigError(f"--planners {name}: must be among {', '.join(PLANNERS)}")
        if given.repeats < 1:
            raise ConfigError(f"--repeats {given.repeats}: must be at least 1")
        if given.warmup < 0:
            raise ConfigError(f"--warmup {given.warmup}: must be at least 0")
        return cls(planners, given.repeats, given.warmup, given.by_domain, given.peers)


PEER_HAS = {  # what Qwen3-MoE of transformers can be
    "model.qk_norm": "head",
    "model.num_shared_experts": 0,
    "model.num_zero_compute": 0,
    "model.chain": 1,
    "model.expert_schedule": "uniform",
    "router.name": "topk",
    "router.scores": "softmax",
    "router.scaling": 1.0,
    "router.skew": 0.0,
    "router.noise": 0.0,
    "router.groups": None,
    "router.capacity_factor": None,
    "router.k_schedule": "uniform",
    "data.attend_within_documents": False,
    "train.recompute": "none",
}


def check_peer(settings: "Config") -> None:
    """Raises `ConfigError` where transformers is missing or has no such model."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("--peers: needs transformers, which is not installed (pip install 'moetrain[dev]')")
    for field, value in PEER_HAS.items():
        section, name = field.split(".")
        if (given := getattr(getattr(settings, section), name)) != value:
            raise ConfigError(f"{field}={given}: must be {value} with --peers")
