"""`moetrain VERB [overrides]`: one function per verb, each thin; it imports what its verb needs."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moetrain import __version__
from moetrain.bench import command as bench
from moetrain.common.console import console, styled
from moetrain.common.errors import ConfigError
from moetrain.doctor import command as doctor
from moetrain.launch import worker
from moetrain.observe import workspace
from moetrain.report import options as report_options

if TYPE_CHECKING:
    from moetrain.config import Config
    from moetrain.distributed.mesh import Mesh

TRAIN = """Train a model.

examples:
  moetrain train                                            the default job: model=small on local text
  moetrain train model=tiny planner=home train.steps=50     any field of configs/config.yaml
  moetrain train router.skew=4 run.name=skewed              imbalance on purpose
  torchrun --nproc-per-node 2 -m moetrain train             workers started by torchrun
  moetrain train --dry-run parallel.nproc=64 train.global_batch=64 model=olmoe_1b7b
                                                            parameters and memory of a rank, in this process alone
  moetrain train -m planner=home,llep train.seed=0,1 run.name=sweep
                                                            four runs, below runs/sweep/ (docs/sweep.md)
"""
EVAL = """Held-out loss of a run's newest checkpoint, per domain.

example:
  moetrain eval runs/demo
"""
GENERATE = """Text from a run's newest checkpoint.

example:
  moetrain generate runs/demo 'generate.prompt=def main(' generate.tokens=100
"""
CONFIG = """Print the resolved configuration of a run.

examples:
  moetrain config model=tiny train.steps=50                 YAML, which `moetrain train --resolved FILE` takes
  moetrain config --keep run.name=big                       keep it in the run's folder, whose name is printed
"""
DATA = """Prepare a corpus: tokenizer, token files, held-out split. `train` does it by itself where it is missing.

examples:
  moetrain data                                             the text of this Python installation
  moetrain data data=folder data.path=books                 text files (folders are domains) or JSONL
"""
PROFILE = """Measure what the planner has to know of this machine, and keep it. `train` does so where it is missing.

examples:
  moetrain profile                                          for the default model
  moetrain profile model=olmoe_1b7b                         for the shape and dtype of another layer
