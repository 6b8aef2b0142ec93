"""What a run records: estimators against planted values and slow loops; one run whose files agree with each other."""

import gzip
import importlib.util
import json
import math
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from moetrain import cli, config
from moetrain.distributed.mesh import Mesh
from moetrain.moe import calibrate
from moetrain.moe.clock import Clock
from moetrain.moe.layer import LayerStats
from moetrain.moe.planning import default_home
from moetrain.moe.planning.cost import Limits, compute_seconds, default_costs
from moetrain.moe.planning.plan import Plan, imbalance
from moetrain.moe.routing import Choice, Scores
from moetrain.observe import recorder
from moetrain.observe.collect import congestion, health, meter, specialization, trace
from moetrain.observe.collect.alerts import Alert, Alerts
from moetrain.observe.sinks.files import JsonLines
from moetrain.observe.sinks.terminal import View
from moetrain.observe.sinks.tracker import Tracker
from moetrain.observe.sinks.wandb import MOST_BINS, _bins, heat_map
from moetrain.training.loop import train
from tests.conftest import TINY
from tests.observe.test_metrics import find_metric


def equilibrium(quality_E: np.ndarray, gamma: float) -> np.ndarray:
    """m with m_k ∝ exp(q_k - γ m_k), by damped iteration."""
    load_E = np.full(len(quality_E), 1 / len(quality_E))
    for _ in range(5000):
        new_E = np.exp(quality_E - gamma * load_E)
        load_E = 0.9 * load_E + 0.1 * new_E / new_E.sum()
    return load_E


@pytest.mark.parametrize("gamma", [0, 9, 14, 27, 39])
def test_gamma_is_what_was_planted(gamma: float) -> None:
    rng = np.random.default_rng(gamma)
    quality_E = rng.normal(0, 0.5, 64)
    load_E = equilibrium(quality_E, gamma)
    assert congestion.gamma_eff(load_E * 1e6, quality_E + 3) == pytest.approx(gamma, abs=1e-6)
    drawn_E = rng.multinomial(2_000_000, load_E)
    assert congestion.gamma_eff(drawn_E, quality_E) == pytest.approx(gamma, abs=1.5)


def test_gamma_is_not_known_without_differences() -> None:
    assert math.isnan(congestion.gamma_eff(np.full(8, 5), np.zeros(8)))
    assert math.isnan(congestion.gamma_eff(np.array([3, 7, 0, 0]), np.zeros(4)))
    assert math.isnan(congestion.gamma_eff(np.zeros(4), np.zeros(4)))


def test_phases_follow_a_planted_course() -> None:
    """The paper's course of OLMoE: 14 to 39, then even, then 27 to 9; with two per cent of noise, and a gap."""
    course = np.concatenate([np.linspace(14, 39, 80), np.full(120, 39), np.linspace(39, 9, 120)])
    course *= np.random.default_rng(0).normal(1, 0.02, len(course))
    found = congestion.phases([*course[:100].tolist(), None, *course[100:].tolist()])
    assert found[:20] == [None] * 20
    assert set(found[30:75]) == {congestion.SURGE}
    assert set(found[130:200]) == {congestion.STABILISATION}
    assert set(found[240:]) == {congestion.RELAXATION}


def test_the_window_holds_the_last_steps() -> None:
    steps = [torch.randint(0, 9, (6,)) for _ in range(9)]
    window = health.Window(4)
    for number, step in enumerate(steps):
        window.add(step)
        assert torch.equal(window.counts_N, torch.stack(steps[max(0, number - 3) : number + 1]).sum(0))


def test_a_layers_health_by_hand() -> None:
    counts_E, window_E = np.array([60, 20, 20, 0]), np.array([80, 1, 19, 0])
    layer = health.layer_metrics(counts_E, window_E, np.array([1.0, 0.0, 0.0, -9.0]))
    found = {name.removeprefix("balance/layer_LL/"): value for name, value in layer.items()}
    assert found["max_vio"] == pytest.approx(1.4)
    assert found["load_entropy"] == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.2)) / math.log(4))
    assert (found["dead_experts"], found["dead_experts_window"], found["starving_experts"]) == (1, 1, 1)
    assert found["load"] == [0.6, 0.2, 0.2, 0]
    assert found["gamma_eff"] == pytest.approx((1 - math.log(3)) / 0.4)


