"""A ready wandb workspace for moetrain's metrics: `moetrain workspace ENTITY` saves it as a view of the project."""

import argparse
import importlib.util
import json
from typing import Any, NamedTuple

from moetrain.common.console import console
from moetrain.common.errors import ConfigError

WORKSPACE = """Save a ready workspace with moetrain's charts in a wandb project.

examples:
  moetrain workspace my-team                                a view of the project `moetrain`; needs an account
  moetrain workspace my-team --project moe --json           only show its definition
"""
NAME = "moetrain"
PHASES = ("route", "plan", "lend", "dispatch", "experts", "combine")


class Panel(NamedTuple):
    title: str
    metrics: list[str]
    regex: str | None = None  # of the metrics, where their number depends on the model or the corpus
    log: bool = False


MEDIA = "experts/load"
SECTIONS: dict[str, list[Panel]] = {
    "At a glance": [
        Panel("loss (nats a token)", ["train/lm_loss", "eval/loss"]),
        Panel("device imbalance, home and planned", ["balance/imbalance_home", "balance/imbalance_planned"]),
        Panel("tokens a second", ["perf/tokens_per_second"]),
        Panel("dead and starving experts", ["balance/dead_experts", "balance/starving_experts"]),
        Panel("loss by domain", [], r"^train/[^/]+/loss$"),
        Panel("held-out bits a byte by domain", [], r"^eval/[^/]+/bits_per_byte$"),
    ],
    "Router": [
        Panel("largest violation by layer", [], r"^balance/layer_\w+/max_vio$"),
        Panel("entropy of a token's choice by layer", [], r"^balance/layer_\w+/entropy$"),
        Panel("entropy of the load by layer", [], r"^balance/layer_\w+/load_entropy$"),
        Panel("norm of the logits by layer", [], r"^balance/layer_\w+/logit_norm$"),
        Panel("dead experts by layer", [], r"^balance/layer_\w+/dead_experts_window$"),
        Panel("congestion coefficient by layer", [], r"^balance/layer_\w+/gamma_eff$"),
        Panel("balance and z-loss", ["train/balance_loss", "train/z_loss"]),
        Panel("domain information by layer (bits)", [], r"^specialise/layer_\w+/domain_mi$"),
    ],
    "What the plan does": [
        Panel("rows moved and crossing, share", ["balance/rows_moved_fraction", "balance/rows_crossing_fraction"]),
        Panel("guests", ["balance/guests"]),
        Panel("bytes in the forward", ["balance/lend_bytes", "balance/crossing_bytes"], log=True),
        Panel("seconds saved and spent", ["balance/saved_seconds", "perf/phase/lend", "perf/phase/backward_lend"]),
    ],
    "Time and memory": [
        Panel("the step", [f"perf/time/{name}" for name in ("data", "forward", "backward", "update", "record")]),
        Panel("MoE layers, forward", [f"perf/phase/{name}" for name in PHASES]),
        Panel("MoE layers, backward", [f"perf/phase/backward_{name}" for name in PHASES[2:]]),
        Panel("share of the matrix rate", ["perf/mfu"]),
        Panel("memory (GiB)", ["perf/peak_memory_gib"]),
        Panel("gradient norm and learning rate", ["train/grad_norm", "train/lr"], log=True),
    ],
}


def add_to(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(overrides=[])
    verb.add_argument("entity", help="the user or team that owns the project")
    verb.add_argument("--project", default="moetrain", help="default: %(default)s")
    verb.add_argument("--json", action="store_true", help="only show the definition, without an account")


def run(options: argparse.Namespace) -> int:
    """Raises `ConfigError` where the package or the account is missing."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError("workspace: needs `pip install moetrain[workspace]`")
    if options.json:
        spec = _build(options.entity, options.project)._to_model().spec
        print(json.dumps(json.loads(spec.model_dump_json(by_alias=True))))
        return 0
    import wandb

    if not wandb.login(prompt=False):
        raise ConfigError("workspace: needs a wandb account: set WANDB_API_KEY, or run `wandb login`")
    console.print(_build(options.entity, options.project).save().url)
    return 0


def _build(entity: str, project: str) -> Any:
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = []
    for number, (name, panels) in enumerate(SECTIONS.items()):
        drawn: list[Any] = [
            reports.LinePlot(title=p.title, x="step", y=p.metrics, metric_regex=p.regex, log_y=p.log or None)
            for p in panels
        ]
        if name == "Router":
            drawn.insert(0, reports.MediaBrowser(title="load: layers × experts", media_keys=[MEDIA]))
        sections.append(workspaces.Section(name=name, panels=drawn, is_open=number == 0))
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections)
