"""`moetrain profile`."""

import argparse

from moetrain.cli import arguments

HELP = """Measure what the planner needs to know about this machine, and store it. `train` does it where it is missing.

examples:
  moetrain profile                                          for the default model
  moetrain profile model=olmoe_1b7b                         for the layer shape and dtype of another model
"""


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_overrides(verb)
    arguments.add_json(verb)
    arguments.add_config_dir(verb)


def execute(options: argparse.Namespace) -> int:
    from moetrain import config
    from moetrain.cli.workers import run_with_workers

    return run_with_workers(options, config.load(options.overrides, options.config_dir), "profile")
