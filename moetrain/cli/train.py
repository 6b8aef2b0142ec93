"""`moetrain train`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.cli import arguments
from moetrain.common.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.config import Config

HELP = """Train a model.

examples:
  moetrain train                                            the default job: model=small on local text
  moetrain train model=tiny planner=home train.steps=50     override any field of configs/config.yaml
  moetrain train init_from=first run.name=second            a new run that begins with the weights of another
  moetrain train router.skew=4 run.name=skewed              make the load uneven on purpose
  torchrun --nproc-per-node 2 -m moetrain train             workers started by torchrun
  moetrain train --dry-run parallel.nproc=64 train.global_batch=64 model=olmoe_1b7b
                                                            parameters and memory per rank, in this process alone
  moetrain train -m planner=home,llep train.seed=0,1 run.name=sweep
                                                            a sweep of four runs, in runs/sweep/ (docs/sweep.md)
"""


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_overrides(verb)
    arguments.add_json(verb)
    verb.add_argument("--resolved", metavar="FILE", help="a resolved configuration to use in place of the shipped YAML")
    verb.add_argument("--dry-run", action="store_true", help="only show parameters and memory per rank")
    verb.add_argument(
        "-m", "--multirun", action="store_true", help="a sweep: one run for each combination of values a,b,c"
    )
    arguments.add_config_dir(verb)


def execute(options: argparse.Namespace) -> int:
    from moetrain import checkpoint, config, runs
    from moetrain.cli.workers import run_with_workers
    from moetrain.data import replay
    from moetrain.launch import local

    if options.multirun:
        from moetrain.cli import sweep

        if options.resolved or options.dry_run or options.json:
            raise ConfigError("--multirun: cannot be combined with --resolved, --dry-run or --json")
        return sweep.run_sweep(options.overrides, options.config_dir)
    if options.resolved:
        settings = config.load_resolved(Path(options.resolved), options.overrides)
    else:
        settings = config.load(options.overrides, options.config_dir)
    replay.check_file(settings)
    if options.dry_run:
        from moetrain.training import dry_run

        world = settings.parallel.nproc or local.auto_nproc()
        if settings.parallel.layout == "auto":
            settings = _choose_layout(settings, options.overrides, world, options.json)
        return dry_run.show_dry_run(settings, world, options.json)
    runs.check_writable(settings)
    checkpoint.check_stores(settings)
    if checkpoint.find_to_resume(settings, runs.folder_of(settings) if settings.run.name else None) is None:
        initial = checkpoint.find_initial(settings)
        if initial is None and local.from_env() is None:
            _check_folder(settings)
    if settings.lora.rank:
        _check_targets(settings)
    return run_with_workers(options, settings, "train")


def _choose_layout(settings: "Config", overrides: list[str], world: int, as_json: bool) -> "Config":
    """Return the configuration with the layout that `parallel.layout=auto` means, and say which one."""
    from moetrain.common.console import console
    from moetrain.config import fields_of, vary
    from moetrain.training.layout import choose_layout

    chosen = choose_layout(settings, set(fields_of(overrides)), world)
    if chosen.reason and not as_json:
        console.print(chosen.reason)
    return vary(settings, chosen.fields)


def _check_targets(settings: "Config") -> None:
    """Raise `ConfigError` before there are workers, where LoRA's targets are not in the model."""
    from moetrain.config import vary
    from moetrain.training.step import build

    build(vary(settings, {"model.vocab_size": settings.model.vocab_size or settings.data.vocab_size}))


def _check_folder(settings: "Config") -> None:
    """Say which weights of its folder a new run does not train, such as those of a vision tower.

    Raises `ConfigError` before there are workers, where it cannot begin with the weights of the folder.
    """
    from moetrain.common.console import console
    from moetrain.config import HuggingFace

    model = settings.model
    if isinstance(model, HuggingFace) and model.weights == "load":
        from moetrain.hf.initial import map_folder  # transformers takes seconds to load

        carried = map_folder(model.path, model.trust_remote_code).carried
        if carried:
            rest = "moetrain export writes them as they are"
            console.print(f"{len(carried)} tensors of {model.path} are not trained: {carried[0]}, ...; {rest}")
