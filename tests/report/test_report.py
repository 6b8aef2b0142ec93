"""The report: what the page says of a run, what it does in a real browser, broken runs, the live page."""

import base64
import itertools
import json
import math
import os
import re
import shutil
import threading
import tracemalloc
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from moetrain import cli
from moetrain.common.console import RunLogger
from moetrain.config import ConfigError, resolve_early
from moetrain.config import load as load_config
from moetrain.observe import picture, reduce, summary
from moetrain.observe import picture as palette
from moetrain.observe.estimate import estimate, short
from moetrain.observe.scores import Score
from moetrain.observe.sinks.terminal import Plain
from moetrain.report import build, curves, read
from moetrain.report.cards import cards
from moetrain.report.figures import FIGURES
from moetrain.report.live import server
from moetrain.report.pictures import PICTURES
from moetrain.report.read import open_run
from moetrain.runs import starts
from tests import made_run
from tests.browser import Browser, find


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run.write(tmp_path_factory.mktemp("runs") / "full")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser | None]:
    """None on a machine without Chromium, where tests check what they can; CI has to have one."""
    path = find()
    assert path or "CI" not in os.environ, "CI needs a Chromium: apt-get install chromium"
    opened = Browser(path, tmp_path_factory.mktemp("profile")) if path else None
    yield opened
    if opened:
        opened.close()


