"""Tables and one picture of finished runs: runs that differ in nothing but their seed make one row.

  python scripts/tabulate_runs.py runs/experiments/scope_* --out docs/results/MACHINE/scopes

Reads RUN/config.yaml, summary.json and metrics.jsonl; writes table.md, table.json and picture.png into --out. A run's
row is its folder's name without -sSEED; rows stand in the order given, and the first is what others are compared with,
seed by seed. Numbers are means over the seeds, ± half of their range.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

Values = dict[str, float]


class Column(NamedTuple):
    title: str
    key: str
    digits: int
    what: str


COLUMNS = (
    Column("bits/byte", "bits_per_byte", 4, "held-out bits for every byte of text, all domains"),
    Column("loss", "loss", 4, "held-out cross entropy, nats a token"),
    Column(
        "domain MI", "domain_mi", 3, "mutual information of domain and expert on held-out text, bits, mean of layers"
    ),
    Column(
        "MaxVio", "max_vio_held_out", 2, "(largest - mean) / mean expert load over all held-out text, mean of layers"
    ),
    Column("MaxVio in training", "max_vio", 2, "the same over a global batch, mean of the run's second half"),
    Column(
        "imbalance home", "imbalance_home", 3, "largest device load over the mean in a micro-step, without planning"
    ),
    Column("planned", "imbalance_planned", 3, "the same after planning; both of the run's second half"),
    Column("experts/token", "experts_per_token", 2, "selections of a token in a layer, second half"),
    Column("tokens/s", "tokens_per_second", 0, "median of the steps, all ranks together"),
    Column("active", "active_parameters", 0, "parameters that a token uses"),
)


def read(run: Path) -> Values:
    """All numbers of one run; `domain/NAME`: its bits per byte in that domain."""
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/lm_loss" in row]
    held_out = [row for row in rows if "eval/loss" in row][-1]
    late = steps[len(steps) // 2 :]
    found = {
        "loss": number(held_out["eval/loss"]),
        "bits_per_byte": number(held_out["eval/bits_per_byte"]),
        "domain_mi": over_layers(held_out, "specialise", "domain_mi"),
        "max_vio_held_out": over_layers(held_out, "eval", "max_vio"),
        "max_vio": float(np.mean([over_layers(row, "balance", "max_vio") for row in late])),
        "imbalance_home": float(np.mean([row["balance/imbalance_home"] for row in late])),
        "imbalance_planned": float(np.mean([row["balance/imbalance_planned"] for row in late])),
        "tokens_per_second": summary["tokens_per_second"],
        "active_parameters": summary["parameters"]["active"],
    }
    if "balance/experts_per_token" in steps[-1]:
        found["experts_per_token"] = float(np.mean([row["balance/experts_per_token"] for row in late]))
    domains = {name: value for name, value in summary["bits_per_byte"].items() if name != "all"}
    return found | {f"domain/{name}": number(value) for name, value in domains.items()}


def number(value: float | None) -> float:
    """NaN for what was not evaluated."""
    return float("nan") if value is None else value


def over_layers(row: dict[str, Any], group: str, name: str) -> float:
    return float(np.mean([number(v) for k, v in row.items() if re.fullmatch(rf"{group}/layer_[\d_]+/{name}", k)]))


def settings(run: Path) -> dict[str, Any]:
    """What the run was told, without its seed and name."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree.pop("run")
    tree["train"].pop("seed")
    return tree


def gather(runs: Sequence[Path]) -> dict[str, dict[int, Values]]:
    """{row: {seed: numbers}}, in the order given. Raises `ValueError` where a row's runs differ in more than a seed."""
    found: dict[str, dict[int, Values]] = {}
    told: dict[str, dict[str, Any]] = {}
    for run in runs:
        name = re.sub(r"-s\d+$", "", run.name)
        if told.setdefault(name, settings(run)) != settings(run):
            raise ValueError(f"{run}: differs from other runs of {name} in more than its seed")
        seed = yaml.safe_load((run / "config.yaml").read_text())["train"]["seed"]
        found.setdefault(name, {})[seed] = read(run)
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "half_range": float(np.ptp(values)) / 2, "values": list(values)}


