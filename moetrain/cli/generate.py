"""`moetrain generate`."""

import argparse

from moetrain.cli import arguments

HELP = """Generate text from a run's newest checkpoint.

example:
  moetrain generate runs/demo 'generate.prompt=def main(' generate.tokens=100
"""


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_run(verb)
    arguments.add_overrides(verb)
    arguments.add_json(verb)


def execute(options: argparse.Namespace) -> int:
    from moetrain.cli.saved_run import load_run
    from moetrain.cli.workers import run_with_workers

    return run_with_workers(options, load_run(options.run, options.overrides), "generate")