def change(folder: Path, field: Callable[[int], dict]) -> None:
    """Put the fields that `field` gives for a step into the run's training rows."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row | field(row["step"]) if "train/loss" in row else row for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def findings(folder: Path) -> dict[str, str]:
    """{text: section} of everything but what is good."""
    found = build.data([open_run(str(folder))])["runs"][0]["findings"]
    return {finding["text"]: finding["section"] for finding in found if finding["level"] != "good"}


def write(folder: Path, *more: Path) -> tuple[Path, dict]:
    path = folder.parent / f"{folder.name}.html"
    return path, build.write([open_run(str(f)) for f in (folder, *more)], path)


def test_every_figure_is_drawn_and_the_slider_moves_by_key(full: Path, browser: Browser | None) -> None:
    path, page = write(full)
    assert [name for name, figure in page["runs"][0]["figures"].items() if figure["kind"] == "absent"] == []
    text = path.read_text()
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    if browser is None:
        return
    opened = browser.open(path.as_uri())
    marks = "svg path, svg rect, canvas, .bars .fill, code"
    drawn = (
        f"[...document.querySelectorAll('[data-figure]')].filter(f => !f.hidden && f.querySelector('{marks}')).length"
    )
    assert opened.evaluate(drawn) == len(FIGURES) + 1  # the load is drawn twice: all layers, and one over time
    assert opened.evaluate("document.querySelectorAll('.card').length") == len(page["runs"][0]["cards"])
    state = (
        "document.getElementById('at').textContent + document.querySelector('[data-figure=load] canvas').toDataURL()"
    )
    assert opened.evaluate("document.getElementById('at').textContent") == "40 of 40"
    before = opened.evaluate(state)
    opened.press("ArrowLeft")  # anywhere on the page
    assert opened.evaluate("document.getElementById('at').textContent") == "39 of 40"
    opened.evaluate("document.getElementById('step').focus()")
    arrow = {"key": "ArrowLeft", "code": "ArrowLeft", "windowsVirtualKeyCode": 37, "modifiers": 8}
    opened.send("Input.dispatchKeyEvent", type="keyDown", **arrow)  # with Shift, on the slider itself
    assert opened.evaluate("document.getElementById('at').textContent") == "29 of 40"
    opened.press("Home")
    assert opened.evaluate("document.getElementById('step').getAttribute('aria-valuetext')") == "step 1"
    assert opened.evaluate(state) != before
    readout = "document.querySelector('[data-figure=devices] .readout').textContent"
    assert opened.evaluate(readout).startswith("all layers, step 1:") or "layer 00, step 1:" in opened.evaluate(readout)
    opened.evaluate("document.querySelector('[data-figure=load] canvas').focus()")
    opened.press("ArrowDown")
    opened.press("ArrowDown")
    opened.press("Enter")  # on the map's second row
    assert opened.evaluate("document.getElementById('layer').value") == "1"
    assert "layer 01" in opened.evaluate(readout)
    opened.press("ArrowRight")  # expert 1 of it is dead
    assert opened.evaluate("document.querySelector('[data-figure=load] .readout').textContent").endswith(": no token")
    assert opened.complaints() == []


def colors_of(style: str) -> list[list[tuple[float, ...]]]:
    """The colors of unordered lines, light and dark, with that of the main line before them; in sRGB from 0 to 1."""
    out = []
    for main, block in re.findall(r"--main: (#\w+).*?(--c0:[^}]*)", style, re.DOTALL):
        out.append([main, *re.findall(r"--c\d: (#\w{6})", block)])
    return [[tuple(int(c[at : at + 2], 16) / 255 for at in (1, 3, 5)) for c in colors] for colors in out]


# sRGB, linear, as protanopes, deuteranopes and tritanopes see it (Machado, Oliveira and Fernandes, 2009, severity 1)
SEEN = (
    np.eye(3),
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
)


def apart(colors: list[tuple[float, ...]], matrix: Any) -> float:
    """The least distance of two colors in OKLab (Ottosson, 2020) after `matrix`: 0.02 is just noticeable."""
    srgb = np.array(colors)
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.array(matrix).T, 0, 1)
    to_lms = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.68069955, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    to_lab = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.42859221, 0.45059371],
        [0.0259040, 0.78277177, -0.80867577],
    ]
    lab = np.cbrt(linear @ np.array(to_lms).T) @ np.array(to_lab).T
    return min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(lab, 2))


def test_lines_can_be_told_apart_by_everyone() -> None:
    style = (build.PARTS / "style.css").read_text()
    light, dark = colors_of(style)
    for colors in (light, dark):
        assert len(colors) == 1 + len(palette.SERIES)
        assert min(apart(colors, matrix) for matrix in SEEN) > 0.07
    assert re.findall(r"--c\d: (#\w{6})", style)[: len(palette.SERIES)] == [*palette.SERIES]
    assert re.findall(r"--o\d: (#\w{6})", style)[: len(palette.ORDERED)] == [*palette.ORDERED]
    assert json.dumps(palette.DASHES) in (build.PARTS / "plots.js").read_text()
    many = [str(palette.line_style(number)) for number in range(24)]
    assert len({*many}) == 24


def test_a_run_and_a_domain_keep_their_color(full: Path, tmp_path: Path, browser: Browser | None) -> None:
    """In every figure, also where another run or domain has nothing there."""
    other = made_run.write(tmp_path / "other", seed=1)
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in ("balance/imbalance_planned", "train/cpp/loss")} for row in rows]
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path, page = write(other, full)
    shown = page["compare"]["figures"]
    assert [line["color"] for line in shown["loss"]["series"]] == [0, 1]
    assert [line["color"] for line in shown["imbalance"]["series"]] == [1]
    figures = page["runs"][0]["figures"]
    colors = [
        {line["name"]: line.get("color") for line in figures[name]["series"]} for name in ("loss", "held_out_steps")
    ]
    assert colors[0] == {"all": None, "prose": 1, "python": 2}
    assert colors[1] == {"all": None, "cpp": 0, "prose": 1, "python": 2}
    if browser is None:
        return
    opened = browser.open(path.as_uri())
    stroke = "getComputedStyle(document.querySelector('SELECTOR')).stroke"
    drawn = [stroke.replace("SELECTOR", f"#table tr:nth-child({row}) .swatch line") for row in (1, 2)]
    drawn += [stroke.replace("SELECTOR", f"[data-compare={name}] path.line:last-of-type") for name in ("imbalance",)]
    first, second, imbalance = (opened.evaluate(text) for text in drawn)
    assert first != second == imbalance


def test_figures_and_cards_fill_their_rows(full: Path, tmp_path: Path, browser: Browser | None) -> None:
    folder = shutil.copytree(full, tmp_path / "fewer")
    gone = re.compile(
        r"balance/(layer_\d+/(max_vio_micro|entropy)|gamma_eff|guests)|perf/memory_gib|train/z_loss|perf/waited"
    )
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not gone.match(k)} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path, page = write(folder)
    assert sum(figure["kind"] == "absent" for figure in page["runs"][0]["figures"].values()) >= 4
    if browser is None:
        return
    right = """[...document.querySelectorAll('LIST')].flatMap((list) => {
      const edges = {};
      for (const part of list.children) {
        const box = part.getBoundingClientRect();
        if (box.width) edges[Math.round(box.top)] = Math.max(edges[Math.round(box.top)] ?? 0, Math.round(box.right));
      }
      return Object.values(edges).map((edge) => Math.round(list.getBoundingClientRect().right) - edge);
    })"""
    for width in (1280, 900, 700, 390):
        opened = browser.open(path.as_uri(), width=width)
        for name in (".figures", "#cards"):
            gaps = opened.evaluate(right.replace("LIST", f"section:not([hidden]) {name}"))
            assert gaps, name
            assert max(gaps) <= 2, (width, name, gaps)


def test_a_comparison_on_paper_is_whole(full: Path, tmp_path: Path, browser: Browser | None) -> None:
    """A4 between its margins: no column of a table is cut off, and the fields that differ are printed."""
    others = [made_run.write(tmp_path / f"a_run_with_a_long_name_{n}", steps=20 + n, seed=n) for n in range(4)]
    path, _ = write(full, *others)
    if browser is None:
        return
    opened = browser.open(path.as_uri())
    printed = opened.pdf()
    assert 2 <= printed.count(b"/Type /Page\n") <= 14
    opened.send("Emulation.setEmulatedMedia", media="print")
    opened.send("Emulation.setDeviceMetricsOverride", width=688, height=1000, deviceScaleFactor=1, mobile=False)
    opened.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    for table in ("#table", "#differences table"):
        edge = opened.evaluate(f"document.querySelector('{table}').getBoundingClientRect().right")
        assert 0 < edge <= 688, table
    assert opened.evaluate("document.querySelector('#differences table').checkVisibility()")
    opened.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert not opened.evaluate("document.getElementById('differences').open")
    assert opened.complaints() == []


def test_light_dark_paper_and_a_narrow_screen(full: Path, browser: Browser | None) -> None:
    path, _ = write(full)
    if browser is None:
        return
    colour = "getComputedStyle(document.body).backgroundColor"
    light, dark = browser.open(path.as_uri()), browser.open(path.as_uri(), dark=True)
    assert light.evaluate(colour) != dark.evaluate(colour)
    dark.evaluate("document.getElementById('theme').click()")
    assert light.evaluate(colour) == dark.evaluate(colour)
    assert light.pdf().startswith(b"%PDF")
    light.send("Emulation.setEmulatedMedia", media="print")
    shown = "[...document.querySelectorAll('footer p')].filter(p => p.checkVisibility()).map(p => p.textContent)"
    assert light.evaluate(shown) == ["Alerts of the run:"]
    narrow = browser.open(path.as_uri(), width=390)
    assert narrow.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert light.complaints() + dark.complaints() + narrow.complaints() == []


def test_runs_side_by_side(full: Path, browser: Browser | None, tmp_path: Path) -> None:
    other = made_run.write(tmp_path / "full", steps=60, seed=1)
    path, page = write(full, other)
    assert len({run["name"] for run in page["runs"]}) == 2  # the same folder name in two places
    assert [d["field"] for d in page["compare"]["differences"]] == ["train.steps"]
    speed = [column["text"] for column in page["compare"]["table"]["columns"]].index("Throughput")
    assert sum(row["cells"][speed]["best"] for row in page["compare"]["table"]["rows"]) == 1
    if browser is None:
        return
    opened = browser.open(path.as_uri())
    assert opened.evaluate("document.querySelectorAll('#compare figure path.line').length") == 8
    opened.evaluate("view.look(60)")  # as a pointer over the longer run's curve does
    assert opened.evaluate("document.getElementById('at').textContent") == "60"
    opened.evaluate("document.querySelectorAll('#runs button')[1].click()")
    assert opened.evaluate("document.getElementById('at').textContent") == "60 of 60"
    assert opened.complaints() == []


def test_it_says_what_is_wrong(full: Path) -> None:
    run = build.data([open_run(str(full))])["runs"][0]
    said = {finding["text"]: finding for finding in run["findings"]}
    assert (
        said["Dead experts, selected by no token in the last 10 recorded steps: layer 01: expert 1."]["level"]
        == "trouble"
    )
    assert any("1.02 as planned" in text and finding["level"] == "good" for text, finding in said.items())
    assert any("alert" in text for text in said)
    cards = {card["name"]: card for card in run["cards"]}
    assert (cards["Experts in use"]["value"], cards["Experts in use"]["unit"]) == ("15", "of 16")


STARTS = (
    {"step": 0, "time": "2026-01-01 10:00 +0000", "command": "moetrain train a", "hardware": "2 ranks", "seconds": 70},
    {"step": 12, "time": "2026-01-01 11:00 +0000", "command": "moetrain train <b>", "versions": "torch 2"},
    {
        "step": 20,
        "time": "2026-01-01 12:00 +0000",
        "command": "moetrain train <b>",
        "versions": "torch 2",
        "seconds": 20,
    },
)


def test_how_a_run_was_made_and_where_it_went_on(full: Path, tmp_path: Path, browser: Browser | None) -> None:
    folder = shutil.copytree(full, tmp_path / "resumed")
    (folder / "starts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STARTS) + "torn")
    path, page = write(folder)
    said = dict(page["runs"][0]["circumstances"])
    assert said.pop("Wall time") == "1.5 min, sum of 2 of 3 starts; the others recorded no end"
    assert said.pop("Resumed") == "after step 12, 20"
    assert said == {"Started": STARTS[2]["time"], "Versions": "torch 2", "Command": "moetrain train <b>"}
    (folder / "starts.jsonl").write_text('{"step": 3, "seconds": "x", "command": [1]}\n')
    assert build.data([open_run(str(folder))])["runs"][0]["circumstances"] == []
    assert build.data([open_run(str(full))])["runs"][0]["circumstances"] == []
    if browser is None:
        return
    opened = browser.open(path.as_uri())
    assert "moetrain train <b>" in opened.evaluate("document.getElementById('circumstances').textContent")
    titles = "[...document.querySelectorAll('[data-figure=NAME] .resumed title')].map(t => t.textContent)"
    for name in ("loss", "gradient", "time"):
        assert opened.evaluate(titles.replace("NAME", name)) == ["resumed after step 12", "resumed after step 20"]
    assert opened.complaints() == []


def test_a_start_is_kept_without_secrets(tmp_path: Path) -> None:
    given = ["train", "data.tokenizer=bpe", "optim.lr=1e-3", "wandb_api_key=abc,d", "track={token: abc, mode: x}"]
    given += ["data.path=s3://me:abc@host/x", "x.key='abc'", "MY_PASSWORD=abc", 'x={"client_secret": "abc"}']
    shown = starts.command(given)
    assert "abc" not in shown
    assert "data.tokenizer=bpe optim.lr=1e-3 " in shown
    mesh = SimpleNamespace(world=2, device=torch.device("cpu"))
    starts.Start(tmp_path, 0, mesh)
    again = starts.Start(tmp_path, 4, mesh)
    again.end()
    first, last = (json.loads(line) for line in (tmp_path / starts.NAME).read_text().splitlines())
    assert (first["step"], last["step"], "seconds" in first) == (0, 4, False)
    assert last["seconds"] >= 0
    assert first["hardware"].startswith("2 ranks, ")
    assert f"torch {torch.__version__}" in first["versions"]


def test_a_collapsed_router_and_a_busy_device_are_named(tmp_path: Path) -> None:
    folder = made_run.write(tmp_path / "collapsed", ranks=4)
    fields = {"balance/layer_00/load": [0.5, 0.45] + [0.05 / 6] * 6, "balance/imbalance_planned": 1.6}
    fields |= {"balance/device_load_planned": [10.0, 10.0, 40.0, 10.0], "perf/waited": [0.3, 0.3, 0, 0.3]}
    fields |= {"perf/waited_for": [0.0, 0.0, 0.9, 0.0]}
    change(folder, lambda step: fields | {"train/lm_loss": None if step == 7 else 4.0})
    found = build.data([open_run(str(folder))])["runs"][0]["findings"]
    text = " ".join(finding["text"] for finding in found if finding["level"] == "trouble")
    assert "layer 00: experts 0, 1 take 95% of all selections: router collapse." in text
    assert "Most of it is device 2" in text
    assert "Ranks wait for each other during 45% of a step, 100% of that for rank 2" in text
    assert "The loss was not finite in 1 step(s), the first is step 7." in text


def test_an_uneven_plan_says_why_it_may_be(full: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(full, tmp_path / "uneven")
    change(folder, lambda step: {"balance/imbalance_planned": 1.6})
    assert (
        "1.60 as planned: moving more rows would take longer than waiting, or there is no memory for guests"
        in " ".join(findings(folder))
    )
    config = json.loads((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(json.dumps(config | {"planner": {"name": "home"}}))
    assert "planner=home moves nothing; planner=makespan moves rows where that saves time" in " ".join(findings(folder))


def test_lending_that_costs_more_than_it_saves_is_named(full: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(full, tmp_path / "dear")
    assert "plan" not in findings(folder).values()  # 40 ms for 40 ms
    change(folder, lambda step: {"perf/phase/backward_lend": 0.07})
    said = "Lending experts takes 100 ms/step and saves 40 ms/step of computing time."
    assert findings(folder)[said] == "plan"
    cards = {card["name"]: card["note"] for card in build.data([open_run(str(folder))])["runs"][0]["cards"]}
    assert cards["Saved by the plan"] == "8.0% of a step; lending took 100 ms"
    change(folder, lambda step: {"balance/guests": 0})
    assert said not in findings(folder)


def test_noise_is_no_rising_loss_and_a_rise_is(tmp_path: Path) -> None:
    folder = made_run.write(tmp_path / "noisy", steps=200)
    noise = np.random.default_rng(0).normal(size=201)
    for size in (0.4, 1.5):
        change(folder, lambda step, size=size: {"train/lm_loss": 4 + size * noise[step]})
        assert not any("above its lowest mean" in text for text in findings(folder))
    change(folder, lambda step: {"train/lm_loss": 4 + 0.1 * noise[step] + 0.01 * abs(step - 90)})
    assert "above its lowest mean, that of steps 81 to 100" in " ".join(findings(folder))


def test_findings_link_to_their_figures(tmp_path: Path) -> None:
    folder = made_run.write(tmp_path / "waits", steps=250)
    waits = {"perf/waited": [0.3, 0.3], "perf/waited_for": [0.0, 0.6]}
    change(folder, lambda step: waits | {"perf/memory_gib": [1.0, 0.01 * step]})
    for kind, section in (("dead_experts", "experts"), ("imbalance", "devices"), ("not_finite", "loss")):
        (folder / "alerts.jsonl").write_text(json.dumps({"step": 9, "kind": kind, "text": "so it was"}) + "\n")
        said = findings(folder)
        assert said["One alert during the run, the last at step 9: so it was."] == section
    sections = {text.split()[0]: where for text, where in said.items()}
    assert sections["Ranks"] == sections["Memory"] == "devices"


def test_ten_thousand_steps_stay_small_and_keep_their_peaks(tmp_path: Path, browser: Browser | None) -> None:
    folder = tmp_path / "long"
    made_run.write(folder, steps=10_000, layers=1, samples=400)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    row = json.loads(lines[4000])
    lines[4000] = json.dumps(row | {"balance/imbalance_planned": 9.0})
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    path, page = write(folder)
    figures = page["runs"][0]["figures"]
    planned = figures["imbalance"]["series"][1]
    assert len(figures["imbalance"]["x"]) <= reduce.MOST_POINTS
    assert max(planned["high"]) == 9.0 > 2 > max(planned["y"])
    assert path.stat().st_size < 1_000_000
    if browser is None:
        return
    opened = browser.open(path.as_uri())
    assert opened.evaluate("steps.at(-1)") == 10_000
    assert opened.complaints() == []


ALONG_STEPS = ("loss", "speed", "imbalance", "gradient", "rate", "balance", "z_loss")


def rows_of(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "train/loss" in row]


@pytest.mark.parametrize("steps", [20, 1000])
def test_every_number_is_that_of_the_metrics(
    steps: int, tmp_path: Path, browser: Browser | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """On the page, its cards and legends, in a comparison, in run.png and on the terminal; curves do not lag."""
    folder = made_run.write(tmp_path / "falls", steps=steps)
    rows = rows_of(folder)
    by_step = {row["step"]: row for row in rows}
    path, page = write(folder, made_run.write(tmp_path / "other", steps=steps, seed=1))
    shown, beside = page["runs"][0]["figures"], page["compare"]["figures"]
    metrics = {"all": "train/lm_loss", **{name: f"train/{name}/loss" for name in made_run.DOMAINS}}
    metrics |= {"grad norm": "train/grad_norm", "learning rate": "train/lr"}
    metrics |= {"balance loss": "train/balance_loss", "z-loss": "train/z_loss"}
    metrics |= {"tokens/s": "perf/tokens_per_second", "at home": "balance/imbalance_home"}
    drawn = [(shown[name]["x"], line) for name in ALONG_STEPS for line in shown[name]["series"]]
    compared = {"loss": "all", "speed": "tokens/s"}
    drawn += [(line["x"], {**line, "name": compared[name]}) for name in compared for line in beside[name]["series"][:1]]
    for x, line in drawn:
        if (metric := metrics.get(line["name"])) is None:
            continue
        values = [by_step[step].get(metric) for step in x]
        assert line["raw"] == [None if v is None else pytest.approx(v, rel=1e-4) for v in values], line["name"]
        known = [row[metric] for row in rows if metric in row]
        if values[-1] is not None:
            assert line["y"][-1] == pytest.approx(known[-1], rel=1e-4), line["name"]
        for low, y, high in zip(line.get("low", []), line["y"], line.get("high", []), strict="low" in line):
            assert low * 0.9999 <= y <= high * 1.0001
    cards = {card["name"]: card for card in page["runs"][0]["cards"]}
    assert cards["Training loss"]["value"] == f"{rows[-1]['train/lm_loss']:.3f}"
    assert cards["Training loss"]["note"] == f"at the last step, from {rows[0]['train/lm_loss']:.3f}"
    column = [column["text"] for column in page["compare"]["table"]["columns"]].index("Training loss")
    assert page["compare"]["table"]["rows"][0]["cells"][column]["text"] == cards["Training loss"]["value"]

    from matplotlib import pyplot as plt

    kept: list = []
    monkeypatch.setattr(plt, "close", kept.append)
    picture.draw(folder)
    monkeypatch.undo()
    smoothed, raw = kept[0].axes[0].lines[-2:]
    assert raw.get_ydata().tolist() == [row["train/lm_loss"] for row in rows]
    assert smoothed.get_ydata()[[0, -1]].tolist() == [rows[0]["train/lm_loss"], rows[-1]["train/lm_loss"]]
    plt.close(kept[0])
    Plain(steps).log(steps, rows[-1])
    assert f"loss {rows[-1]['train/lm_loss']:.3f} " in capsys.readouterr().out
    if browser is None:
        return
    opened = browser.open(path.as_uri())
    cells = "[...document.querySelectorAll('[data-figure=loss] .legend button')]"
    said = f"{cells}.map(b => [b.childNodes[1].textContent, b.querySelector('b').textContent])"
    x = page["runs"][0]["figures"]["loss"]["x"]
    for step in (x[-1], x[7]):
        opened.evaluate(f"view.look({step})")
        for name, text in opened.evaluate(said):
            value = by_step[step].get(metrics[name])
            assert text == "–" if value is None else float(text) == pytest.approx(value, rel=5e-3), name


def cards_by_hand(folder: Path) -> dict[str, tuple[str, str, str]]:
    """{card: (value, unit, note)}, worked out from the files alone."""
    rows, config = rows_of(folder), json.loads((folder / "config.yaml").read_text())
    last = rows[-max(10, len(rows) // 10) :]
    column = lambda name, among: [row[name] for row in among if name in row]  # noqa: E731
    mean = lambda name: float(np.mean(column(name, last)))  # noqa: E731
    spent = 1e3 * (mean("perf/phase/lend") + mean("perf/phase/backward_lend"))
    saved, losses = mean("balance/saved_seconds"), column("train/lm_loss", rows)
    home, planned = mean("balance/imbalance_home"), mean("balance/imbalance_planned")
    layers = [f"balance/layer_{n:02d}/load" for n in range(config["model"]["num_layers"])]
    used = sum(int(np.any(column(name, last), axis=0).sum()) for name in layers)
    evaluated = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    bits = [row["eval/bits_per_byte"] for row in evaluated if "eval/bits_per_byte" in row][-1]
    bigram = json.loads((folder / "summary.json").read_text())["bigram_bits_per_byte"]["all"]
    speed = np.median(column("perf/tokens_per_second", rows))
    expected = json.loads((folder / "prediction.json").read_text())
    tokens, gib = f"{expected['tokens_per_second']:,.0f}", f"{expected['memory_bytes'] / 2**30:.2f}"
    memory = f"{max(np.mean(column('perf/memory_gib', last), axis=0)):.2f}"
    every, wanted = config["train"].get("log_every", 1), config["train"]["steps"]
    share, experts = saved / mean("perf/step_seconds"), len(layers) * config["model"]["num_experts"]
    return {
        "Steps": (f"{rows[-1]['step']:,}", f"of {wanted:,}", f"{short(rows[-1]['train/tokens'])} tokens"),
        "Validation loss": (f"{bits:.3f}", "bits/byte", f"bigram model: {bigram:.3f}"),
        "Training loss": (f"{losses[-1]:.3f}", "nats/token", f"at the last step, from {losses[0]:.3f}"),
        "Throughput": (f"{speed:,.0f}", "tokens/s", f"median; MFU {mean('perf/mfu'):.1%}; predicted {tokens}"),
        "Device imbalance": (
            f"{home:.2f} → {planned:.2f}", "", "busiest device over the mean: experts at home → as planned"
        ),
        "Saved by the plan": (
            f"{1e3 * saved:.3g}", "ms/step", f"{share:.1%} of a step; lending took {spent:.3g} ms"
        ),
        "Rows moved": (
            f"{mean('balance/rows_moved_fraction'):.1%}", "",
            f"{mean('balance/guests'):.3g} guests/step" + f", estimated from every {every}th step" * (every > 1),
        ),
        "Experts in use": (
            str(used), f"of {experts}", f"selected in the last {len(last)} recorded steps"
        ),
        "Congestion coefficient γ̂": (f"{mean('balance/gamma_eff'):.3g}", "", "stabilization"),
        "Memory": (memory, "GiB", f"on the fullest rank; predicted {gib}"),
    }  # fmt: skip


def test_every_card_and_table_is_what_the_files_say(tmp_path: Path, browser: Browser | None) -> None:
    """On the page and in a comparison; also the fields that differ."""
    folders = [made_run.write(tmp_path / "one", steps=250, layers=3, ranks=4), made_run.write(tmp_path / "two", seed=1)]
    for folder, guests in zip(folders, (7, 2), strict=True):
        change(
            folder,
            lambda step, guests=guests: {"balance/guests": guests + step % 3, "perf/memory_gib": [1.0, step / 9]},
        )
    config = json.loads((folders[1] / "config.yaml").read_text())
    config["train"]["log_every"] = 10
    (folders[1] / "config.yaml").write_text(json.dumps(config))
    expected = [cards_by_hand(folder) for folder in folders]
    path, page = write(*folders)
    for run, cards_ in zip(page["runs"], expected, strict=True):
        assert {card["name"]: (card["value"], card["unit"], card["note"]) for card in run["cards"]} == cards_
    table = page["compare"]["table"]
    columns = [column["text"] for column in table["columns"]]
    assert columns == [*expected[0]]
    for row, cards_ in zip(table["rows"], expected, strict=True):
        cells = [f"{value} {unit}" if unit.startswith("of ") else value for value, unit, _ in cards_.values()]
        assert [cell["text"] for cell in row["cells"]] == cells
    differing = {row["field"]: row["values"] for row in page["compare"]["differences"]}
    assert differing == {"model.num_layers": ["3", "2"], "train.steps": ["250", "40"], "train.log_every": ["–", "10"]}
    if browser is None:
        return
    opened = browser.open(path.as_uri())
    text = "[...document.querySelectorAll('SELECTOR')].map((e) => e.textContent.replace(/\\s+/g, ' ').trim())"
    for number, cards_ in enumerate(expected):
        opened.evaluate(f"document.querySelectorAll('#runs button')[{number}].click()")
        shown = [f"{name}{value} {unit}".strip() + note for name, (value, unit, note) in cards_.items()]
        assert [found.replace(" ", "") for found in opened.evaluate(text.replace("SELECTOR", ".card"))] == [
            card.replace(" ", "") for card in shown
        ]
    shown = opened.evaluate(text.replace("SELECTOR", "#table tbody td"))
    assert shown == [text for row in table["rows"] for text in (row["name"], *(cell["text"] for cell in row["cells"]))]
    fields = opened.evaluate(text.replace("SELECTOR", "#differences tbody td"))
    assert fields == [text for field, values in differing.items() for text in (field, *values)]


def test_the_summary_on_the_terminal_is_that_of_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Sums over all steps are called estimates where not every step has a row."""
    for recorded, about in ((40, ""), (10, "about ")):
        folder = made_run.write(tmp_path / f"every_{recorded}", steps=40)
        change(folder, lambda step: {"balance/rows_moved": 100 + step})
        rows = rows_of(folder)[40 // recorded - 1 :: 40 // recorded]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = load_config(["model=tiny", "model.vocab_size=512", "train.steps=40", "train.dtype=fp32"])
        size, score = estimate(resolve_early(settings, 1)), Score(nats=120.0, tokens=40, num_bytes=80)
        found = summary.collect(folder, settings, size, {"all": score}, {"all": 2.5}, [])
        summary.show(found, RunLogger(None))
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        moved = round(float(np.mean([row["balance/rows_moved"] for row in rows])) * 40)
        home = np.mean([row["balance/imbalance_home"] for row in rows])
        speed = np.median([row["perf/tokens_per_second"] for row in rows])
        for text in (
            f"{short(size.total)}, {short(size.active)} active per token",
            f"{rows[-1]['train/tokens']:,} tokens in 40 steps, {speed:,.0f} tokens/s",
            f"{rows[0]['train/lm_loss']:.3f} → {rows[-1]['train/lm_loss']:.3f} nats/token",
            f"{home:.3f} at home → 1.020 planned",
            f"{about}120 guests (temporary replicas of experts) lent, {about}{moved:,} rows (token copies, 20.0%",
            f"all {120 / math.log(2) / 80:.3f} 2.500",
        ):
            assert text in shown, text
        assert ("estimated from 10 of 40 steps" in shown) == bool(about)


def test_a_line_through_a_slope_lies_on_it() -> None:
    """Neither late nor early, at either end; gaps are interpolated, and nothing is made up outside."""
    slope = np.arange(30.0)
    assert reduce.smooth(slope).tolist() == pytest.approx(slope.tolist())
    gaps = slope.copy()
    gaps[[0, 7, 8, 29]] = np.nan
    assert reduce.smooth(gaps)[5:10].tolist() == pytest.approx([5, 6, 7, 8, 9])
    assert np.isnan(reduce.smooth(gaps)[[0, 29]]).all()
    assert np.isnan(reduce.smooth(np.full(3, np.nan))).all()


def test_a_model_worse_than_a_bigram_is_said_first(full: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(full, tmp_path / "worse")
    summary = json.loads((folder / "summary.json").read_text())
    for bigram, level, text in (
        ({"all": 2.1}, "trouble", "The validation loss is higher than that of a bigram model: 2.200 against 2.1"),
        ({"all": 2.3, "cpp": 1.9}, "watch", "A bigram model has a lower validation loss on cpp."),
    ):
        (folder / "summary.json").write_text(json.dumps(summary | {"bigram_bits_per_byte": bigram}))
        found = build.data([open_run(str(folder))])["runs"][0]["findings"]
        first = next(finding for finding in found if finding["level"] == level)
        assert first["text"].startswith(text)


def test_exchanges_are_set_against_waiting_of_the_same_steps(full: Path, tmp_path: Path) -> None:
    """One sampled step of long exchanges and long waiting among short ones: no negative share."""
    folder = shutil.copytree(full, tmp_path / "sampled")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    phases = [f"perf/phase/{side}{name}" for side in ("", "backward_") for name in ("lend", "dispatch", "combine")]
    for row in rows:
        row.pop("perf/waited", None)
        row |= dict.fromkeys(phases, 0.001) if "train/loss" in row else {}
        if row["step"] == 35:
            row |= {"perf/waited": [0.09, 0.09], "perf/phase/combine": 0.15}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [finding["text"] for finding in build.data([open_run(str(folder))])["runs"][0]["findings"]]
    assert "A step takes 0.5 s, 13% of it in exchanges between ranks." in texts  # (0.15 + 5 × 0.001 - 0.09) / 0.5


def test_experts_in_use_are_those_of_the_rows_named(tmp_path: Path) -> None:
    folder = made_run.write(tmp_path / "used", steps=20)
    even = [0.125] * 8
    change(
        folder,
        lambda step: {
            "balance/layer_00/load": even,
            "balance/layer_01/load": even if step < 20 else [0.0, 0.0, *[1 / 6] * 6],
        },
    )
    texts = [finding["text"] for finding in build.data([open_run(str(folder))])["runs"][0]["findings"]]
    said = "Every expert of every layer was selected in the last 10 recorded steps"
    said += "; in the last one alone, 2 of 16 were not."
    assert said in texts
    shown = {card["name"]: card["note"] for card in build.data([open_run(str(folder))])["runs"][0]["cards"]}
    assert shown["Experts in use"] == "selected in the last 10 recorded steps"


def test_a_phase_is_that_of_the_last_row(full: Path, tmp_path: Path) -> None:
    """A resumed run begins to count anew: what it was in before is not what it is in."""
    folder = shutil.copytree(full, tmp_path / "resumed")
    notes = lambda: {card["name"]: card["note"] for card in cards(open_run(str(folder)))}  # noqa: E731
    assert notes()["Congestion coefficient γ̂"] == "stabilization"
    change(folder, lambda step: {"balance/gamma_phase": 1 if step < 30 else None})
    assert notes()["Congestion coefficient γ̂"] == "no phase: fewer than 20 recorded steps since the start"


def test_a_band_has_an_area_where_every_step_is_a_point(full: Path) -> None:
    home = FIGURES["imbalance"](open_run(str(full)))["series"][0]
    values = open_run(str(full)).metrics.numbers("balance/imbalance_home")
    assert len(home["y"]) == 40
    assert home["high"][20] == pytest.approx(values[18:23].max(), rel=1e-4)
    assert home["low"][0] == pytest.approx(values[:3].min(), rel=1e-4)


def test_nothing_evaluated_is_said_and_never_drawn_as_perfect(tmp_path: Path) -> None:
    folder = made_run.write(tmp_path / "nothing")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: None if re.match("eval/", k) else v for k, v in row.items()} for row in rows]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = open_run(str(folder))
    (card,) = (card for card in cards(run) if card["name"] == "Validation loss")
    assert (card["value"], card["note"]) == ("–", "nothing was evaluated")
    assert curves.held_out(run)["text"] == "nothing was evaluated: no text is held out"


