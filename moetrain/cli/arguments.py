"""Arguments that several verbs share."""

import argparse


def add_overrides(verb: argparse.ArgumentParser) -> None:
    """`field=value ...`: the verb has a configuration. `takes_overrides` says so to whoever reads the rest."""
    verb.set_defaults(takes_overrides=True)
    verb.add_argument("overrides", nargs="*", metavar="field=value", help="override a field of the configuration")


def add_json(verb: argparse.ArgumentParser, what: str = "print the result as JSON") -> None:
    verb.add_argument("--json", action="store_true", help=what)


def add_config_dir(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--config-dir",
        metavar="FOLDER",
        help="a folder with your own YAML, which takes precedence over the shipped one",
    )


def add_run(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", nargs="?", help="the run's folder or name; default: the newest run")


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
