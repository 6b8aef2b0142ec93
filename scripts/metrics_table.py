"""Write the table of docs/metrics.md from the registry of metrics: `python -m scripts.metrics_table`."""

from pathlib import Path

from moetrain.observe import metrics
from moetrain.report.figures import titles

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
BEGIN, END = "<!-- made by scripts/metrics_table.py from moetrain/observe/metrics.py -->\n\n", "<!-- end -->"


def updated(text: str) -> str:
    """The page with the table as the registry has it now."""
    before, _, rest = text.partition(BEGIN)
    table = "".join(line + "\n" for line in metrics.table(titles()))
    return before + BEGIN + table + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