def test_router_sums_are_those_of_the_logits() -> None:
    logits = [torch.randn(5, 4), torch.randn(5, 6)]
    none = torch.empty(0)
    stats = [LayerStats(Scores(x, x), Choice(none, none), none, none, None, 0, None) for x in logits]  # type: ignore[arg-type]
    sums = health.RouterSums.collect(stats)
    assert sums.logits_N.tolist() == pytest.approx([x for layer in logits for x in layer.sum(0).tolist()])
    for layer, norm in enumerate(sums.norm_L.tolist()):
        assert norm == pytest.approx(sum(math.sqrt(sum(x * x for x in row)) for row in logits[layer].tolist()))


def test_plans_side_by_side_are_those_plans() -> None:
    """Layers of 3 and 5 experts on two ranks, random plans, one of them without a row: against the slow loop."""
    rng = np.random.default_rng(0)
    plans = []
    for experts, most in ((3, 9), (5, 9), (5, 1)):
        counts, home = rng.integers(0, most, (2, experts)), default_home(experts, 2)
        there = [(e, int(rng.integers(0, counts[:, e].sum() + 1))) for e in range(experts)]
        chunks = [c for e, n in there for c in ((e, 0, n), (e, 1, int(counts[:, e].sum()) - n))]
        plans.append(Plan.from_chunks(counts, home, chunks))
    found = meter.Plans.collect(plans)
    for number, plan in enumerate(plans):
        assert found.home_SR[number].tolist() == plan.home_loads().tolist()
        assert found.planned_SR[number].tolist() == plan.loads().tolist()
        for rank in range(2):
            assert found.max_vio_S(rank)[number] == pytest.approx(health.max_vio(plan.counts[rank]))
    home, planned, guests, moved = found.facts()
    assert home == pytest.approx(sum(imbalance(plan.home_loads()) for plan in plans))
    assert planned == pytest.approx(sum(imbalance(plan.loads()) for plan in plans))
    assert guests == sum(len(plan.guests()) for plan in plans) > 0
    assert moved == sum(plan.moved() for plan in plans) > 0
    costs, saved = default_costs(), 0.0
    for plan in plans:
        for sign, loads, held in (
            (1, plan.home_loads(), [{e for e in plan.expert if plan.home[e] == r} for r in range(2)]),
            (-1, plan.loads(), [set(plan.expert[plan.rank == r]) for r in range(2)]),
        ):
            row, segment = (
                2 * costs.row_forward + costs.row_backward,
                2 * costs.segment_forward + costs.segment_backward,
            )
            saved += sign * max(n * row + len(experts) * segment for n, experts in zip(loads, held, strict=True))
    assert found.saved_seconds(costs, 2) == pytest.approx(saved)
    assert sum(meter._leaving(plans[0], r) for r in range(2)) == plans[0].crossing()


def test_waiting_is_put_down_to_whoever_came_last() -> None:
    """Two groups of two ranks, three exchanges."""
    waits = np.array([[3.0, 1.0, 0.5, 0.5], [1.0, 2.0, 4.0, 1.0], [5.0, 1.0, 1.0, 1.5]])
    expected = [[0, 6, 0, 0], [1, 0, 0, 0], [0, 0, 0, 3], [0, 0, 0.5, 0]]
    assert meter.waited(waits, 2).tolist() == expected


def test_the_clock_tells_forward_and_backward_apart() -> None:
    clock = Clock(torch.device("cpu"))
    with clock.phase("experts"), clock.phase("wait_combine"):
        pass
    clock.stop()
    with clock.phase("experts"), clock.backward("experts"):
        pass
    found = clock.seconds()
    assert found.keys() == {"experts", "wait_combine", "backward_experts"}
    assert found["wait_combine"] <= found["experts"]


