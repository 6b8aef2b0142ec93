"""`moetrain VERB ...`: puts the verbs' parsers together, reads the command line and calls the verb.

One module per verb: `HELP` is its text, whose first line stands in the list of verbs, `add_options` makes its parser,
`execute` does the work. A verb imports there what it needs, so that `moetrain --help` and mistakes are shown at once.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

from moetrain import __version__
from moetrain.cli import (
    bench,
    data,
    doctor,
    evaluate,
    export,
    generate,
    profile,
    record,
    report,
    simulate,
    train,
    verify,
    workspace,
)
from moetrain.cli import config as config_verb
from moetrain.common.console import console
from moetrain.common.errors import ConfigError
from moetrain.launch import worker


class Verb(Protocol):
    """What the module of a verb has."""

    HELP: str

    def add_options(self, verb: argparse.ArgumentParser) -> None: ...

    def execute(self, options: argparse.Namespace) -> int:
        """Returns the exit code; raises `ConfigError` for bad input."""
        ...


VERBS: dict[str, Verb] = {
    "train": train,
    "eval": evaluate,
    "generate": generate,
    "record": record,
    "export": export,
    "data": data,
    "profile": profile,
    "simulate": simulate,
    "bench": bench,
    "report": report,
    "workspace": workspace,
    "config": config_verb,
    "verify": verify,
    "doctor": doctor,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if found := re.search(r"VERB: invalid choice: '([^']*)'", message):
            close = difflib.get_close_matches(found[1], VERBS, n=1)
            message = f"{found[1]}: no such command" + (f"; did you mean {close[0]}?" if close else "")
        self.exit(worker.report_bad_input(ConfigError(f"{message}; `{self.prog} --help` shows what it takes")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a failure, 2 for bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    worker.die_with_launcher()
    worker.let_gpu_segments_grow()
    try:
        options = _parse(given)
        console.quiet = options.json
        if options.overrides:
            from moetrain.config import unused

            unused.check_verb(options.verb, options.overrides)
        return VERBS[options.verb].execute(options)
    except ConfigError as error:
        return worker.report_bad_input(error)


def _parse(given: list[str]) -> argparse.Namespace:
    """The options of the verb; `overrides` and `given`, all arguments. Raises `ConfigError`, or exits with code 2."""
    parser = _parser_for(next((word for word in given if word in VERBS), None))
    options, more = parser.parse_known_args(given)
    takes_overrides = getattr(options, "takes_overrides", False)
    if unknown := [word for word in more if not takes_overrides or "=" not in word or word.startswith("-")]:
        if takes_overrides and unknown[0].startswith("--"):
            raise _unknown_option(unknown[0], given)
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.overrides = [*getattr(options, "overrides", []), *more]
    options.given = given
    run = getattr(options, "run", None)
    if isinstance(run, str) and "=" in run:  # an override where the run could have stood
        options.overrides.insert(0, run)
        options.run = None
    return options


def _parser_for(chosen: str | None) -> argparse.ArgumentParser:
    """Lists all verbs, and has the options of the `chosen` one."""
    parser = _Parser(prog="moetrain", description="Expert-parallel training of Mixture-of-Experts language models.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    raw = argparse.RawDescriptionHelpFormatter
    for name, module in VERBS.items():
        verb = verbs.add_parser(name, help=module.HELP.splitlines()[0], description=module.HELP, formatter_class=raw)
        if name == chosen:
            module.add_options(verb)
    return parser


def _unknown_option(unknown: str, given: list[str]) -> ConfigError:
    """`unknown` is one of the arguments, `given`: perhaps a field, followed by a value."""
    from moetrain.config import messages

    word, equals, value = unknown.partition("=")
    after = given[given.index(unknown) + 1 :][:1]
    if not equals and after and "=" not in after[0] and not after[0].startswith("-"):
        value = after[0]
    return messages.unknown_option(word, value or "VALUE")
