"""The end of a run, as a person enjoys reading it; and `summary.json` for machines."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moetrain.config import Config
from moetrain.data.bigram import Bigram
from moetrain.data.loader import Corpus, Samples
from moetrain.evaluate import Score, held_out_windows
from moetrain.observe.console import Voice, styled
from moetrain.observe.estimate import Estimate, short

NOT_EVALUATED = "not evaluated, since no byte of its text is held out"
BIGRAM_MOST_TOKENS = 50_000_000  # above it, counting pairs would take minutes


def bigram_scores(config: Config, corpus: Corpus, loader: Samples, samples: int) -> dict[str, float | None] | None:
    """Bits per byte of the baseline after the first `samples`, per domain and over `all`; None without held-out text.

    None where that is too much text to count pairs in.
    """
    if samples * config.train.seq_len > BIGRAM_MOST_TOKENS:
        return None
    bigram = Bigram(corpus.vocab_size)
    for begin in range(0, samples, 256):
        bigram.see(loader.samples(begin, min(samples, begin + 256)).tokens)
    bigram.fit()
    held_out = {name: held_out_windows(corpus, config, number).tokens for number, name in enumerate(corpus.domains)}
    discount = bigram.tune(list(held_out.values()))
    nats = {name: float(bigram.nats(tokens, discount).sum()) for name, tokens in held_out.items()}
    sizes = {name: int(corpus.token_bytes[tokens[:, 1:]].sum()) for name, tokens in held_out.items()}
    nats["all"], sizes["all"] = sum(nats.values()), sum(sizes.values())
    return {name: nats[name] / math.log(2) / sizes[name] if sizes[name] else None for name in nats}


def collect(
    folder: Path,
    config: Config,
    size: Estimate,
    scores: dict[str, Score],
    bigram: dict[str, float | None] | None,
    texts: Any,
) -> dict[str, Any]:
    """Everything the summary shows, from the run's own records; written to `summary.json`."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    mean = lambda name: float(np.mean([row[name] for row in rows]))  # noqa: E731
    found = {
        "run": str(folder),
        "steps": config.train.steps,
        "tokens": rows[-1]["train/tokens"],
        "parameters": {"total": size.total, "active": size.active},
        "loss": {
            "first": rows[0]["train/lm_loss"],
            "last": float(np.mean([r["train/lm_loss"] for r in rows[-10:]])),
        },
        "bits_per_byte": {name: score.bits_per_byte if score.num_bytes else None for name, score in scores.items()},
        "bigram_bits_per_byte": bigram,
        "tokens_per_second": float(np.median([row["perf/tokens_per_second"] for row in rows])),
        "imbalance": {"home": mean("balance/imbalance_home"), "planned": mean("balance/imbalance_planned")},
        "guests": round(mean("balance/guests") * config.train.steps),
        "rows_moved": round(mean("balance/rows_moved") * config.train.steps),
        "rows_moved_fraction": mean("balance/rows_moved_fraction"),
        "generated": texts,
    }
    whole = folder / ".summary.json.part"
    whole.write_text(json.dumps(found, indent=2) + "\n")
    whole.rename(folder / "summary.json")
    return found


def number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def is_there(folder: Path) -> bool:
    return (folder / "summary.json").is_file()


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def show(found: dict[str, Any], voice: Voice) -> None:
    table = Table(
        title="Held-out bits per byte (lower is better)", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    table.add_column("domain")
    table.add_column("this model", justify="right")
    table.add_column("bigram", justify="right")
    for name, value in found["bits_per_byte"].items():
        bigram = found["bigram_bits_per_byte"]
        style = "bold" if name == "all" else ""
        table.add_row(name, number(value), number(bigram[name] if bigram else None), style=style)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    home, planned = found["imbalance"]["home"], found["imbalance"]["planned"]
    for name, text in (
        (
            "parameters",
            f"{short(found['parameters']['total'])}, of them {short(found['parameters']['active'])} active a token",
        ),
        (
            "trained on",
            f"{found['tokens']:,} tokens in {found['steps']} steps, {found['tokens_per_second']:,.0f} tokens/s",
        ),
        (
            "loss",
            f"{found['loss']['first']:.3f} → {found['loss']['last']:.3f} nats a token, mean of the last ten steps",
        ),
        ("imbalance", f"{home:.3f} at home → {planned:.3f} planned (largest device load over the mean)"),
        (
            "moved",
            f"{found['guests']:,} guests lent, {found['rows_moved']:,} rows "
            f"({found['rows_moved_fraction']:.1%} of all)",
        ),
    ):
        facts.add_row(Text(name, "dim"), text)
    voice.say()
    voice.say(Panel(facts, title=Text("Run complete", "bold"), title_align="left", width=100))
    voice.say(table)
    if None in found["bits_per_byte"].values():
        voice.say(f"–: {NOT_EVALUATED}")
    if found["bigram_bits_per_byte"]:
        voice.say("bigram: tuned on the held-out text, fitted on the very tokens the model saw", style="dim")
    for item in found["generated"]:
        voice.say(styled((f"\n{item['title']}", "bold"), (" prompt, then what the model wrote:", "dim")))
        voice.say(styled((item["prompt"], ""), (item["text"], "green")))
    places = "report.html, run.png, metrics.jsonl, checkpoints/, load_trace/"
    voice.say(styled(("\nEverything is in ", ""), (found["run"], "bold"), (f": {places}", "")))
