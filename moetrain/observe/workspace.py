"""A ready wandb workspace for moetrain's metrics: `moetrain workspace ENTITY` saves it as a view of the project."""

from typing import Any, NamedTuple

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


def build(entity: str, project: str) -> Any:
    """The workspace, not yet saved, as wandb's package has it."""
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
