"""`moetrain workspace`."""

import argparse
import importlib.util
import json

from moetrain.cli import arguments
from moetrain.common.console import console
from moetrain.common.errors import ConfigError

HELP = """Save a ready-made workspace with moetrain's charts in a wandb project.

examples:
  moetrain workspace my-team                                a view of the project `moetrain`; needs an account
  moetrain workspace my-team --project moe --json           only print its definition
"""


def add_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("entity", help="the user or team that owns the project")
    verb.add_argument("--project", default="moetrain", help="default: %(default)s")
    arguments.add_json(verb, "only print the definition, without an account")


def execute(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError("workspace: needs the package wandb-workspaces: pip install 'moetrain[workspace]'")
    from moetrain.observe import workspace

    built = workspace.build(options.entity, options.project)
    if options.json:
        print(json.dumps(json.loads(built._to_model().spec.model_dump_json(by_alias=True))))
        return 0
    import wandb

    if not wandb.login(prompt=False):
        raise ConfigError("workspace: needs a wandb account: set WANDB_API_KEY, or run `wandb login`")
    console.print(built.save().url)
    return 0
