"""The end of a run, as a person enjoys reading it; and `summary.json` for machines."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moetrain.common import disk
from moetrain.common.console import RunLogger, styled
from moetrain.config import Config
from moetrain.data.bigram import Bigram
from moetrain.data.held_out import held_out_windows
from moetrain.data.loader import Corpus, Samples
from moetrain.observe.estimate import Estimate, short
from moetrain.observe.metrics import (
    GUESTS,
    IMBALANCE_HOME,
    IMBALANCE_PLANNED,
    LM_LOSS,
    LOSS,
    ROWS_MOVED,
    ROWS_MOVED_FRACTION,
    TOKENS,
    TOKENS_PER_SECOND,
)
from moetrain.observe.scores import Score

COLUMNS = (  # of metrics.jsonl, that the summary is made of
    TOKENS, LM_LOSS, TOKENS_PER_SECOND, IMBALANCE_HOME, IMBALANCE_PLANNED,
    GUESTS, ROWS_MOVED, ROWS_MOVED_FRACTION,
)  # fmt: skip
NOT_EVALUATED = "not evaluated, because none of its text is held out"
BIGRAM_MOST_TOKENS = 50_000_000  # above it, counting pairs would take minutes


def bigram_scores(config: Config, corpus: Corpus, loader: Samples, samples: int) -> dict[str, float | None] | None:
    """Return bits per byte of the baseline after the first `samples`, per domain and over `all`; None without held-out
    text.

    None where that is too much text to count pairs in, or conversations, of which only answers are judged.
    """
    if corpus.is_chat or samples * config.train.seq_len > BIGRAM_MOST_TOKENS:
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
    """Return everything the summary shows, from the run's own records; written to `summary.json`."""
    rows = [row for row in disk.rows(folder / "metrics.jsonl") if LOSS in row]
    column = {name: [row[name] for row in rows if _is_number(row.get(name))] or [math.nan] for name in COLUMNS}
    mean = lambda name: float(np.mean(column[name]))  # noqa: E731
    total = lambda name: round(np.nan_to_num(mean(name)) * config.train.steps)  # noqa: E731
    found = {
        "run": str(folder),
        "steps": config.train.steps,
        "recorded_steps": len(rows),  # fewer than steps: sums over steps are estimated from these
        "tokens": column[TOKENS][-1],
        "parameters": {"total": size.total, "active": size.active},
        "loss": {
            "first": _or_none(column[LM_LOSS][0]),
            "last": _or_none(column[LM_LOSS][-1]),
        },
        "bits_per_byte": {name: score.bits_per_byte if score.num_bytes else None for name, score in scores.items()},
        "bigram_bits_per_byte": bigram,
        "tokens_per_second": float(np.median(column[TOKENS_PER_SECOND])),
        "imbalance": {"home": mean(IMBALANCE_HOME), "planned": mean(IMBALANCE_PLANNED)},
        "guests": total(GUESTS),
        "rows_moved": total(ROWS_MOVED),
        "rows_moved_fraction": mean(ROWS_MOVED_FRACTION),
        "generated": texts,
    }
    disk.write(folder / "summary.json", json.dumps(found, indent=2) + "\n")
    return found


def beaten(model: Mapping[str, float | None], bigram: Mapping[str, float | None] | None) -> str | None:
    """Say where a bigram model has fewer bits a byte, in a sentence; None where nowhere."""
    known = {name: (bits, (bigram or {}).get(name)) for name, bits in model.items()}
    lost = [name for name, (ours, its) in known.items() if ours is not None and its is not None and ours > its]
    if "all" in lost:
        ours, its = known["all"]
        return f"The validation loss is higher than that of a bigram model: {ours:.3f} against {its:.3f} bits/byte."
    return f"A bigram model has a lower validation loss on {', '.join(lost)}." if lost else None


def number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def read(folder: Path) -> dict[str, Any] | None:
    """Return what `collect` wrote of the run in a folder; None where it is missing or damaged."""
    found = disk.read_json(folder / "summary.json")
    try:
        numbers = [found[name] for name in ("tokens", "steps", "tokens_per_second", "rows_moved", "guests")]
        numbers += [found["rows_moved_fraction"], *(found["imbalance"][name] for name in ("home", "planned"))]
        numbers += [found["parameters"][name] for name in ("total", "active")]
        open_ones = [found["loss"]["first"], found["loss"]["last"], *found["bits_per_byte"].values()]
        open_ones += (found["bigram_bits_per_byte"] or {}).values()
        numbers.append(found.get("recorded_steps", 0))
        texts = [found["run"], *(each[name] for each in found["generated"] for name in ("title", "prompt", "text"))]
    except (LookupError, TypeError, AttributeError):
        return None
    sound = all(_is_number(x) for x in numbers) and all(x is None or _is_number(x) for x in open_ones)
    return found if sound and all(isinstance(text, str) for text in texts) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def show(found: dict[str, Any], logger: RunLogger) -> None:
    table = Table(
        title="Validation loss in bits/byte (lower is better)", title_justify="left", box=None, padding=(0, 2, 0, 0)
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
    recorded = found.get("recorded_steps", found["steps"])  # older summaries lack it
    about = "about " if recorded < found["steps"] else ""
    for name, text in (
        (
            "parameters",
            f"{short(found['parameters']['total'])}, {short(found['parameters']['active'])} active per token",
        ),
        (
            "trained on",
            f"{found['tokens']:,} tokens in {found['steps']} steps, {found['tokens_per_second']:,.0f} tokens/s",
        ),
        (
            "loss",
            f"{number(found['loss']['first'])} → {number(found['loss']['last'])} nats/token, first and last step",
        ),
        (
            "imbalance",
            f"{home:.3f} at home → {planned:.3f} planned (busiest device over the mean, mean over recorded steps)",
        ),
        (
            "moved",
            f"{about}{found['guests']:,} guests (temporary replicas of experts) lent, {about}{found['rows_moved']:,} "
            f"rows (token copies, {found['rows_moved_fraction']:.1%} of all)"
            + (f"; estimated from {recorded:,} of {found['steps']:,} steps" if about else ""),
        ),
    ):
        facts.add_row(Text(name, "dim"), text)
    logger.print()
    logger.print(Panel(facts, title=Text("Run complete", "bold"), title_align="left", width=100))
    if (said := beaten(found["bits_per_byte"], found["bigram_bits_per_byte"])) is not None:
        logger.print(said, style="yellow")
    logger.print(table)
    if None in found["bits_per_byte"].values():
        logger.print(f"–: {NOT_EVALUATED}")
    if found["bigram_bits_per_byte"]:
        logger.print(
            "bigram: fitted on the tokens that the model was trained on, its discount tuned on held-out text",
            style="dim",
        )
    for item in found["generated"]:
        logger.print(styled((f"\n{item['title']}", "bold"), (" prompt, and what the model wrote after it:", "dim")))
        logger.print(styled((item["prompt"], ""), (item["text"], "green")))
    places = "report.html, run.png, metrics.jsonl, checkpoints/, load_trace/"
    logger.print(styled(("\nAll results are in ", ""), (found["run"], "bold"), (f": {places}", "")))
