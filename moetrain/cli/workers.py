"""The workers of a verb: started here, or this process is one of them."""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.common.errors import ConfigError
from moetrain.launch import worker

if TYPE_CHECKING:
    from moetrain.config import Config
    from moetrain.distributed.mesh import Mesh


def run_with_workers(options: argparse.Namespace, settings: "Config", verb: str) -> int:
    """Be a worker where a launcher started this process as one; else start the workers, with the same arguments.

    Returns the exit code; raises `ConfigError` before any process group exists.
    """
    from moetrain import runs
    from moetrain.config import find_ep, name_run, resize
    from moetrain.data.opening import open_data
    from moetrain.data.replay import ReplayLoader
    from moetrain.launch import local
    from moetrain.runs import lock
    from moetrain.training.ranks import run_on_rank

    place = local.from_env()
    workers = place.world if place else settings.parallel.nproc or local.auto_nproc()
    _check_nproc(options, settings, verb, workers)
    if settings.train.experts_dtype == "fp8" and not local.may_have_gpus():
        raise ConfigError("train.experts_dtype=fp8: needs a Hopper GPU (compute capability 9.0); must be null here")
    if verb in ("train", "eval", "generate", "record") and settings.run.name is not None:
        settings = resize.fitting(settings, workers, runs.heartbeats(runs.folder_of(settings)))
    settings, chosen = _fix_layout(options, settings, verb, workers)
    ep = find_ep(settings, workers)
    if verb != "profile":
        loader = open_data(settings, replays=verb == "train")[1]
        if isinstance(loader, ReplayLoader):
            loader.check(settings.train.steps * settings.train.global_batch)
    with ExitStack() as held:
        if place is not None:
            if verb == "train" and settings.run.name is not None and worker.is_first_of_external_job():
                held.enter_context(lock.hold(runs.folder_of(settings)))
            return run_on_rank(
                lambda mesh: _do(options, settings, verb, mesh),
                place,
                ep=ep,
                dp_replicate=settings.parallel.dp_replicate,
                threads=settings.train.threads,
                timeout=settings.recovery.timeout + 60,  # the heartbeat speaks first
                backend=settings.parallel.backend,
                exchange=settings.parallel.exchange,
                flow_splits=settings.parallel.flow_splits,
            )
        arguments, again = [*options.given, *chosen], None
        if verb == "train":
            if settings.run.name is None:
                settings = name_run(settings, runs.make_name(settings))
                arguments.insert(1, f"run.name={settings.run.name}")
            folder = runs.folder_of(settings)
            held.enter_context(lock.hold(folder))
            again = local.RestartPolicy(settings.recovery.restarts, runs.heartbeats(folder))
        return local.launch(arguments, workers, again)


def _fix_layout(options: argparse.Namespace, settings: "Config", verb: str, workers: int) -> tuple["Config", list[str]]:
    """Return the configuration with the layout that `parallel.layout=auto` means, and the overrides that say so."""
    if settings.parallel.layout == "fixed" or verb not in ("train", "bench"):
        return settings, []
    from moetrain.common.console import console
    from moetrain.config import fields_of, vary
    from moetrain.launch import local
    from moetrain.training.layout import choose_layout

    given, place = set(fields_of(options.overrides)), local.from_env()
    chosen = choose_layout(settings, given, workers)
    if chosen.reason and (place is None or place.rank == 0):
        console.print(chosen.reason)
    return vary(settings, chosen.fields), [each for each in chosen.overrides() if each.partition("=")[0] not in given]


def _check_nproc(options: argparse.Namespace, settings: "Config", verb: str, workers: int) -> None:
    """Raises `ConfigError` where `parallel.nproc` asks for another number of workers than torchrun or Slurm started.

    A run's own configuration binds neither its evaluation nor, where ranks were lost, its next start.
    """
    from moetrain import config, runs

    asked = settings.parallel.nproc
    if verb in ("eval", "generate", "record") and "parallel.nproc" not in config.fields_of(options.overrides):
        return
    if asked in (None, workers):
        return
    if settings.run.name and len(list(runs.heartbeats(runs.folder_of(settings)).glob("rank_*"))) > workers:
        return
    raise ConfigError(f"parallel.nproc={asked}: must be {workers}, as many ranks as the launcher started, or left out")


def _do(options: argparse.Namespace, settings: "Config", verb: str, mesh: "Mesh") -> None:
    """What each worker does once all have joined."""
    from moetrain.training import tasks

    if verb == "bench":
        from moetrain.bench import step

        step.run_benchmark(settings, mesh, options)
        return
    if verb == "train":
        from moetrain.report.build import write_of

        tasks.train_run(settings, mesh, options.json, [write_of])
        return
    if verb == "eval" and options.selection is not None:
        tasks.answer_run(settings, mesh, options.json, options.selection)
        return
    if verb == "record":
        from moetrain.training.record import record_run

        record_run(settings, mesh, options.json, Path(options.out))
        return
    work = {
        "eval": tasks.evaluate_run,
        "generate": tasks.generate_run,
        "profile": tasks.profile_run,
    }
    work[verb](settings, mesh, options.json)
