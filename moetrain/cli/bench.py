"""`moetrain bench WHAT`. Nothing of torch is loaded before the arguments are read."""

import argparse
import json
import re
from pathlib import Path

from moetrain.cli import arguments

HELP = """Measure one part by itself.

examples:
  moetrain bench plan                                       planning time and plan quality, all planners, many loads
  moetrain bench plan --json                                the same as one JSON list
  moetrain bench plan --trace runs/demo                     the recorded loads of a run through all planners
  moetrain bench layer --quick                              speed and memory of one layer, all routings and planners
  moetrain bench layer --help                               the whole grid, published shapes, many virtual ranks
  moetrain bench step --by-domain                           whole training steps: percent of perfect balance
  moetrain bench gpu                                        grouped GEMMs of published models on this device
  moetrain bench hosts                                      two hosts and a slow link: local rows and overlap
"""
PLAN = "Measure planning time and plan quality of all planners under many loads."
LAYER = """Measure speed and memory of one MoE layer, forward and backward, under many routings and planners.

Every figure is a ratio within this run: each repetition times the bare expert GEMMs, our layer under balanced routing
and the cell in question, one after another on all ranks.

examples:
  moetrain bench layer --quick                              four routings, five repeats, two workers
  moetrain bench layer --out results/layer                  the whole grid; writes layer.json, layer.md, layer.png
  moetrain bench layer --workload all --experts 16          W0_balanced to W7_burst, percent of force-balanced each
  moetrain bench layer --dtype bf16 --scenario '95 %*' --planner home makespan
  moetrain bench layer --virtual-ranks 8 --shape gpt-oss-120b --quick
                                                            8 ranks one after another on one device, links modelled
  moetrain bench layer --virtual-ranks 8 --shape deepseek-v3 --quick --kernels torch triton
                                                            plain torch and Triton: sums and SwiGLU, one after the other
"""
STEP = """Measure whole training steps of a model on its data: natural routing as a percentage of perfect balance.

Each repetition runs the same optimizer step, on the same micro-batches, under round-robin routing (the ideal) and under
the router's own choices with each planner, one after another in a turning order. The learning rate is zero by then:
nothing drifts. Percentages are medians of the ratios within a repetition.

examples:
  moetrain bench step                                       the default job after 30 steps of training
  moetrain bench step --by-domain                           every rank reads another domain
  moetrain bench step router.skew=2 --planners home,makespan
  moetrain bench step --workload W3_spread_hot_experts      routers choose by a workload, or by --trace runs/demo
  moetrain bench step --peers                               in turns with transformers' model of that shape under DDP
  moetrain bench step checkpoint.resume=runs/demo/checkpoints/step_260
"""
GPU = """Measure grouped GEMMs of published models' expert layers, as a share of this device's rate for large matrices.

The rows and experts of one of 8 ranks with 8,192 tokens each, perfectly balanced; forward, and forward and backward.
A repetition times the large product and the grouped ones one after another; shares are medians of their ratios.

examples:
  moetrain bench gpu --out results/gpu                      bf16, all shapes; writes gpu.json and gpu.md
  moetrain bench gpu --scale 16 --shape gpt-oss-120b        width, hidden width and tokens sixteen times smaller: a CPU
"""
HOSTS = """Measure one MoE layer on two hosts with a slow link: what local rows and overlapped transfers save.

The hosts are network namespaces of this machine, joined by a link of limited rate: Linux and root. A row of the table
is a way to run the layer, under one routing and at one rate: standard expert parallelism, the paper's planner, ours;
ours with the rows taken in the order of ranks instead of the nearest first; ours waiting for every transfer where it
starts; ours, and standard, with rows that travel inside their host first (`parallel.exchange=two_level`), and as auto
chooses; ours with rows that travel in 2, 4 or 8 chunks, or in as many as the measured costs say. Ways are timed in
turns and after a barrier; percentages are medians of the ratios of neighbours.

examples:
  moetrain bench hosts                                      two hosts, two workers each, 1 and 4 Gbit/s
  moetrain bench hosts --rate 200mbit --per-host 1
"""


def add_options(verb: argparse.ArgumentParser) -> None:
    """A parser for each WHAT. Only `step` has a configuration, hence overrides."""
    what = verb.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text, add in (
        ("plan", PLAN, _add_plan),
        ("layer", LAYER, _add_layer),
        ("step", STEP, _add_step),
        ("gpu", GPU, _add_gpu),
        ("hosts", HOSTS, _add_hosts),
    ):
        raw = argparse.RawDescriptionHelpFormatter
        parser = what.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=raw)
        add(parser)
        arguments.add_json(parser, "print one JSON list")


def execute(options: argparse.Namespace) -> int:
    if options.what == "plan":
        return _plan(options)
    if options.what == "step":
        return _step(options)
    if options.what == "layer":
        from moetrain.bench import layer

        return layer.run_benchmark(options)
    if options.what == "gpu":
        from moetrain.bench import gpu

        return gpu.run_benchmark(options)
    from moetrain.bench import hosts

    return hosts.run_benchmark(options)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write plan.json, plan.md and plan.png there")
    parser.add_argument(
        "--trace", metavar="RUN", help="use the recorded loads of a run in place of drawn ones; writes nothing"
    )


