"""The registry of metrics: the only place that spells their names; docs, wandb and the report follow it."""

import re
import subprocess
from pathlib import Path

import pytest

from moetrain.observe import metrics
from moetrain.observe.collect import meter
from moetrain.report.figures import FIGURES, titles
from scripts import metrics_table
from tests import made_run

ROOT = Path(__file__).parents[2]


def find_metric(name: str) -> metrics.Metric | None:
    """The registered metric that a recorded name belongs to; None for a name that no version of moetrain writes."""
    return metrics.METRICS.get(name) or next((m for m in metrics.METRICS.values() if m.form.fullmatch(name)), None)


def test_the_page_of_metrics_is_that_of_the_registry() -> None:
    text = metrics_table.PAGE.read_text()
    assert metrics_table.updated(text) == text, "python -m scripts.metrics_table writes it"
    assert all(f"`{name}`" in text for name in metrics.METRICS)


def test_names_are_spelled_in_the_registry_alone() -> None:
    listed = subprocess.run(["git", "ls-files", "moetrain/*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    literal = re.compile(r"""["'](train|perf|balance|eval|specialise)/[\w{]""")
    spelled = [name for name in listed.stdout.split() if literal.search((ROOT / name).read_text())]
    assert spelled == ["moetrain/observe/metrics.py"]


def test_metrics_are_drawn_where_they_say() -> None:
    drawn = {metric.figure for metric in metrics.METRICS.values() if metric.figure}
    assert drawn <= FIGURES.keys() == titles().keys() - {"history"}
    made_of_trace = {"traffic", "domains", "specialists"}
    shown_with_others = {"held_out_steps", "saved", "waited"}
    assert FIGURES.keys() - drawn - made_of_trace - shown_with_others == set()


def test_recorded_names_are_registered(tmp_path: Path) -> None:
    """Those of a made-up run stand for what is recorded; tests/observe/test_record.py looks at a real one."""
    rows = [line for line in (made_run.write(tmp_path / "run") / "metrics.jsonl").read_text().splitlines()]
    names = set(re.findall(r'"([a-z]+/[\w/]+)":', "".join(rows)))
    assert len(names) > 30
    assert {name for name in names if find_metric(name) is None} == set()
    found = find_metric("balance/layer_03_1/load")
    assert found is not None
    assert (found.name, found.unit) == (metrics.LAYER_LOAD, "share")
    assert find_metric("eval/prose/ppl") == metrics.METRICS[metrics.DOMAIN_PPL]
    assert find_metric("balance/unknown") is None


def test_a_name_has_one_definition() -> None:
    with pytest.raises(ValueError, match="train/loss is defined twice"):
        metrics.define("train/loss", "", "", "again")


def test_phases_are_those_of_the_clock() -> None:
    assert (*metrics.TIME, *metrics.PHASE) == meter.ALL_PHASES
