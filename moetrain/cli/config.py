"""`moetrain config`."""

import argparse

from moetrain.cli import arguments

HELP = """Print the resolved configuration of a run.

examples:
  moetrain config model=tiny train.steps=50                 YAML, which `moetrain train --resolved FILE` reads
  moetrain config --keep run.name=big                       write it to the run's folder and print that folder's name
"""


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_overrides(verb)
    arguments.add_json(verb)
    verb.add_argument("--keep", action="store_true", help="write it to submitted.yaml in the run's folder")
    arguments.add_config_dir(verb)


def run(options: argparse.Namespace) -> int:
    from moetrain import config, runs

    settings = config.load(options.overrides, options.config_dir)
    if settings.parallel.nproc:
        settings.layout(settings.parallel.nproc)
    if options.keep:
        settings = runs.with_name(settings)
        runs.check_writable(settings)
        print(runs.keep_submitted(settings))
    elif options.json:
        print(settings.model_dump_json())
    else:
        print(config.dump(settings), end="")
    return 0
