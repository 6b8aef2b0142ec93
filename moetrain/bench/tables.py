"""A benchmark's rows of text, on the terminal and in Markdown."""

from collections.abc import Sequence

from rich.table import Table

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
