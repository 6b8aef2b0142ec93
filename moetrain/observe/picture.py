"""A run in one picture: loss per domain, imbalance over time, the devices' load before and after planning."""

import json
from pathlib import Path

import numpy as np

from moetrain.moe.planners import default_home
from moetrain.observe import trace


def draw(folder: Path) -> Path:
    """Write `run.png` into a run's folder, from its metrics and load trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/lm_loss" in row]
    steps = [row["step"] for row in rows]
    figure, (loss, balance, device) = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=[5, 4, 3])

    domains = sorted({k.split("/")[1] for row in rows for k in row if k.startswith("train/") and k.endswith("/loss")})
    for name in domains:
        loss.plot(steps, _smooth([row.get(f"train/{name}/loss", np.nan) for row in rows]), label=name, lw=1.5)
    loss.plot(steps, _smooth([row["train/lm_loss"] for row in rows]), label="all", color="black", lw=2)
    loss.set(title="Training loss per domain (nats a token)", xlabel="step")
    loss.legend(frameon=False)

    for key, label, color in (("home", "at home", "tab:red"), ("planned", "planned", "tab:green")):
        balance.plot(steps, [row[f"balance/imbalance_{key}"] for row in rows], label=label, color=color, lw=1.2)
    balance.axhline(1, color="gray", lw=0.8, ls=":")
    balance.set(title="Device imbalance (max / mean load)", xlabel="step")
    balance.legend(frameon=False)

    loads = _worst_layer(folder)
    if loads is not None:
        home, planned, layer = loads
        place = np.arange(len(home))
        device.bar(place - 0.2, home, 0.4, label="at home", color="tab:red")
        device.bar(place + 0.2, planned, 0.4, label="planned", color="tab:green")
        device.axhline(1, color="gray", lw=0.8, ls=":")
        device.set(title=f"Load of each device, layer {layer}", xlabel="device", ylabel="of the mean load")
        device.set_xticks(place)
        device.legend(frameon=False, loc="lower right")
    for axis in (loss, balance, device):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path = folder / "run.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _worst_layer(folder: Path) -> tuple[np.ndarray, np.ndarray, int] | None:
    """[R] load at home and planned, in mean loads, at the sample and layer that was most lopsided; its layer."""
    found = trace.read(folder)
    if not len(found["step"]):
        return None
    counts, planned = found["counts"], found["planned"]
    owner = default_home(counts.shape[-1], counts.shape[-2])
    home = np.stack([counts.sum(2)[..., owner == rank].sum(-1) for rank in range(counts.shape[-2])], axis=-1)
    share = home / home.mean(-1, keepdims=True).clip(min=1e-9)
    sample, layer = np.unravel_index(share.max(-1).argmax(), share.shape[:2])
    after = planned[sample, layer] / planned[sample, layer].mean().clip(min=1e-9)
    return share[sample, layer], after, int(layer)


def _smooth(values: list[float]) -> np.ndarray:
    """An exponential mean, so that a line can be read."""
    out, mean = [], np.nan
    for value in values:
        mean = value if np.isnan(mean) else mean if np.isnan(value) else 0.8 * mean + 0.2 * value
        out.append(mean)
    return np.array(out)
