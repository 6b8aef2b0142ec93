"""`moetrain verify`."""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from moetrain.cli import arguments
from moetrain.common.errors import ConfigError

HELP = """Prove that a layout trains a model exactly: one step beside the same step in one process, tensor by tensor.

The model has its own architecture, fewer layers and random weights. Compared are the loss, the gradient of every
parameter, the norm, the next weights and the experts' counts; without recompute, with it, and with two micro-steps,
while rows are moved between ranks. For model=hf the one process runs transformers' own code, and the choices of its
routers are pinned. Exit code 1 if anything differs.

examples:
  moetrain verify model=tiny parallel.nproc=4 parallel.ep=2
  moetrain verify model=hf model.path=DIR parallel.nproc=2  a folder with the config.json of a transformers model
  moetrain verify model=hf model.path=DIR parallel.nproc=4 parallel.ep=4 planner=makespan --layers 3 --json
  moetrain verify model=hf model.path=DIR --dtype bf16      as far from fp32 as bf16 in one process, no farther
  moetrain verify model=hf model.path=DIR --fault wrong-divisor
                                                            plant a fault, to see that it is found
"""
FAULTS = ("dropped-reduction", "wrong-divisor", "transposed-expert", "expert-missing-in-norm")


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_overrides(verb)
    arguments.add_json(verb)
    verb.add_argument("--layers", type=arguments.positive, default=2, metavar="N", help="layers to keep; default: 2")
    verb.add_argument("--fault", choices=FAULTS, help="plant a fault, for model=hf")
    verb.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the ranks, for model=hf; default: fp32"
    )
    verb.add_argument("--trust-remote-code", action="store_true", help="run code that the model's folder brings along")
    verb.add_argument("--found", metavar="FOLDER", help=argparse.SUPPRESS)  # for the workers that this starts


def execute(options: argparse.Namespace) -> int:
    from moetrain.launch import local

    words = dict(word.split("=", 1) for word in options.overrides if "=" in word)
    workers = _number(words, "parallel.nproc") or 2
    ep = _number(words, "parallel.ep") or workers
    if workers % ep:
        raise ConfigError(f"parallel.ep={ep}: must divide the {workers} ranks of parallel.nproc")
    is_hf = words.get("model") == "hf"
    if options.fault and not is_hf:
        raise ConfigError(f"--fault {options.fault}: is for model=hf")
    if options.dtype != "fp32" and not is_hf:
        raise ConfigError(f"--dtype {options.dtype}: is for model=hf; models of ours are compared in fp32")
    place = local.from_env()
    if place is not None and options.found is None:
        raise ConfigError("RANK: verify starts its own workers; run it without torchrun")

    from moetrain.verify import run as verify

    step = None
    if is_hf:
        trust, fault = options.trust_remote_code, options.fault
        step = verify.hf_step(options.overrides, options.layers, workers, trust, fault, options.dtype)
    if place is not None:
        from moetrain.training.ranks import run_on_rank

        folder = Path(options.found)
        return run_on_rank(
            lambda mesh: verify.run_rank(step, options.overrides, options.layers, mesh, folder), place, ep=ep
        )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moetrain-verify-") as name:
        verify.run_alone(step, options.overrides, options.layers, workers, Path(name))
        if code := local.launch([*options.given, "--found", name], workers):
            return code
        cases = verify.read_cases(Path(name))
    return _show(cases, options.json, time.perf_counter() - began, workers, ep)


def _show(cases: list[Any], as_json: bool, seconds: float, workers: int, ep: int) -> int:
    from moetrain.common.console import console
    from moetrain.verify.compare import LIMIT, render_table
    from moetrain.verify.preset import LIMIT as PRESET_LIMIT

    good = not any(case.bad for case in cases)
    if as_json:
        print(json.dumps({"good": good, "ranks": workers, "ep": ep, "cases": [case.to_json() for case in cases]}))
        return 0 if good else 1
    limit = PRESET_LIMIT if cases[0].flips is None else LIMIT
    console.print(render_table(cases, limit), highlight=False, soft_wrap=True, markup=False)
    compared = len(cases[0].differences)
    verdict = "equal to one process" if good else "NOT equal to one process"
    console.print(f"{workers} ranks, ep={ep}: {compared} tensors a case {verdict}; {seconds:.0f} s")
    return 0 if good else 1


def _number(words: dict[str, str], name: str) -> int | None:
    text = words.get(name)
    if text is not None and not (text.isdecimal() and int(text)):
        raise ConfigError(f"{name}={text}: must be a whole number above zero")
    return int(text) if text else None
