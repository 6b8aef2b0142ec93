"""The options of `moetrain bench hosts`."""

import argparse
import re
from pathlib import Path

from moetrain.bench.cases import BALANCED, scenarios
from moetrain.bench.options import DTYPES, positive

EXPERTS = 16
DEFAULT = [BALANCED, "50 % into 4", "80 % into 1", "domain skew"]

_HELP = f"default: {', '.join(DEFAULT)}".replace("%", "%%")
HOSTS = """One MoE layer on two hosts with a slow link between them: what keeping rows local and overlapping are worth.

The hosts are network namespaces of this machine, joined by a link of limited rate: Linux and root. A row of the table
is a way to run the layer, under one routing and at one rate: standard expert parallelism, the paper's planner, ours;
ours with the rows taken in the order of ranks instead of the nearest first; ours waiting for every transfer where it
starts. Ways are timed in turns and after a barrier; percentages are medians of the ratios of neighbours.

examples:
  moetrain bench hosts                                      two hosts, two workers each, 1 and 4 Gbit/s
  moetrain bench hosts --rate 200mbit --per-host 1
"""


def add_to(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--rate", nargs="+", type=_rate, default=["1gbit", "4gbit"], help="of the link; default: 1gbit and 4gbit")
    add("--scenario", nargs="+", choices=scenarios(EXPERTS), default=DEFAULT, metavar="ROUTING", help=_HELP)
    add("--per-host", type=positive, default=2, metavar="N", help="workers on each host; default: %(default)s")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="default: %(default)s, the faster one here")
    add("--tokens", type=positive, default=1024, help="of a rank; default: %(default)s")
    add("--repeats", type=positive, default=15, help="default: %(default)s")
    add("--out", type=Path, metavar="FOLDER", help="write hosts.json and hosts.md")
    add("--json", action="store_true", help="one JSON list")
    add("--records", type=Path, help=argparse.SUPPRESS)  # of a worker: where rank 0 leaves what it found


def _rate(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(kbit|mbit|gbit)", text):
        raise argparse.ArgumentTypeError("must be a number and kbit, mbit or gbit, such as 200mbit")
    return text