def test_information_of_experts_adds_up_to_that_of_the_layer() -> None:
    counts_CE = np.random.default_rng(0).integers(0, 50, (3, 5)).astype(float)
    counts_CE[:, 4] = 0
    slow = 0.0
    joint = counts_CE / counts_CE.sum(1, keepdims=True) / 3
    for c in range(3):
        for e in range(4):
            if joint[c, e]:
                slow += joint[c, e] * math.log2(joint[c, e] / joint[c].sum() / joint[:, e].sum())
    assert specialization.domain_information(counts_CE) == pytest.approx(slow)
    assert specialization.expert_information(np.eye(4)).tolist() == pytest.approx([2.0] * 4)
    assert specialization.domain_information(np.ones((4, 4))) == pytest.approx(0)


def test_alerts_are_said_once_and_again_when_worse() -> None:
    alerts = Alerts(bound=1.5, window=10, first_step=100)

    def row(step: int, dead: int, planned: float) -> list[str]:
        metrics = {"balance/layer_03/dead_experts_window": dead, "balance/imbalance_planned": planned}
        return [a.kind for a in alerts.check(step, {**metrics, "balance/imbalance_home": 2.0})]

    assert row(105, 1, 1.4) == []  # the window is not full
    assert row(110, 1, 1.4) == ["dead_experts"]
    assert row(111, 1, 1.6) == ["imbalance"]
    assert row(112, 2, 1.4) == ["dead_experts"]
    assert row(113, 2, 1.6) == []  # it never was halfway down
    assert row(114, 1, 1.2) == []
    assert row(115, 2, 1.6) == ["dead_experts", "imbalance"]
    assert alerts.check(116, {"eval/loss": 1.0}) == []


def test_lines_survive_nan_and_resuming(tmp_path: Path) -> None:
    tracker = Tracker([JsonLines(tmp_path, 0)])
    tracker.log(1, {"a": 1.0, "b": float("nan")})
    tracker.log(2, {"a": 2.0})
    with pytest.raises(FloatingPointError), tracker:
        raise FloatingPointError("the gradient norm is nan")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "a": 1.0, "b": None}, {"step": 2, "a": 2.0}]
    (alert,) = [json.loads(line) for line in (tmp_path / "alerts.jsonl").read_text().splitlines()]
    assert alert == {"step": 3, "kind": "not_finite", "text": "the gradient norm is nan"}
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "a"')
    JsonLines(tmp_path, 1).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:1]
    assert (tmp_path / "alerts.jsonl").read_text() == ""


def sample(ranks: int, layers: int, experts: int) -> tuple[list[Any], meter.Reading]:
    rng = np.random.default_rng(0)
    home = default_home(experts, ranks)
    plans = []
    for _ in range(layers):
        counts = rng.integers(1, 9, (ranks, experts))
        chunks = [(e, int(home[e]), int(counts[:, e].sum())) for e in range(experts)]
        plans.append(Plan.from_chunks(counts, home, chunks))
    stats = [LayerStats(None, None, None, None, plan, 0, None) for plan in plans]  # type: ignore[arg-type]
    some = [rng.random(experts) for _ in plans]
    seconds = np.zeros((ranks, len(meter.ALL_PHASES)))
    return stats, meter.Reading({}, some, some, seconds, np.ones((1, ranks)), np.ones(ranks))


def test_a_trace_is_read_whatever_happened_to_it(tmp_path: Path) -> None:
    """Two samples at two ranks, resumed at four after the first, a part that is torn and one that is foreign."""
    assert trace.read(tmp_path)["counts"].shape == (0, 0, 0, 0)
    folder = tmp_path / "load_trace"
    first = trace.LoadTrace(folder, 10, 0, ["layer_00"], 2, Limits(rows=None, guests=3))
    assert [step for step in range(1, 25) if first.takes(step)] == [1, 10, 20]
    for step in (1, 10):
        first.record(step, *sample(2, 1, 4))
    first.flush()
    second = trace.LoadTrace(folder, 10, 5, ["layer_00"], 4, Limits(rows=40, guests=3), lends=2)
    second.record(10, *sample(4, 1, 8))
    second.flush()
    (folder / "part_00007.npz").write_bytes(b"PK torn")
    np.savez(folder / "part_00008.npz", step=np.array([30]))
    found = trace.read(tmp_path)
    assert found["step"].tolist() == [1, 10]
    assert found["counts"].shape == (2, 1, 4, 8)
    assert found["owner"][0, 0].tolist() == [0, 0, 1, 1, -1, -1, -1, -1]
    assert (found["placed"].sum((2, 3)) == found["counts"].sum((2, 3))).all()
    assert found["counts"][0, 0, 2:].sum() == 0
    assert found["layers"].tolist() == ["layer_00"]
    assert [part["limits"].tolist() for part in trace.read_parts(tmp_path)] == [[-1, 3], [40, 3]]
    assert found["lends"].tolist() == [2]


