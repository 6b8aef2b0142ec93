"""`moetrain config`."""

import argparse
import json
import textwrap

from moetrain.cli import arguments
from moetrain.common.errors import ConfigError

HELP = """Print the resolved configuration of a run, or explain its fields.

examples:
  moetrain config model=tiny train.steps=50                 YAML, which `moetrain train --resolved FILE` reads
  moetrain config --keep run.name=big                       write it to the run's folder and print that folder's name
  moetrain config --explain router.top_k                    what a field means: type, default, use
  moetrain config --explain router                          all fields of a section; without a name, all fields
"""
EVERYTHING = ""  # of --explain without a name
WIDTH = 100  # columns of an explanation


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_overrides(verb)
    arguments.add_json(verb)
    verb.add_argument("--keep", action="store_true", help="write it to submitted.yaml in the run's folder")
    verb.add_argument(
        "--explain", nargs="?", const=EVERYTHING, metavar="FIELD", help="explain a field, a section, or all fields"
    )
    arguments.add_config_dir(verb)


def execute(options: argparse.Namespace) -> int:
    if options.explain is not None:
        if options.overrides or options.keep or options.config_dir:
            raise ConfigError("--explain: can only be combined with --json")
        return _explain(options.explain or None, options.json)
    from moetrain import config, runs

    settings = config.load(options.overrides, options.config_dir)
    if settings.parallel.nproc:
        config.find_ep(settings, settings.parallel.nproc)
    if options.keep:
        settings = config.name_run(settings, runs.make_name(settings))
        runs.check_writable(settings)
        print(runs.keep_submitted(settings))
    elif options.json:
        print(settings.model_dump_json())
    else:
        print(config.dump(settings), end="")
    return 0


def _explain(name: str | None, as_json: bool) -> int:
    from moetrain.config.explain import explain

    entries = explain(name)
    if as_json:
        print(json.dumps([entry._asdict() for entry in entries], ensure_ascii=False))
        return 0
    for entry in entries:
        default = f", default {entry.default}" if entry.default else ""
        print(f"{entry.field}: {entry.type}{default}")
        print(textwrap.fill(entry.meaning, WIDTH, initial_indent="  ", subsequent_indent="  "))
    return 0
