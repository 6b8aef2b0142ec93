"""A ready wandb workspace for moetrain's metrics: `moetrain workspace ENTITY` saves it as a view of the project."""

import re
from typing import Any, NamedTuple

from moetrain.observe.metrics import (
    BALANCE_LOSS,
    CROSSING_BYTES,
    DEAD_EXPERTS,
    DOMAIN,
    DOMAIN_BITS_PER_BYTE,
    DOMAIN_LOSS,
    EVAL_LOSS,
    GRAD_NORM,
    GUESTS,
    IMBALANCE_HOME,
    IMBALANCE_PLANNED,
    LAYER,
    LAYER_DEAD_EXPERTS_WINDOW,
    LAYER_DOMAIN_MI,
    LAYER_ENTROPY,
    LAYER_GAMMA_EFF,
    LAYER_LOAD_ENTROPY,
    LAYER_LOGIT_NORM,
    LAYER_MAX_VIO,
    LEND_BYTES,
    LM_LOSS,
    LOAD_IMAGE,
    LR,
    METRICS,
    MFU,
    PEAK_MEMORY_GIB,
    PHASE,
    RECORD_SECONDS,
    ROWS_CROSSING_FRACTION,
    ROWS_MOVED_FRACTION,
    SAVED_SECONDS,
    STARVING_EXPERTS,
    TIME,
    TOKENS_PER_SECOND,
    Z_LOSS,
)

NAME = "moetrain"


class Panel(NamedTuple):
    title: str
    metrics: list[str]
    regex: str | None = None  # of the metrics, where their number depends on the model or the corpus
    log: bool = False


def _panel(title: str, *names: str, log: bool = False) -> Panel:
    """A chart of registered metrics, with their unit in its title where they share one."""
    units = {METRICS[name].unit for name in names}
    unit = units.pop() if len(units) == 1 else ""
    title = f"{title} ({unit})" if unit else title
    varying = [name for name in names if LAYER in name or DOMAIN in name]
    if not varying:
        return Panel(title, [*names], log=log)
    (name,) = names  # one regular expression a chart is what wandb takes
    text = re.escape(name).replace(LAYER, r"layer_\w+").replace(DOMAIN, "[^/]+")
    return Panel(title, [], f"^{text}$", log)


SECTIONS: dict[str, list[Panel]] = {
    "At a glance": [
        _panel("training and validation loss", LM_LOSS, EVAL_LOSS),
        _panel("device imbalance, at home and planned", IMBALANCE_HOME, IMBALANCE_PLANNED),
        _panel("throughput", TOKENS_PER_SECOND),
        _panel("dead and starving experts", DEAD_EXPERTS, STARVING_EXPERTS),
        _panel("training loss by domain", DOMAIN_LOSS),
        _panel("validation loss by domain", DOMAIN_BITS_PER_BYTE),
    ],
    "Router": [
        _panel("MaxVio by layer", LAYER_MAX_VIO),
        _panel("router entropy by layer", LAYER_ENTROPY),
        _panel("load entropy by layer", LAYER_LOAD_ENTROPY),
        _panel("logit norm by layer", LAYER_LOGIT_NORM),
        _panel("dead experts by layer", LAYER_DEAD_EXPERTS_WINDOW),
        _panel("congestion coefficient by layer", LAYER_GAMMA_EFF),
        _panel("balance loss and z-loss", BALANCE_LOSS, Z_LOSS),
        _panel("mutual information of domain and expert by layer", LAYER_DOMAIN_MI),
    ],
    "What the plan does": [
        _panel("rows moved and rows crossing ranks", ROWS_MOVED_FRACTION, ROWS_CROSSING_FRACTION),
        _panel("guests", GUESTS),
        _panel("bytes sent in the forward pass", LEND_BYTES, CROSSING_BYTES, log=True),
        _panel("seconds saved and spent", SAVED_SECONDS, PHASE["lend"], PHASE["backward_lend"]),
    ],
    "Time and memory": [
        _panel("parts of a step", *TIME.values(), RECORD_SECONDS),
        _panel("MoE layers, forward", *(name for key, name in PHASE.items() if not key.startswith("backward_"))),
        _panel("MoE layers, backward", *(name for key, name in PHASE.items() if key.startswith("backward_"))),
        _panel("MFU", MFU),
        _panel("peak memory", PEAK_MEMORY_GIB),
        _panel("grad norm and learning rate", GRAD_NORM, LR, log=True),
    ],
}


def build(entity: str, project: str) -> Any:
    """Return the workspace, not yet saved, as wandb's package has it."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = []
    for number, (name, panels) in enumerate(SECTIONS.items()):
        drawn: list[Any] = [
            reports.LinePlot(title=p.title, x="step", y=p.metrics, metric_regex=p.regex, log_y=p.log or None)
            for p in panels
        ]
        if name == "Router":
            drawn.insert(0, reports.MediaBrowser(title="load: layers × experts", media_keys=[LOAD_IMAGE]))
        sections.append(workspaces.Section(name=name, panels=drawn, is_open=number == 0))
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections)
