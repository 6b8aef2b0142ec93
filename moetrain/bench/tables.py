"""A benchmark's rows of text, on the terminal and in Markdown; and what it leaves behind."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from moetrain.common.console import console

Rows = Sequence[Sequence[str]]


def table(title: str, columns: Sequence[str], rows: Rows, num_left: int) -> Table:
    """The first `num_left` columns hold words and stand to the left, the others numbers."""
    out = Table(title=title)
    for number, column in enumerate(columns):
        out.add_column(column, justify="left" if number < num_left else "right")
    for row in rows:
        out.add_row(*row)
    return out


def markdown(heading: str, title: str, columns: Sequence[str], rows: Rows, legend: str) -> str:
    lines = [" | ".join(columns), "|".join(["---"] * len(columns)), *(" | ".join(row) for row in rows)]
    body = "\n".join(f"| {line} |" for line in lines)
    return f"# {heading}\n\n{title}\n\n{body}\n\n{legend}\n"


def publish(name: str, found: list[dict[str, Any]], shown: Table, legend: str, text: str, out: Path | None) -> None:
    """Show the table and its legend; the records and `text` go to `out`/NAME.json and NAME.md."""
    console.print(shown)
    console.print(legend)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / f"{name}.md").write_text(text)
        console.print(f"written: {out}/{name}.json, {name}.md")