def test_a_healthy_run_looks_pale_between_ranks(tmp_path: Path) -> None:
    run = open_run(str(made_run.write(tmp_path / "eight", ranks=8)))
    assert FIGURES["traffic"](run)["most"] == 4 / 8**2
    assert FIGURES["waited"](run)["most"] == 0.5 / 4  # of a step of half a second


def test_held_out_text_over_the_run_needs_two_evaluations(full: Path, tmp_path: Path) -> None:
    figure = FIGURES["held_out_steps"](open_run(str(full)))
    assert figure["x"] == [20, 40]
    assert [line["name"] for line in figure["series"]] == ["all", *made_run.DOMAINS]
    folder = _once_evaluated(full, tmp_path / "once")
    assert "fewer than two evaluations" in FIGURES["held_out_steps"](open_run(str(folder)))["text"]


def test_of_a_huge_file_of_metrics_every_nth_row_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations and the newest row are there; what is left out is said; memory is that of the rows kept."""
    folder = made_run.write(tmp_path / "huge", steps=400, layers=1)
    size = (folder / "metrics.jsonl").stat().st_size
    monkeypatch.setattr(read, "PARSED_BYTES", size // 3)
    run = open_run(str(folder))
    steps = [row["step"] for row in run.metrics.training]
    assert run.metrics.every == 4
    assert steps == list(range(4, 401, 4))
    assert [row["step"] for row in run.metrics.rows if "eval/loss" in row] == [200, 400]
    said = "metrics.jsonl is long, left out: of every 4 training rows all but one"
    assert any(text.startswith(said) for text in run.missing)
    assert [card["value"] for card in cards(run) if card["name"] == "Steps"] == ["400"]
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    for step in (401, 402):  # while it is live
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row | {"step": step}) + "\n")
        assert run.refresh()
        assert run.metrics.training[-1]["step"] == step
    monkeypatch.setattr(read, "READ_BYTES", size // 2)
    run = open_run(str(folder))
    assert 150 < run.metrics.training[0]["step"] < 260
    assert run.metrics.torn == 0
    assert any("all but its last" in text for text in run.missing)


def test_a_file_of_metrics_without_an_end_is_left(tmp_path: Path) -> None:
    """4 TiB of zeros, as a hole, before the rows of a run: the end is read, in pieces."""
    folder = made_run.write(tmp_path / "hole", steps=20, layers=1)
    rows = (folder / "metrics.jsonl").read_bytes()
    with (folder / "metrics.jsonl").open("wb") as file:
        file.truncate((4 << 40) - len(rows))
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + rows)
    tracemalloc.start()
    run = open_run(str(folder))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert run.metrics.training[-1]["step"] == 20
    assert run.metrics.torn > 0
    assert peak < 20 * read.LINE_BYTES


def _once_evaluated(full: Path, folder: Path) -> Path:
    shutil.copytree(full, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(line for line in lines if '"eval/loss"' not in line) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(next(line for line in lines if '"eval/loss"' in line) + "\n")
    return folder


def test_packed_loads_are_the_recorded_ones(full: Path) -> None:
    run = open_run(str(full))
    figure = FIGURES["load"](run)
    code = np.frombuffer(base64.b64decode(figure["cells"]), np.uint8).reshape(40, 2, 8).astype(float)
    _, recorded = run.metrics.lists("balance/layer_01/load")
    assert (code[:, 1, 1] == reduce.DEAD).all()
    others = [e for e in range(8) if e != 1]
    unpacked = 2 ** ((code[:, 1, others] - 127) / 16)
    np.testing.assert_allclose(
        unpacked, 8 * recorded[:, others], rtol=0.023
    )  # half a step of a sixteenth of a doubling


def _torn(folder: Path) -> str:
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: len(text) - 200])
    return "the last line of metrics.jsonl is cut off"


def _garbage(folder: Path) -> str:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            "not json\n[1, 2]\n" + json.dumps({"step": 99, "balance/layer_00/load": "?", "train/loss": None}) + "\n"
        )
    return "2 unreadable line(s)"


def _no_metrics(folder: Path) -> str:
    (folder / "metrics.jsonl").unlink()
    return "metrics.jsonl is not there"


def _nothing_but_steps(folder: Path) -> str:
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "train/loss": 3.0}) + "\n" for s in (1, 2)))
    (folder / "alerts.jsonl").write_text("{\n")
    return "alerts.jsonl has an unreadable line"


def _broken_trace(folder: Path) -> str:
    (folder / "load_trace" / "part_00000.npz").write_bytes(b"PK\x03\x04 no archive")
    return "load_trace/part_00000.npz cannot be read"


def _empty_trace(folder: Path) -> str:
    shutil.rmtree(folder / "load_trace")
    (folder / "load_trace").mkdir()
    return "the load trace is empty"


def _old_trace(folder: Path) -> str:
    """As the first versions wrote it: three arrays, no names."""
    for path in (folder / "load_trace").glob("*.npz"):
        with np.load(path) as file:
            part = {name: file[name] for name in ("step", "counts", "home", "planned")}
        np.savez_compressed(path, **part)
    (folder / "summary.json").unlink()
    return "summary.json is not there: the run has not ended"


def _odd_shapes(folder: Path) -> str:
    for path in (folder / "load_trace").glob("*.npz"):
        with np.load(path) as file:
            part = {name: file[name] for name in file.files}
        np.savez_compressed(path, **part | {"owner": part["owner"][..., :3], "limits": np.array([1, 2])})
    (folder / "summary.json").write_text('["no", "fields"]')
    return "summary.json does not hold fields"


def _broken_config(folder: Path) -> str:
    (folder / "config.yaml").write_text("model: [")
    (folder / "specialisation" / "step_40.json").write_text('{"domains": ["a"]}')
    return "config.yaml cannot be read"


def _odd_numbers(folder: Path) -> str:
    config = json.loads((folder / "config.yaml").read_text())
    config |= {"train": {"steps": "many"}, "router": {"name": "topk", "top_k": "two"}}
    (folder / "config.yaml").write_text(json.dumps(config))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": Infinity}\n')
    return "1 unreadable line(s)"


BREAKS = (
    _torn,
    _garbage,
    _no_metrics,
    _nothing_but_steps,
    _broken_trace,
    _empty_trace,
    _old_trace,
    _odd_shapes,
    _broken_config,
    _odd_numbers,
)


@pytest.mark.parametrize("spoil", BREAKS)
def test_a_broken_run_gives_a_report_that_says_so(
    spoil: Callable[[Path], str], full: Path, tmp_path: Path, browser: Browser | None
) -> None:
    folder = shutil.copytree(full, tmp_path / "broken")
    expected = spoil(folder)
    path, page = write(folder)
    assert any(expected in text for text in page["runs"][0]["missing"]), page["runs"][0]["missing"]
    if browser is None:
        return
    opened = browser.open(path.as_uri())
    assert expected in opened.evaluate("document.getElementById('missing').textContent")
    shown = (
        "[...document.querySelectorAll('[data-figure]')].filter(f => !f.hidden).every(f => f.querySelector('.plot *'))"
    )
    assert opened.evaluate(shown)
    opened.press("ArrowLeft")
    assert opened.complaints() == []


def test_the_command_line(full: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "page.html"
    assert cli.main(["report", str(full), "--out", str(out), "--png", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(out)
    assert found["runs"][0]["findings"][0]["level"] == "trouble"
    assert {Path(p).stem for p in found["pictures"]} >= {"loss", "load", "devices", "time", "domains"}
    assert all(Path(p).read_bytes().startswith(b"\x89PNG") for p in found["pictures"])
    assert cli.main(["report", str(full)]) == 0
    assert (full / "report.html").is_file()
    capsys.readouterr()
    for wrong, line in (
        ([str(tmp_path / "none")], "run="),
        ([str(full), "--out", str(tmp_path / "no" / "page.html")], "--out "),
        ([str(full), "--live", "--port", "99999"], "port=99999: must be a free port"),
        ([str(full), "--live", "--png", "--json"], "--live: cannot be combined with --png, --json"),
    ):
        assert cli.main(["report", *wrong]) == 2
        assert capsys.readouterr().err.startswith(f"error: {line}")


def test_pictures_of_a_run_evaluated_once(full: Path, tmp_path: Path) -> None:
    folder = _once_evaluated(full, tmp_path / "once")
    assert cli.main(["report", str(folder), "--png"]) == 0
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {*PICTURES}


def test_the_live_page_follows_its_run(
    full: Path,
    tmp_path: Path,
    browser: Browser | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folder = shutil.copytree(full, tmp_path / "going")
    with server([open_run(str(folder))], 0) as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        address = f"http://127.0.0.1:{serving.server_address[1]}"
        opened = browser.open(address + "/") if browser else None
        held = "document.querySelector('[data-figure=loss] .legend button[aria-pressed=false]')"
        if opened:
            opened.evaluate("document.querySelectorAll('[data-figure=loss] .legend button')[1].click()")
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) | {"step": 41}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n" + '{"step": 42, "half')
        fresh = json.loads(urllib.request.urlopen(address + "/data.json").read())
        assert fresh["runs"][0]["figures"]["loss"]["x"][-1] == 41
        if opened:
            opened.wait("document.getElementById('at').textContent === '41 of 41'")
            assert opened.evaluate(f"{held}?.textContent.startsWith('cpp') && {held} === document.activeElement")
            assert re.search(r"read at \d\d:\d\d$", opened.evaluate("document.getElementById('live').textContent"))
            assert opened.complaints() == []
        for wrong in (urllib.request.Request(address, headers={"Host": "elsewhere.example"}), address + "/etc/passwd"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(wrong)
            refused.value.close()
        with monkeypatch.context() as patch:
            patch.setattr(build, "cards", lambda run: {}["a card"])
            (folder / "summary.json").unlink()
            with pytest.raises(urllib.error.HTTPError, match="the run cannot be read: KeyError") as refused:
                urllib.request.urlopen(address + "/data.json")
            refused.value.close()
        assert "Traceback" not in capsys.readouterr().err
        with pytest.raises(ConfigError, match="must be a free port"):
            server([], serving.server_address[1])
        serving.shutdown()
        thread.join()