def test_heat_maps_and_bins() -> None:
    picture = heat_map([np.array([0.25] * 4), np.array([1.0, 0.0])])
    assert picture.shape == (24, 48, 3)
    assert picture[0, 0].tolist() == [245, 245, 240]  # even
    assert picture[12, 0].tolist() == [190, 40, 30]  # twice an even share
    assert picture[12, 12].tolist() == [33, 70, 140]  # nothing
    assert picture[12, 36].tolist() == [255, 255, 255]  # no such expert
    many = np.arange(1300.0)
    assert len(_bins(many)) <= MOST_BINS
    assert _bins(many).sum() == many.sum()


ROW = {
    "train/lm_loss": 3.25, "train/balance_loss": 1.02, "train/z_loss": 4.0, "train/grad_norm": 0.5,
    "perf/tokens_per_second": 12345.0, "perf/step_seconds": 0.5, "perf/memory_gib": [1.0, 2.5],
    "balance/dead_experts": 3, "balance/starving_experts": 1, "balance/guests": 6.0,
    "balance/rows_moved_fraction": 0.125, "balance/imbalance_home": 1.5, "balance/imbalance_planned": 1.0,
    "balance/device_load_home": [300.0, 100.0], "balance/device_load_planned": [200.0, 200.0],
    "balance/layer_00/load": [0.75, 0.25], "balance/layer_01/load": [0.5, 0.5],
}  # fmt: skip


def test_the_live_view_shows_devices_and_hot_experts() -> None:
    out = StringIO()
    view = View(0, 200, Console(file=out, force_terminal=True, width=110, color_system=None))
    view.log(10, ROW)
    view.log(10, {"eval/loss": 3.5, "eval/bits_per_byte": 2.125})
    view.alert(11, Alert("imbalance", "devices uneven"))
    view.log(200, ROW)
    view.close()
    shown = out.getvalue()
    for expected in (
        "step 10/200", "to go", "3.250", "12,345 tokens/s", "2.50 GiB", "3 dead", "1 starving",
        "1.50 at home → 1.00 as planned, busiest device over the mean, mean over layers",
        "1.50  ", "0.50  ", "1.00", "layer 00 expert 0 1.5×", "balance 1.02 · z 4.00", "step 11: devices uneven",
        "validation  2.125 bits/byte at step 10", "step   200/200 · loss 3.250",
    ):  # fmt: skip
        assert expected in shown, expected
    many = {**ROW, "balance/device_load_home": [1.0] * 63 + [9.0], "balance/device_load_planned": [1.125] * 64}
    view.log(200, many)
    assert view._render() is not None


def test_the_live_view_cuts_nothing_at_80_columns() -> None:
    """Large numbers, long waits, many devices: every word is there, on as many lines as it takes."""
    shown = {}
    for width in (80, 400):
        out = StringIO()
        view = View(0, 1_000_000, Console(file=out, force_terminal=True, width=width, color_system=None))
        view.log(99_999, {"eval/bits_per_byte": 2.125})
        many = {"balance/device_load_home": [1.0] * 63 + [9e5], "balance/device_load_planned": [1.125] * 64}
        view.log(100_000, {**ROW, **many, "train/grad_norm": 12345.678, "perf/step_seconds": 123.45})
        text = re.sub("\x1b\\[[^a-zA-Z]*[a-zA-Z]", "", out.getvalue())
        shown[width] = sorted(re.sub("[█·━╸╺]+", " ", text).split())
        view.close()
        assert "…" not in text
        assert all(len(line) <= width for line in text.replace("\r", "\n").splitlines())
    assert shown[80] == shown[400]


