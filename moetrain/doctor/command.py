"""`moetrain doctor`: a line each."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moetrain.common.console import console, styled
from moetrain.doctor.finding import BAD, GOOD, NOTE, Finding

if TYPE_CHECKING:
    from moetrain.config import Config

DOCTOR = """What a run needs: is it here? One line each, with what to do. Exit code 1 where something is missing.

examples:
  moetrain doctor                                           this host, for the default model
  moetrain doctor model=olmoe_1b7b run.dir=/shared/runs     for another model and folder
  moetrain doctor --meet node-1:29400 --nodes 4             on four hosts at the same time: do they reach each other?
"""
SIGNS = {GOOD: ("good", "green"), NOTE: ("note", "yellow"), BAD: ("bad ", "bold red")}


def add_to(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--meet", metavar="HOST:PORT", help="an address of the first host, as for torchrun's rendezvous")
    verb.add_argument("--nodes", type=int, default=2, metavar="N", help="hosts that meet (2)")
    verb.add_argument("--patience", type=float, default=30, metavar="SECONDS", help="for hosts to come (30)")


def run(config: "Config", options: argparse.Namespace) -> int:
    """Returns the exit code."""
    found = []
    for finding in _all(config, options):
        found.append(finding)
        if not options.json:
            advice = f"\n{'':17}{finding.advice}" if finding.advice else ""
            console.print(styled(SIGNS[finding.state], (f"  {finding.name:<11}{finding.text}{advice}", "")))
    if options.json:
        print(json.dumps([finding._asdict() for finding in found]))
    return 1 if any(finding.state == BAD for finding in found) else 0


def _all(config: "Config", options: argparse.Namespace) -> Iterator[Finding]:
    from moetrain.doctor import host, hosts

    yield from host.examine(config)
    if options.meet:
        yield from hosts.meet(options.meet, options.nodes, options.patience)
