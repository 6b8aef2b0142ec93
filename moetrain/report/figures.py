"""Every figure of the page. `page/page.html` says what each is and how to read it."""

from collections.abc import Callable

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
from moetrain.report.read import Run

FIGURES: dict[str, Callable[[Run], Figure]] = {
    "loss": loss,
    "held_out": held_out,
    "held_out_steps": held_out_steps,
    "gradient": lines({"train/grad_norm": ("gradient norm", "main")}, "train/grad_norm was not recorded", floor=0),
    "rate": rate,
    "balance": lines({"train/balance_loss": ("balance loss", "main")}, "train/balance_loss was not recorded"),
    "z_loss": lines({"train/z_loss": ("z-loss", "main")}, "train/z_loss was not recorded", floor=0),
    "load": load,
    "max_vio": per_layer("balance/LAYER/max_vio", "balance/layer_LL/max_vio was not recorded", floor=0),
    "dead": per_layer("balance/LAYER/dead_experts", "balance/layer_LL/dead_experts was not recorded", False, floor=0),
    "entropy": per_layer("balance/LAYER/entropy", "balance/layer_LL/entropy was not recorded", floor=0, share=True),
    "max_vio_micro": per_layer(
        "balance/LAYER/max_vio_micro", "balance/layer_LL/max_vio_micro was not recorded", floor=0
    ),
    "logits": per_layer("balance/LAYER/logit_norm", "balance/layer_LL/logit_norm was not recorded", floor=0),
    "gamma": per_layer("balance/LAYER/gamma_eff", "balance/layer_LL/gamma_eff was not recorded"),
    "devices": devices,
    "imbalance": lines(
        {"balance/imbalance_home": ("at home", "home"), "balance/imbalance_planned": ("planned", "planned")},
        "balance/imbalance_* was not recorded",
        reference=1,
    ),
    "time": time,
    "speed": lines(
        {"perf/tokens_per_second": ("tokens/s", "main")}, "perf/tokens_per_second was not recorded", floor=0
    ),
    "memory": memory,
    "waited": waited,
    "traffic": traffic,
    "moved": lines(
        {
            "balance/rows_moved_fraction": ("computed away from home", "planned"),
            "balance/rows_crossing_fraction": ("crossed a link", "home"),
        },
        "balance/rows_moved_fraction was not recorded",
        floor=0,
        share=True,
    ),
    "guests": lines({"balance/guests": ("guests", "main")}, "balance/guests was not recorded", floor=0),
    "crossing": lines(
        {"balance/crossing_bytes": ("rows", "home"), "balance/lend_bytes": ("expert weights", "planned")},
        "balance/crossing_bytes was not recorded",
        floor=0,
        unit="bytes a step",
    ),
    "saved": saved,
    "domains": domains,
    "specialists": specialists,
    "information": held_out_per_layer(
        "specialise/LAYER/domain_mi", "no held-out evaluation yet (eval.every)", floor=0, unit="bits"
    ),
}


def figures(run: Run) -> dict[str, Figure]:
    """All of them; one whose records have a form that no version wrote is absent with that reason."""
    found = {}
    for name, draw in FIGURES.items():
        try:
            found[name] = draw(run)
        except (ValueError, LookupError, TypeError) as error:
            found[name] = absent(f"its records cannot be read: {error}")
    return found
