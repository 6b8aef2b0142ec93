"""Every figure of the page. `page/page.html` says what each is and how to read it."""

import re
from collections.abc import Callable
from pathlib import Path

from moetrain.observe.metrics import (
    BALANCE_LOSS,
    CROSSING_BYTES,
    GRAD_NORM,
    GUESTS,
    IMBALANCE_HOME,
    IMBALANCE_PLANNED,
    LAYER_DEAD_EXPERTS,
    LAYER_DOMAIN_MI,
    LAYER_ENTROPY,
    LAYER_GAMMA_EFF,
    LAYER_LOGIT_NORM,
    LAYER_MAX_VIO,
    LAYER_MAX_VIO_MICRO,
    LEND_BYTES,
    ROWS_CROSSING_FRACTION,
    ROWS_MOVED_FRACTION,
    TOKENS_PER_SECOND,
    Z_LOSS,
)
from moetrain.report.curves import (
    Figure,
    absent,
    held_out,
    held_out_per_layer,
    held_out_steps,
    lines,
    loss,
    memory,
    per_layer,
    rate,
    saved,
    time,
)
from moetrain.report.maps import devices, domains, load, specialists, traffic, waited
from moetrain.report.read import RunData

FIGURES: dict[str, Callable[[RunData], Figure]] = {
    "loss": loss,
    "held_out": held_out,
    "held_out_steps": held_out_steps,
    "gradient": lines({GRAD_NORM: ("grad norm", "main")}, floor=0),
    "rate": rate,
    "balance": lines({BALANCE_LOSS: ("balance loss", "main")}),
    "z_loss": lines({Z_LOSS: ("z-loss", "main")}, floor=0),
    "load": load,
    "max_vio": per_layer(LAYER_MAX_VIO, floor=0),
    "dead": per_layer(LAYER_DEAD_EXPERTS, smooth=False, floor=0),
    "entropy": per_layer(LAYER_ENTROPY, floor=0),
    "max_vio_micro": per_layer(LAYER_MAX_VIO_MICRO, floor=0),
    "logits": per_layer(LAYER_LOGIT_NORM, floor=0),
    "gamma": per_layer(LAYER_GAMMA_EFF),
    "devices": devices,
    "imbalance": lines(
        {IMBALANCE_HOME: ("at home", "home"), IMBALANCE_PLANNED: ("planned", "planned")},
        reference=1,
    ),
    "time": time,
    "speed": lines({TOKENS_PER_SECOND: ("tokens/s", "main")}, floor=0),
    "memory": memory,
    "waited": waited,
    "traffic": traffic,
    "moved": lines(
        {
            ROWS_MOVED_FRACTION: ("computed away from home", "planned"),
            ROWS_CROSSING_FRACTION: ("sent to another rank", "home"),
        },
        floor=0,
    ),
    "guests": lines({GUESTS: ("guests", "main")}, floor=0),
    "crossing": lines(
        {CROSSING_BYTES: ("rows", "home"), LEND_BYTES: ("expert weights", "planned")},
        floor=0,
    ),
    "saved": saved,
    "domains": domains,
    "specialists": specialists,
    "information": held_out_per_layer(LAYER_DOMAIN_MI, "no evaluation yet (eval.every)", floor=0),
}


def titles() -> dict[str, str]:
    """Return {figure: its title on the page}."""
    page = (Path(__file__).parent / "page" / "page.html").read_text()
    return dict(re.findall(r'data-figure="(\w+)">\s*<figcaption><b>([^<]+)</b>', page))


def figures(run: RunData) -> dict[str, Figure]:
    """Return all figures; one whose records have a form that no version wrote is absent with that reason."""
    found = {}
    for name, draw in FIGURES.items():
        try:
            found[name] = draw(run)
        except (ValueError, LookupError, TypeError) as error:
            found[name] = absent(f"its records cannot be read: {error}")
    return found
