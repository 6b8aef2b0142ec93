"""`moetrain bench WHAT`: its options, and what each of them runs. No torch until it is known."""

import argparse
import json
from pathlib import Path

BENCH = """Measure a part by itself.

examples:
  moetrain bench plan                                       planning time and plan quality, every planner, many loads
  moetrain bench plan --json                                the same as one JSON list
  moetrain bench plan --trace runs/demo                     the recorded loads of a run through every planner
  moetrain bench layer --quick                              speed and memory of one layer, every routing and planner
  moetrain bench layer --help                               the whole grid, published shapes, many virtual ranks
  moetrain bench step --by-domain                           whole training steps: percent of perfect balance
  moetrain bench gpu                                        grouped GEMMs of published models on this device
  moetrain bench hosts                                      two hosts and a slow link: local rows and overlap
"""
PLAN = "Planning time and plan quality, every planner, many loads."


def add_to(verb: argparse.ArgumentParser) -> None:
    """The options of `bench WHAT`. Only `step` has a configuration, hence overrides."""
    from moetrain.bench import gpu_options, hosts_options, step_options
    from moetrain.bench import options as layer_options

    verb.set_defaults(overrides=[])
    what = verb.add_subparsers(dest="what", required=True, metavar="WHAT")
    plan = what.add_parser("plan", help=PLAN, description=PLAN)
    plan.add_argument("--json", action="store_true", help="machine-readable output")
    plan.add_argument("--out", metavar="FOLDER", help="write plan.json and plan.png there")
    plan.add_argument(
        "--trace", metavar="RUN", help="the recorded loads of a run in place of drawn ones; writes nothing"
    )
    for name, text, add_options in (
        ("layer", layer_options.LAYER, layer_options.add_to),
        ("step", step_options.STEP, step_options.add_to),
        ("gpu", gpu_options.GPU, gpu_options.add_to),
        ("hosts", hosts_options.HOSTS, hosts_options.add_to),
    ):
        raw = argparse.RawDescriptionHelpFormatter
        add_options(what.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=raw))


def run(options: argparse.Namespace) -> int:
    """All but `step`, whose workers have a configuration. Returns the exit code."""
    if options.what == "layer":
        from moetrain.bench import layer

        return layer.run(options)
    if options.what == "gpu":
        from moetrain.bench import gpu

        return gpu.run(options)
    if options.what == "hosts":
        from moetrain.bench import hosts

        return hosts.run(options)
    if options.trace:
        return _replay(options)
    from moetrain.bench import plan

    records = plan.records()
    if options.out:
        plan.write(records, Path(options.out))
    if options.json:
        print(json.dumps(records))
    else:
        plan.show(records)
    return 0


def _replay(options: argparse.Namespace) -> int:
    from moetrain import runs
    from moetrain.bench import replay

    run = runs.find(options.trace)
    records = replay.records(run)
    if options.json:
        print(json.dumps(records))
    else:
        replay.show(records, run)
    return 0
