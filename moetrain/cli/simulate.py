"""`moetrain simulate`."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from moetrain.cli import arguments
from moetrain.common.errors import ConfigError

HELP = """Predict step time, throughput and memory on a cluster that need not be here. Starts no workers.

examples:
  moetrain simulate model=qwen3_30b_a3b cluster=h100x64     natural routing, our planner, expert groups inside a node
  moetrain simulate model=hf model.path=deepseek-v3 cluster=gb200_nvl72x256 parallel.ep=64 --compare home,llep,makespan
  moetrain simulate model=hf model.path=FOLDER cluster=h100x64 routing=W2_hot_rank
  moetrain simulate model=olmoe_1b7b cluster=h100x8 routing=runs/demo
  moetrain simulate model=qwen3_30b_a3b cluster=h100x64 --sweep
                                                            the ten fastest layouts that fit, and what the others lack
  moetrain simulate model=qwen3_30b_a3b cluster=h100x64 cluster.network.multipath=hashed --out FOLDER
                                                            with a picture; any figure of a cluster is a field

besides the fields of the configuration: cluster, cluster.FIELD, routing (balanced, natural, W0_balanced ... W7_burst,
a run's folder), routing.concentration, routing.agreement, stack (moetrain, automodel, megatron), train.dtype=fp8,
parallel.tp, parallel.cp, parallel.pp, parallel.virtual, parallel.sharding (fsdp, zero1), model=hf with model.path,
parallel.layout (fixed, or auto: the fastest that --sweep finds).
"""


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_overrides(verb)
    verb.add_argument("--compare", metavar="NAME,NAME", help="planners side by side")
    verb.add_argument("--sweep", action="store_true", help="predict all sensible layouts and show the ten fastest")
    verb.add_argument("--formulas", action="store_true", help="with --sweep: pipeline and tensor parallelism, too")
    verb.add_argument("--samples", type=arguments.positive, default=8, help="layers drawn; default: %(default)s")
    verb.add_argument("--seed", type=int, default=0, help="of the routing that is drawn; default: %(default)s")
    verb.add_argument("--out", type=Path, metavar="FOLDER", help="write simulate.json and simulate.png there")
    arguments.add_json(verb)
    arguments.add_config_dir(verb)


def execute(options: argparse.Namespace) -> int:
    from moetrain.simulate import request, show, sweep
    from moetrain.simulate.predict import predict

    asked = request.read(options.overrides, options.config_dir)
    if asked.is_auto and not options.sweep:
        best, *_ = sweep.sweep(asked.job, asked.routing, asked.planner, options.seed, asked.natural, options.formulas)
        if not best:
            raise ConfigError(
                "parallel.layout=auto: no layout fits into the devices' memory; --sweep says what they lack"
            )
        asked = replace(asked, job=best[0].prediction.job)
    if options.sweep:
        if options.compare:
            raise ConfigError("--compare: cannot be combined with --sweep")
        found, left_out, _ = sweep.sweep(
            asked.job, asked.routing, asked.planner, options.seed, asked.natural, options.formulas
        )
        predictions = [candidate.prediction for candidate in found]
        if not options.json:
            show.print_sweep(found, left_out, asked.job)
    else:
        planners = [asked.planner]
        if options.compare:
            planners = [request.choose_planner(name, options.config_dir) for name in options.compare.split(",")]
        predictions = [
            predict(asked.job, asked.routing, planner, options.seed, options.samples, asked.natural)
            for planner in planners
        ]
        if not options.json:
            show.print_predictions(predictions)
    if options.json:
        print(json.dumps([prediction.record() for prediction in predictions]))
    if options.out is not None:
        show.write(predictions, options.out)
    return 0