def run(mesh: Mesh, overrides: list[str]) -> str:
    return str(train(config.load(overrides), mesh))


@pytest.fixture(scope="module")
def recorded(pool: Any, data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven steps on two ranks; rows of every other one, samples of every third."""
    more = [
        *TINY,
        *data,
        f"run.dir={tmp_path_factory.mktemp('recorded')}",
        "run.name=seven",
        "eval.tokens_per_domain=256",
    ]
    more += ["train.steps=7", "train.log_every=2", "track.trace_every=3", "track.window=3", "router.skew=0.1"]
    more += ["planner=llep", "planner.min_rows=1", "generate.tokens=4", "track.tensorboard=true"]
    more += ["track.profile_from=4", "track.profile_steps=2", "balance.z_coefficient=1e-3"]
    return Path(pool.run(run, 2, more)[0])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_and_samples_come_when_they_should(recorded: Path) -> None:
    rows = rows_of(recorded)
    assert [row["step"] for row in rows] == [2, 4, 6, 7, 7]
    assert {name for row in rows for name in row if find_metric(name) is None} == {"step"}
    assert trace.read(recorded)["step"].tolist() == [1, 3, 6]
    assert ["perf/waited" in row for row in rows] == [False, False, True, False, False]
    assert len(rows[2]["perf/memory_gib"]) == 2
    for row in rows[:4]:
        assert row["perf/time/forward"] > row["perf/phase/experts"] > 0
        assert row["perf/time/backward"] > row["perf/phase/backward_experts"] > 0
    assert rows[1]["perf/time/record"] > 0


def test_the_trace_agrees_with_the_metrics(recorded: Path) -> None:
    """Step 6, of one micro-step: every number of the row that can be worked out from the sample is."""
    (row,) = [r for r in rows_of(recorded) if r["step"] == 6]
    found = trace.read(recorded)
    s = {name: array[2] for name, array in found.items() if name not in trace.NAMES}
    assert (s["counts"].sum(1) == s["placed"].sum(1)).all()
    assert (s["traffic"].sum(1) == s["placed"].sum(2)).all()
    assert (s["traffic"].sum(2) == s["counts"].sum(2)).all()
    assert (s["planned"] == s["placed"].sum(2)).all()
    away = s["owner"][:, None, :] != np.arange(2)[:, None]
    assert row["balance/guests"] == ((s["placed"] > 0) & away).sum() > 0
    assert row["balance/rows_moved"] == (s["placed"] * away).sum()
    assert row["balance/device_load_planned"] == s["planned"].sum(0).tolist()
    costs = calibrate.from_json((recorded / "costs.json").read_text())
    saved = 0.0
    for layer in range(2):
        segments = (s["counts"][layer].sum(0) > 0).reshape(2, 4).sum(1)
        home = compute_seconds(s["home"][layer], segments, costs)
        saved += home - compute_seconds(s["planned"][layer], (s["placed"][layer] > 0).sum(1), costs)
    assert row["balance/saved_seconds"] == pytest.approx(saved)
    assert row["perf/waited"] == pytest.approx(s["waited"].sum(1).tolist(), rel=1e-4)
    assert row["perf/waited_for"] == pytest.approx(s["waited"].sum(0).tolist(), rel=1e-4)
    assert (s["waited"].diagonal() == 0).all()
    for index, name in enumerate(found["phases"].tolist()):
        group = "time" if name in meter.TIMES else "phase"
        assert row[f"perf/{group}/{name}"] == pytest.approx(s["seconds"][:, index].mean(), rel=1e-4)
    spent = s["seconds"][
        0, : len(meter.TIMES)
    ].sum()  # on rank 0, whose time is the step's; others wait for it to record
    assert 0.8 * row["perf/step_seconds"] < spent <= row["perf/step_seconds"]
    for layer, name in enumerate(found["layers"].tolist()):
        gamma = congestion.gamma_eff(s["selected"][layer].astype(float), s["quality"][layer])
        assert row[f"balance/{name}/gamma_eff"] == pytest.approx(gamma, rel=1e-3)
        vio = np.mean([health.max_vio(counts) for counts in s["counts"][layer]])
        assert row[f"balance/{name}/max_vio_micro"] == pytest.approx(vio)
        share_E = s["selected"][layer] / s["selected"][layer].sum()
        assert row[f"balance/{name}/load"] == pytest.approx(share_E.tolist(), abs=1e-7)
    assert row["train/z_loss"] == pytest.approx(np.mean([row[f"balance/layer_0{i}/z"] for i in range(2)]))
    assert row["balance/crossing_bytes"] <= 4 * 64 * (s["traffic"].sum() - s["traffic"].trace(axis1=1, axis2=2).sum())


def test_a_replay_gives_back_the_recorded_plans(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "plan", "--trace", str(recorded), "--json"]) == 0
    found = {record["planner"]: record for record in json.loads(capsys.readouterr().out)}
    for key in ("imbalance", "imbalance_worst", "guests", "rows_crossing_fraction"):
        assert found["llep"][key] == found["as recorded"][key], key
    assert found["home"]["guests"] == found["home"]["saved_percent"] == 0
    assert found["makespan"]["predicted_ms"] <= min(found[name]["predicted_ms"] for name in ("home", "llep"))
    assert cli.main(["bench", "plan", "--trace", str(recorded)]) == 0
    assert "as recorded" in capsys.readouterr().out


def test_a_replay_without_a_trace_is_one_line(recorded: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "config.yaml").write_text((recorded / "config.yaml").read_text())
    assert cli.main(["bench", "plan", "--trace", str(tmp_path)]) == 2
    assert f"error: --trace {tmp_path}: has no load trace" in capfd.readouterr().err.replace("\n", " ")


def test_specialisation_counts_held_out_text(recorded: Path) -> None:
    found = json.loads((recorded / "specialisation" / "step_7.json").read_text())
    last = rows_of(recorded)[-1]
    assert found["domains"] == ["greek", "numbers"]
    for layer in found["layers"]:
        assert [sum(row) for row in layer["counts"]] == [512, 512]  # 256 tokens, top-2
        assert layer["domain_mi"] == last[f"specialise/{layer['name']}/domain_mi"]
        assert 0 < len(layer["experts"]) <= specialization.EXPERTS
        best = layer["experts"][0]
        column = np.array(layer["counts"])[:, best["expert"]]
        assert best["share"] == pytest.approx(column.max() / column.sum())
        assert best["domain"] == found["domains"][column.argmax()]
        assert all(token["lift"] > 1 and token["count"] >= specialization.SEEN for token in best["tokens"])


def test_the_profiler_window_is_a_chrome_trace(recorded: Path) -> None:
    with gzip.open(recorded / "profile" / "rank_0_steps_4_5.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert any(name and "AdamW" in name for name in names)


def test_tensorboard_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.config.rules.find_spec", lambda _: None)
    with pytest.raises(config.ConfigError) as caught:
        config.load(["track.tensorboard=true"])
    line = "track.tensorboard=True: needs the package tensorboard: pip install 'moetrain[tensorboard]'"
    assert str(caught.value) == line


def test_wandb_that_is_not_installed_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is on by default: a run goes on without it, and its metrics are in files."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    opened = recorder.sinks(config.load(["model=tiny"]), tmp_path, 0)
    assert [type(sink).__name__ for sink in opened] == ["JsonLines", "Plain"]
    said = "wandb is not installed: nothing goes there; track.wandb=false leaves this line out\n"
    assert capsys.readouterr().out == said
    for sink in opened:
        sink.close()


def test_tensorboards_own_reader_has_the_metrics(recorded: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(recorded / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    rows = [row for row in rows_of(recorded) if "train/loss" in row]
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(row["step"], pytest.approx(row["train/loss"])) for row in rows]
    (load, *_) = events.Histograms("balance/layer_00/load")
    assert list(load.histogram_value.bucket) == pytest.approx(rows[0]["balance/layer_00/load"])
