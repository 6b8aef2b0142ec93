"""The command line of `moetrain bench step`. No torch."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from moetrain.mistakes import ConfigError

STEP = """Whole training steps of a model on its data, natural routing against perfect balance: percent of ideal.

Each repetition runs the same optimizer step, on the same micro-batches, under round-robin routing (the ideal) and under
the router's own choices with each planner, one after another in a turning order. The learning rate is zero by then:
nothing drifts. Percentages are medians of the ratios within a repetition.

examples:
  moetrain bench step                                       the default job after 30 steps of training
  moetrain bench step --by-domain                           every rank reads another domain
  moetrain bench step router.skew=2 --planners home,makespan
  moetrain bench step checkpoint.resume=runs/demo/checkpoints/step_260
"""


def add_to(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("overrides", nargs="*", metavar="field=value", help="overrides of the configuration")
    add("--planners", default="home,llep,makespan", metavar="NAME,NAME", help="default: %(default)s")
    add("--repeats", type=int, default=15, help="default: %(default)s")
    add("--warmup", type=int, default=30, help="ordinary steps first; with a checkpoint at lr 0; default: %(default)s")
    add("--by-domain", action="store_true", help="measure with another domain of the corpus on every rank")
    add("--out", type=Path, metavar="FOLDER", help="write step.json and step.md")
    add("--json", action="store_true", help="one JSON list")


@dataclass(frozen=True)
class Options:
    planners: list[str]
    repeats: int
    warmup: int
    by_domain: bool = False

    @classmethod
    def of(cls, given: argparse.Namespace) -> "Options":
        """Raises `ConfigError`."""
        from moetrain.moe.planners import PLANNERS

        planners = given.planners.split(",")
        for name in planners:
            if name not in PLANNERS:
                raise ConfigError(f"--planners {name}: must be among {', '.join(PLANNERS)}")
        if given.repeats < 1:
            raise ConfigError(f"--repeats {given.repeats}: must be at least 1")
        if given.warmup < 0:
            raise ConfigError(f"--warmup {given.warmup}: must be at least 0")
        return cls(planners, given.repeats, given.warmup, given.by_domain)
