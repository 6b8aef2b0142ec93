"""The report: what the page says of a run, what it does in a real browser, broken runs, the live page."""

import base64
import json
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moetrain import cli
from moetrain.config import ConfigError
from moetrain.observe import picture, reduce
from moetrain.observe.sinks.terminal import Plain
from moetrain.report import build, curves
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
    speed = [column["text"] for column in page["compare"]["table"]["columns"]].index("Speed")
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
    assert said["No token in the last steps: layer 01: expert 1."]["level"] == "trouble"
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
    assert said.pop("Wall time") == "1.5 min, of 2 of 3 starts; the others recorded no end"
    assert said.pop("Went on") == "after step 12, 20"
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
        assert opened.evaluate(titles.replace("NAME", name)) == ["went on after step 12", "went on after step 20"]
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
    assert "layer 00: experts 0, 1 take 95% of all selections: collapsed" in text
    assert "It is mostly device 2" in text
    assert "Ranks spend 45% of a step waiting for each other, 100% of that for rank 2" in text
    assert "The loss was not a number in 1 step(s), first 7" in text


def test_an_uneven_plan_says_why_it_may_be(full: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(full, tmp_path / "uneven")
    change(folder, lambda step: {"balance/imbalance_planned": 1.6})
    assert "1.60 as planned: moving more would not pay, or a limit stands in the way" in " ".join(findings(folder))
    config = json.loads((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(json.dumps(config | {"planner": {"name": "home"}}))
    assert "planner=home moves nothing; planner=makespan moves what pays off" in " ".join(findings(folder))


def test_lending_that_costs_more_than_it_saves_is_named(full: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(full, tmp_path / "dear")
    assert "plan" not in findings(folder).values()  # 40 ms for 40 ms
    change(folder, lambda step: {"perf/phase/backward_lend": 0.07})
    said = "Lending experts takes 100 ms of a step and saves 40 ms of computing."
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
        assert not any("above its lowest" in text for text in findings(folder))
    change(folder, lambda step: {"train/lm_loss": 4 + 0.1 * noise[step] + 0.01 * abs(step - 90)})
    assert "above its lowest, which it had in steps 81 to 100" in " ".join(findings(folder))


def test_findings_link_to_their_figures(tmp_path: Path) -> None:
    folder = made_run.write(tmp_path / "waits", steps=250)
    waits = {"perf/waited": [0.3, 0.3], "perf/waited_for": [0.0, 0.6]}
    change(folder, lambda step: waits | {"perf/memory_gib": [1.0, 0.01 * step]})
    for kind, section in (("dead_experts", "experts"), ("imbalance", "devices"), ("not_finite", "loss")):
        (folder / "alerts.jsonl").write_text(json.dumps({"step": 9, "kind": kind, "text": "so it was"}) + "\n")
        said = findings(folder)
        assert said["One alert during the run; the last at step 9: so it was."] == section
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
    metrics |= {"gradient norm": "train/grad_norm", "learning rate": "train/lr"}
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
        ({"all": 2.1}, "trouble", "On held-out text the model is worse than a bigram model: 2.200 bits a byte against"),
        ({"all": 2.3, "cpp": 1.9}, "watch", "A bigram model is better on held-out text of cpp."),
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
    assert "A step takes 0.5 s, 13% of it in exchanges." in texts  # (0.15 + 5 × 0.001 - 0.09) / 0.5


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
    said = "Every expert of every layer got a token in the last 10 rows; in the very last of them, 2 of 16 got none."
    assert said in texts
    shown = {card["name"]: card["note"] for card in build.data([open_run(str(folder))])["runs"][0]["cards"]}
    assert shown["Experts in use"] == "a token in the last 10 rows"


def test_a_phase_is_that_of_the_last_row(full: Path, tmp_path: Path) -> None:
    """A resumed run begins to count anew: what it was in before is not what it is in."""
    folder = shutil.copytree(full, tmp_path / "resumed")
    notes = lambda: {card["name"]: card["note"] for card in cards(open_run(str(folder)))}  # noqa: E731
    assert notes()["Congestion γ̂"] == "stabilisation"
    change(folder, lambda step: {"balance/gamma_phase": 1 if step < 30 else None})
    assert notes()["Congestion γ̂"] == "no phase: fewer than 20 rows since the start"


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
    (card,) = (card for card in cards(run) if card["name"] == "Held-out")
    assert (card["value"], card["note"]) == ("–", "nothing was evaluated")
    assert curves.held_out(run)["text"] == "nothing was evaluated: no byte of text is held out"


def test_a_healthy_run_looks_pale_between_ranks(tmp_path: Path) -> None:
    run = open_run(str(made_run.write(tmp_path / "eight", ranks=8)))
    assert FIGURES["traffic"](run)["most"] == 4 / 8**2
    assert FIGURES["waited"](run)["most"] == 0.5 / 4  # of a step of half a second


def test_held_out_text_over_the_run_needs_two_evaluations(full: Path, tmp_path: Path) -> None:
    figure = FIGURES["held_out_steps"](open_run(str(full)))
    assert figure["x"] == [20, 40]
    assert [line["name"] for line in figure["series"]] == ["all", *made_run.DOMAINS]
    folder = _once_evaluated(full, tmp_path / "once")
    assert "fewer than two held-out evaluations" in FIGURES["held_out_steps"](open_run(str(folder)))["text"]


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
