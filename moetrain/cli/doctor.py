"""`moetrain doctor`."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moetrain.cli import arguments
from moetrain.common.console import console, styled

if TYPE_CHECKING:
    from moetrain.config import Config
    from moetrain.doctor.host import Check

HELP = """Check that this host has what a run needs: one line per check, with what to do. Exit code 1 if one fails.

examples:
  moetrain doctor                                           this host, for the default model
  moetrain doctor model=olmoe_1b7b run.dir=/shared/runs     for another model and folder
  moetrain doctor --meet node-1:29400 --nodes 4             on four hosts at the same time: do they reach each other?
"""
SIGNS = {"good": ("good", "green"), "note": ("note", "yellow"), "bad": ("bad ", "bold red")}  # by a check's state


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_overrides(verb)
    arguments.add_json(verb)
    verb.add_argument("--meet", metavar="HOST:PORT", help="an address of the first host, as for torchrun's rendezvous")
    verb.add_argument("--nodes", type=int, default=2, metavar="N", help="number of hosts that meet; default: 2")
    verb.add_argument(
        "--patience", type=float, default=30, metavar="SECONDS", help="how long to wait for the others; default: 30"
    )
    arguments.add_config_dir(verb)


def execute(options: argparse.Namespace) -> int:
    from moetrain import config

    settings, found = config.load(options.overrides, options.config_dir), []
    for check in _examine(settings, options):
        found.append(check)
        if not options.json:
            advice = f"\n{'':17}{check.advice}" if check.advice else ""
            console.print(styled(SIGNS[check.state], (f"  {check.name:<11}{check.text}{advice}", "")))
    if options.json:
        print(json.dumps([check._asdict() for check in found]))
    return 1 if any(check.state == "bad" for check in found) else 0


def _examine(settings: "Config", options: argparse.Namespace) -> Iterator["Check"]:
    from moetrain.doctor import host, hosts

    yield from host.examine(settings)
    if options.meet:
        yield from hosts.meet(options.meet, options.nodes, options.patience)
