"""The page of errors beside published figures is true: it is what the script makes today, and no worse than it says."""

import csv
import importlib.util
import statistics
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("simulate_published", ROOT / "scripts" / "simulate_published.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    with (ROOT / "docs" / "results" / "published.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_row_has_a_source_and_a_use(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert row["use"] in ("fit", "held out")
        assert row["kind"] in ("step", "layer", "speed-up", "own step", "own memory")
        assert len(row["source"]) > 10
        assert float(row["value"]) > 0
    assert sum(row["use"] == "fit" for row in rows) <= 6


def test_the_page_holds_todays_errors(script: ModuleType, rows: list[dict[str, str]]) -> None:
    details, summary = script.errors_page(rows)
    page = script.PAGE.read_text()
    for line in (*summary, *details):
        assert line in page, "run scripts/simulate_published.py"


def test_held_out_errors_stay_where_they_are(script: ModuleType, rows: list[dict[str, str]]) -> None:
    held = [row for row in rows if row["use"] == "held out"]
    errors = {id(row): abs(script.PREDICT[row["kind"]](row) / float(row["value"]) - 1) for row in held}
    for kind, stack, bound in (
        ("step", "automodel", 0.15),
        ("layer", "moetrain", 0.06),
        ("speed-up", "automodel", 0.25),
    ):
        own = [errors[id(row)] for row in held if (row["kind"], row["stack"]) == (kind, stack)]
        assert statistics.median(own) < bound