def _add_layer(parser: argparse.ArgumentParser) -> None:
    from moetrain.bench.cases import PRESETS
    from moetrain.bench.protocol import DTYPES, KERNELS, PLANNERS

    add, positive = parser.add_argument, arguments.positive
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES[:1], help="default: auto, the faster one on this device")
    add("--experts", nargs="+", type=positive, metavar="E", help="number of experts; default: 16 and 64")
    add("--planner", nargs="+", metavar="NAME", default=PLANNERS, help=f"default: {', '.join(PLANNERS)}")
    add("--scenario", nargs="+", metavar="PATTERN", help="routings by name, * matches anything; default: all")
    _add_workloads(parser)
    add("--tokens", type=positive, default=4096, help="tokens per rank; default: %(default)s")
    add("--dim", type=positive, help="model width; default: 512")
    add("--hidden", type=positive, help="hidden width of an expert; default: 1024")
    add("--top-k", type=positive, help="experts chosen per token; default: 2")
    add("--shape", choices=list(PRESETS), help="width, hidden width, experts and top-k of a published model")
    add("--kernels", nargs="+", choices=KERNELS, default=KERNELS[:1], help="of sums and SwiGLU; default: %(default)s")
    add("--repeats", type=positive, help="default: 15; with --quick 5; with --virtual-ranks 3")
    add("--warmup", type=positive, help="balanced layers run before timing; default: 40; with --virtual-ranks 5")
    add("--quick", action="store_true", help="four routings and five repeats")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--nproc", type=positive, metavar="N", help="workers on this machine; default: one per GPU, else two")
    add("--virtual-ranks", type=positive, metavar="R", help="run the parts of R ranks one after another on one device")
    add("--peers", action="store_true", help="also DeepSpeed's and Hugging Face's layers, where they are installed")
    add("--out", type=Path, metavar="FOLDER", help="write layer.json, layer.md and layer.png there")


def _add_step(parser: argparse.ArgumentParser) -> None:
    arguments.add_overrides(parser)
    add = parser.add_argument
    add("--planners", default="home,llep,makespan", metavar="NAME,NAME", help="default: %(default)s")
    add("--repeats", type=int, default=15, help="default: %(default)s")
    add("--warmup", type=int, default=30, help="training steps first; from a checkpoint at lr 0; default: %(default)s")
    _add_workloads(parser)
    add("--by-domain", action="store_true", help="measure with a different domain of the corpus on every rank")
    add("--peers", action="store_true", help="also transformers' Qwen3-MoE of the same shape under DDP")
    add("--out", type=Path, metavar="FOLDER", help="write step.json and step.md there")


def _add_workloads(parser: argparse.ArgumentParser) -> None:
    what = "W0_balanced to W7_burst, or all: selections by these public workloads, each beside its rows spread evenly"
    parser.add_argument("--workload", nargs="+", metavar="NAME", help=what)
    parser.add_argument("--trace", metavar="RUN", help="selections by the recorded loads of a run, likewise")


def _add_gpu(parser: argparse.ArgumentParser) -> None:
    from moetrain.bench.cases import PRESETS

    add, positive = parser.add_argument, arguments.positive
    add("--shape", nargs="+", choices=list(PRESETS), default=list(PRESETS), help="default: all")
    add("--scale", type=positive, help="divides widths and tokens; default: 1, without a GPU 16")
    add("--repeats", type=positive, default=15, help="default: %(default)s")
    add("--out", type=Path, metavar="FOLDER", help="write gpu.json and gpu.md there")


def _add_hosts(parser: argparse.ArgumentParser) -> None:
    from moetrain.bench.cases import HOST_EXPERTS, HOST_SCENARIOS, list_scenarios
    from moetrain.bench.protocol import DTYPES

    add, positive = parser.add_argument, arguments.positive
    default = ", ".join(HOST_SCENARIOS).replace("%", "%%")
    known, most = list_scenarios(HOST_EXPERTS), "workers on each host; default: %(default)s"
    add("--rate", nargs="+", type=_rate, default=["1gbit", "4gbit"], help="of the link; default: 1gbit and 4gbit")
    add("--scenario", nargs="+", choices=known, default=HOST_SCENARIOS, metavar="ROUTING", help=f"default: {default}")
    add("--per-host", type=positive, default=2, metavar="N", help=most)
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="default: %(default)s, the faster one on this device")
    add("--tokens", type=positive, default=1024, help="tokens per rank; default: %(default)s")
    add("--flow-splits", type=positive, default=1, metavar="N", help="connections of a transfer; default: %(default)s")
    add("--repeats", type=positive, default=15, help="default: %(default)s")
    add("--out", type=Path, metavar="FOLDER", help="write hosts.json and hosts.md there")
    add("--records", type=Path, help=argparse.SUPPRESS)  # for workers: where rank 0 writes what it measured


def _rate(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(kbit|mbit|gbit)", text):
        raise argparse.ArgumentTypeError("must be a number and kbit, mbit or gbit, such as 200mbit")
    return text


def _plan(options: argparse.Namespace) -> int:
    if options.trace:
        return _replay(options)
    from moetrain.bench import plan

    records = plan.measure_planners()
    if options.json:
        print(json.dumps(records))
    plan.tabulate(records).publish(options.out, plan.draw_plans)
    return 0


def _replay(options: argparse.Namespace) -> int:
    from moetrain import runs
    from moetrain.bench import replay

    run = runs.find(options.trace)
    records = replay.replay_trace(run)
    if options.json:
        print(json.dumps(records))
    replay.tabulate(records, run).publish(None)
    return 0


def _step(options: argparse.Namespace) -> int:
    from moetrain import checkpoint, config
    from moetrain.bench.protocol import StepOptions, check_peer
    from moetrain.cli.workers import run_with_workers

    settings = config.load(options.overrides)
    if StepOptions.from_arguments(options).peers:
        check_peer(settings)
    checkpoint.find_named(settings)
    return run_with_workers(options, settings, "bench")