def summarise(found: dict[str, dict[int, Values]]) -> list[dict[str, Any]]:
    """One record a row; `against_first`: bits per byte less those of the first row, over the seeds that both have."""
    first = next(iter(found.values()))
    records = []
    for name, seeds in found.items():
        keys = list(next(iter(seeds.values())))
        both = [seed for seed in seeds if seed in first]
        differences = [seeds[seed]["bits_per_byte"] - first[seed]["bits_per_byte"] for seed in both]
        numbers = {key: spread([values[key] for values in seeds.values()]) for key in keys}
        against = spread(differences) if differences else None
        records.append({"name": name, "seeds": list(seeds), "against_first": against, **numbers})
    return records


def written(number: dict[str, Any] | None, digits: int, sign: str = "") -> str:
    if number is None:
        return "–"
    text = f"{number['mean']:{sign},.{digits}f}"
    return text if number["half_range"] == 0 else f"{text} ± {number['half_range']:,.{digits}f}"


def markdown(records: list[dict[str, Any]]) -> str:
    first = records[0]["name"]
    heads = ["run", "seeds", COLUMNS[0].title, f"less {first}", *(c.title for c in COLUMNS[1:])]
    lines = table(heads, [row(record, first) for record in records], left=1)
    lines += ["", "Means over the seeds ± half of their range. " + "; ".join(f"{c.title}: {c.what}" for c in COLUMNS)]
    lines[-1] += f"; less {first}: bits/byte of the same seeds, less those of {first}."
    domains = sorted({key for record in records for key in record if key.startswith("domain/")})
    lines += ["", "Held-out bits per byte of each domain:", ""]
    body = [[d.removeprefix("domain/"), *(written(r.get(d), 3) for r in records)] for d in domains]
    return "\n".join([*lines, *table(["domain", *(r["name"] for r in records)], body, left=1)]) + "\n"


def row(record: dict[str, Any], first: str) -> list[str]:
    against = "" if record["name"] == first else written(record["against_first"], 4, "+")
    cells = [written(record.get(c.key), c.digits) for c in COLUMNS]
    return [record["name"], str(len(record["seeds"])), cells[0], against, *cells[1:]]


def table(heads: list[str], rows: list[list[str]], left: int) -> list[str]:
    rule = ["---" if place < left else "---:" for place in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Loss, specialisation and what the devices have to bear: a line a row, a dot a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 1.6 + 0.45 * len(records)), sharey=True)
    places = np.arange(len(records))[::-1]
    panels = (
        ("Held-out bits per byte (less is better)", [("bits_per_byte", "tab:blue", "")]),
        ("Domain–expert mutual information (bits)", [("domain_mi", "tab:purple", "")]),
        (
            "Device imbalance (max / mean load)",
            [("imbalance_home", "tab:red", "at home"), ("imbalance_planned", "tab:green", "planned")],
        ),
    )
    for axis, (title, marks) in zip(axes, panels, strict=True):
        for key, color, label in marks:
            means = [record[key]["mean"] for record in records]
            axis.scatter(means, places, marker="|", s=400, color=color)
            dots = [
                (value, place) for place, record in zip(places, records, strict=True) for value in record[key]["values"]
            ]
            axis.scatter(*zip(*dots, strict=True), s=28, color=color, alpha=0.6, linewidths=0, label=label or None)
        axis.set_title(title, fontsize=11)
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15, y=0.5 / len(records))
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_yticks(places, [record["name"] for record in records])
    axes[2].axvline(1, color="gray", lw=0.8, ls=":")
    axes[2].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    given = parser.parse_args()
    runs = [run for run in given.runs if run.is_dir()]
    finished = [run for run in runs if (run / "summary.json").is_file()]
    for run in set(runs) - set(finished):
        print(f"left out, not finished: {run}", file=sys.stderr)
    if not finished:
        print("error: none of these is a finished run", file=sys.stderr)
        return 2
    try:
        records = summarise(gather(finished))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.json").write_text(json.dumps(records, indent=1) + "\n")
    (given.out / "table.md").write_text(markdown(records))
    draw(records, given.out / "picture.png")
    print((given.out / "table.md").read_text())
    print(f"written to {given.out}: table.md, table.json, picture.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