"""
VERBS = {"train": TRAIN, "eval": EVAL, "generate": GENERATE, "data": DATA, "profile": PROFILE, "bench": bench.BENCH}
VERBS |= {"report": report_options.REPORT, "workspace": workspace.WORKSPACE}
VERBS |= {"config": CONFIG, "doctor": doctor.DOCTOR}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(worker.report_bad_input(ConfigError(f"{message}; `{self.prog} --help` says what there is")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a failure, 2 for bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(prog="moetrain", description="Expert-parallel training of MoE language models.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in ("eval", "generate"):
            verb.add_argument("run", nargs="?", help="a run's folder or name; the newest run if left out")
        if name == "bench":
            if given[:1] == ["bench"]:
                bench.add_to(verb)
            continue
        if name == "report":
            report_options.add_to(verb)
            continue
        if name == "workspace":
            workspace.add_to(verb)
            continue
        verb.add_argument("overrides", nargs="*", metavar="field=value", help="overrides of the configuration")
        verb.add_argument("--json", action="store_true", help="machine-readable output")
        if name == "doctor":
            doctor.add_to(verb)
        if name == "config":
            verb.add_argument("--keep", action="store_true", help="write it to submitted.yaml in the run's folder")
        if name == "train":
            verb.add_argument(
                "--resolved", metavar="FILE", help="a resolved configuration, instead of the shipped YAML"
            )
            verb.add_argument("--dry-run", action="store_true", help="only show parameters and memory per rank")
            verb.add_argument(
                "-m", "--multirun", action="store_true", help="a sweep: one run for each combination of values a,b,c"
            )
        if name in ("train", "data", "profile", "config", "doctor"):
            verb.add_argument("--config-dir", help="a folder of your own YAML, which wins over the shipped one")
    worker.die_with_launcher()
    worker.let_gpu_segments_grow()
    options, more = parser.parse_known_args(given)
    takes_overrides = options.verb not in ("bench", "report", "workspace") or getattr(options, "what", "") == "step"
    if unknown := [word for word in more if not takes_overrides or "=" not in word or word.startswith("-")]:
        if takes_overrides and unknown[0].startswith("--"):
            return worker.report_bad_input(_no_option(unknown[0], given))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides += more
    options.given = given
    console.quiet = options.json
    if (
        isinstance(getattr(options, "run", None), str) and "=" in options.run
    ):  # an override where the run could have stood
        options.overrides.insert(0, options.run)
        options.run = None
    try:
        functions = {
            "train": _train,
            "eval": _eval,
            "generate": _generate,
            "data": _data,
            "profile": _profile,
            "bench": _bench,
            "config": _config,
            "doctor": _doctor,
            "report": report_options.run,
            "workspace": workspace.run,
        }
        if options.overrides:
            from moetrain.config import unused

            unused.check_verb(options.verb, options.overrides)
        return functions[options.verb](options)
    except ConfigError as error:
        return worker.report_bad_input(error)


def _no_option(unknown: str, given: list[str]) -> ConfigError:
    """`unknown` is one of the arguments, `given`: perhaps a field, followed by a value."""
    from moetrain import config
    from moetrain.config import messages

    word, equals, value = unknown.partition("=")
    after = given[given.index(unknown) + 1 :][:1]
    if not equals and after and "=" not in after[0] and not after[0].startswith("-"):
        value = after[0]
    return messages.option(word, value or "VALUE", config.Config)


def _train(options: argparse.Namespace) -> int:
    from moetrain import config

    if options.multirun:
        from moetrain.cli import sweep

        if options.resolved or options.dry_run or options.json:
            raise ConfigError("--multirun: goes with none of --resolved, --dry-run and --json")
        return sweep.run(options.overrides, options.config_dir)
    if options.resolved:
        settings = config.load_resolved(Path(options.resolved), options.overrides)
    else:
        settings = config.load(options.overrides, options.config_dir)
    if options.dry_run:
        from moetrain.launch import local
        from moetrain.training import dry_run

        return dry_run.run(settings, settings.parallel.nproc or local.auto_nproc(), options.json)
    _check_run(settings)
    return _with_workers(options, settings, "train")


def _eval(options: argparse.Namespace) -> int:
    return _with_workers(options, _of_run(options), "eval")


def _generate(options: argparse.Namespace) -> int:
    return _with_workers(options, _of_run(options), "generate")


def _data(options: argparse.Namespace) -> int:
    from moetrain import config
    from moetrain.data import prepare

    settings = config.load(options.overrides, options.config_dir)
    known = prepare.current(settings.data)
    folder = known or prepare.ensure(settings.data)
    manifest = json.loads((folder / "manifest.json").read_text())
    if options.json:
        print(json.dumps({"folder": str(folder), "up_to_date": known is not None, **manifest}))
        return 0
    if known:
        console.print(prepare.up_to_date(known, settings.data))
    console.print(styled((str(folder), "bold"), (f": vocabulary {manifest['vocab_size']:,}", "")))
    for split, facts in manifest["splits"].items():
        shares = ", ".join(f"{name} {count:,}" for name, count in facts["tokens_per_domain"].items())
        console.print(f"{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens ({shares})")
    if known:
        console.print("\n".join(prepare.news(manifest, settings.data)))
    return 0


def _profile(options: argparse.Namespace) -> int:
    from moetrain import config

    return _with_workers(options, config.load(options.overrides, options.config_dir), "profile")


def _config(options: argparse.Namespace) -> int:
    from moetrain import config, runs

    settings = config.load(options.overrides, options.config_dir)
    if settings.parallel.nproc:
        settings.layout(settings.parallel.nproc)
    if options.keep:
        settings = runs.with_name(settings)
        runs.check_writable(settings)
        print(runs.keep_submitted(settings))
    elif options.json:
        print(settings.model_dump_json())
    else:
        print(config.dump(settings), end="")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from moetrain import config

    return doctor.run(config.load(options.overrides, options.config_dir), options)


def _bench(options: argparse.Namespace) -> int:
    return _bench_step(options) if options.what == "step" else bench.run(options)


def _bench_step(options: argparse.Namespace) -> int:
    from moetrain import checkpoint, config
    from moetrain.bench import step_options

    settings = config.load(options.overrides)
    if step_options.Options.of(options).peers:
        step_options.check_peer(settings)
    checkpoint.find_named(settings)
    return _with_workers(options, settings, "bench")


def _of_run(options: argparse.Namespace) -> "Config":
    from moetrain import checkpoint, config, runs

    folder = runs.find(options.run)
    saved = checkpoint.newest(folder)
    if saved is None:
        raise ConfigError(f"run={folder}: has no complete checkpoint")
    settings = config.load_resolved(folder / "config.yaml", options.overrides)
    checkpoint.check_fits(settings, saved, same_run=True)
    run = settings.run.model_copy(update={"dir": str(folder.parent), "name": folder.name})
    data = settings.data.model_copy(update={"on_change": "keep"})  # a run is judged on its own corpus
    return settings.model_copy(update={"run": run, "data": data})


def _check_run(settings: "Config") -> None:
    from moetrain import checkpoint, runs

    runs.check_writable(settings)
    checkpoint.find_to_resume(settings, runs.folder_of(settings) if settings.run.name else None)


def _with_workers(options: argparse.Namespace, settings: "Config", verb: str) -> int:
    """Be a worker where a launcher made us one; else start the workers, with the same arguments."""
    from moetrain import runs
    from moetrain.config import resize
    from moetrain.data.loader import open_data
    from moetrain.launch import local
    from moetrain.runs import lock
    from moetrain.training.ranks import run_on_rank

    place = local.from_env()
    workers = place[1] if place else settings.parallel.nproc or local.auto_nproc()
    if verb in ("train", "eval", "generate") and settings.run.name is not None:
        settings = resize.fitting(settings, workers, runs.heartbeats(runs.folder_of(settings)))
    settings.layout(workers)
    if verb != "profile":
        open_data(settings)
    with ExitStack() as held:
        if place is not None:
            if verb == "train" and settings.run.name is not None and worker.is_first_of_external_job():
                held.enter_context(lock.hold(runs.folder_of(settings)))
            layout = settings.layout(workers)
            return run_on_rank(
                lambda mesh: _do(options, settings, verb, mesh),
                place,
                ep=layout.ep,
                dp_replicate=layout.dp_replicate,
                threads=settings.train.threads,
                timeout=settings.recovery.timeout + 60,  # the heartbeat speaks first
            )
        arguments, again = list(options.given), None
        if verb == "train":
            if settings.run.name is None:
                settings = runs.with_name(settings)
                arguments.insert(1, f"run.name={settings.run.name}")
            folder = runs.folder_of(settings)
            held.enter_context(lock.hold(folder))
            again = local.RestartPolicy(settings.recovery.restarts, runs.heartbeats(folder))
        return local.launch(arguments, workers, again)


def _do(options: argparse.Namespace, settings: "Config", verb: str, mesh: "Mesh") -> None:
    from moetrain.training import tasks

    if verb == "bench":
        from moetrain.bench import step

        step.run(settings, mesh, options)
        return
    work = {
        "train": tasks.train_run,
        "eval": tasks.evaluate_run,
        "generate": tasks.generate_run,
        "profile": tasks.profile_run,
    }
    work[verb](settings, mesh, options.json)
