"""The results of a benchmark for people: the same tables on the terminal and in Markdown; records in JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from moetrain.common.console import console

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class Tabulated:
    """One table: `columns` name the cells of each row; the first `num_left` of them hold words, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_left: int = 1

    def render(self) -> Table:
        """Return the table for a terminal."""
        out = Table(title=self.title)
        for number, column in enumerate(self.columns):
            out.add_column(column, justify="left" if number < self.num_left else "right")
        for row in self.rows:
            out.add_row(*row)
        return out

    def markdown(self) -> str:
        """Return the title and the table as Markdown."""
        rules = ["---" if number < self.num_left else "---:" for number in range(len(self.columns))]
        lines = [" | ".join(cells) for cells in (self.columns, rules, *self.rows)]
        return "\n".join([self.title, "", *(f"| {line} |" for line in lines)])


@dataclass(frozen=True)
class Results:
    """What a benchmark found: its records, and tables and notes for people."""

    name: str  # of the files
    heading: str
    records: Records
    tables: Sequence[Tabulated]
    notes: Sequence[str]

    def markdown(self) -> str:
        """Return the heading, the tables and the notes as Markdown."""
        return "\n\n".join([f"# {self.heading}", *(table.markdown() for table in self.tables), *self.notes]) + "\n"

    def publish(self, out: Path | None, draw: Callable[[Path], object] | None = None) -> None:
        """Print the tables and notes. With a folder, write NAME.json and NAME.md, and have `draw` make NAME.png."""
        for table in self.tables:
            console.print(table.render())
        for note in self.notes:
            console.print(note)
        if out is None:
            return
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{self.name}.json").write_text(json.dumps(self.records, indent=1) + "\n")
        (out / f"{self.name}.md").write_text(self.markdown())
        if draw is not None:
            draw(out / f"{self.name}.png")
        names = ", ".join(f"{self.name}.{kind}" for kind in ("json", "md", *(["png"] if draw else [])))
        console.print(f"written to {out}: {names}")
