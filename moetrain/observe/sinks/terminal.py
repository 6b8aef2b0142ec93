"""The terminal while a run goes: one calm view that stays in its place; plain lines where the output is no terminal."""

import math
import threading
import time
from contextlib import ExitStack
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moetrain.common.console import console
from moetrain.launch import signals
from moetrain.observe.collect.alerts import Alert
from moetrain.observe.metrics import (
    BALANCE_LOSS,
    BITS_PER_BYTE,
    DEAD_EXPERTS,
    DEVICE_LOAD_HOME,
    DEVICE_LOAD_PLANNED,
    GRAD_NORM,
    GUESTS,
    IMBALANCE_HOME,
    IMBALANCE_PLANNED,
    LM_LOSS,
    MEMORY_GIB,
    METRICS,
    ROWS_MOVED_FRACTION,
    STARVING_EXPERTS,
    STEP_SECONDS,
    TOKENS_PER_SECOND,
    Z_LOSS,
)
from moetrain.observe.sinks.tracker import Metrics

LINES = 20  # that a run has where the output is no terminal, about
DEVICES, HOTTEST = 8, 3  # shown
BAR = 26  # characters of a device's bar
CALM = 0.5  # seconds at least between two looks of the view
SMOOTH = 0.1  # weight of a new row in the speed that the time to go is worked out from


class Plain:
    """Some twenty lines in all, and every alert."""

    def __init__(self, steps: int, out: Console = console) -> None:
        self._every, self._steps, self._console = max(1, steps // LINES), steps, out

    def log(self, step: int, metrics: Metrics) -> None:
        if LM_LOSS in metrics and (step % self._every == 0 or step in (1, self._steps)):
            self._console.print(f"step {step:>5}/{self._steps} · {_line(metrics)}")

    def alert(self, step: int, alert: Alert) -> None:
        self._console.print(_alert(step, alert))

    def close(self) -> None:
        pass


class View:
    """Progress and time to go, losses, speed, memory; the devices' load at home and as planned; the hottest experts."""

    def __init__(self, first_step: int, steps: int, out: Console = console) -> None:
        self._steps, self._step, self._began = steps, first_step, time.monotonic()
        self._pace: float | None = None  # seconds a step, smoothed
        self._row: dict[str, Any] = {}
        self._held_out = ""
        self._shown = -math.inf
        self._live = Live(console=out, auto_refresh=False, transient=True, get_renderable=self._render)
        self._console = out
        self._lock = threading.RLock()  # a request to end comes in a thread of its own
        self._stack = ExitStack()
        self._stack.enter_context(signals.on_request(self.interrupt))
        self._live.start()

    def log(self, step: int, metrics: Metrics) -> None:
        if BITS_PER_BYTE in metrics:
            bits = metrics[BITS_PER_BYTE]
            known = bits is not None and math.isfinite(bits)
            self._held_out = (
                f"[bold]{bits:.3f}[/bold] {METRICS[BITS_PER_BYTE].unit} at step {step}"
                if known
                else "no text is held out"
            )
        if LM_LOSS not in metrics:
            return
        if step > self._step:
            now = time.monotonic()
            pace = (now - self._began) / (step - self._step)
            self._pace = pace if self._pace is None else self._pace + SMOOTH * (pace - self._pace)
            self._began = now
        with self._lock:
            self._row, self._step = dict(metrics), step
            if self._live.is_started and (time.monotonic() - self._shown >= CALM or step == self._steps):
                self._live.refresh()
                self._shown = time.monotonic()

    def alert(self, step: int, alert: Alert) -> None:
        with self._lock:
            self._console.print(_alert(step, alert))

    def interrupt(self) -> None:
        """Take the view off the terminal and say that the run ends; nothing is drawn from then on."""
        with self._lock:
            self._live.stop()
            self._console.print(signals.NOTED)

    def close(self) -> None:
        """Take the view off the terminal; its last line stays."""
        self._stack.close()
        with self._lock:
            self._live.stop()
            if self._row:
                self._console.print(f"step {self._step:>5}/{self._steps} · {_line(self._row)}")

    def _render(self) -> RenderableType:
        progress = Table.grid(padding=(0, 2))
        left = "" if self._pace is None else f"{_clock(self._pace * (self._steps - self._step))} to go"
        bar = ProgressBar(total=self._steps, completed=self._step, width=BAR)
        progress.add_row(Text("training", "bold"), bar, f"step {self._step}/{self._steps}", Text(left, "dim"))
        if not self._row:
            return progress
        return Group(progress, _facts(self._row, self._held_out), devices(self._row), hottest(self._row))


def _facts(row: Metrics, held_out: str) -> RenderableType:
    dead, starving = row[DEAD_EXPERTS], row[STARVING_EXPERTS]
    lines = {
        "loss": [
            f"[bold]{row[LM_LOSS]:.3f}[/bold] {METRICS[LM_LOSS].unit}",
            f"balance {row[BALANCE_LOSS]:.2f}",
            f"z {row[Z_LOSS]:.2f}",
            f"grad norm {row[GRAD_NORM]:.2f}",
        ],
        "validation": [held_out],
        "throughput": [
            f"[bold]{row[TOKENS_PER_SECOND]:,.0f}[/bold] tokens/s",
            f"{row[STEP_SECONDS]:.2f} s/step",
            f"memory {max(row[MEMORY_GIB]):.2f} GiB",
        ],
        "experts": [
            f"[red]{dead} dead[/red]" if dead else "no dead experts",
            f"{starving} starving",
            f"{row[GUESTS]:.0f} guests/step",
            f"{row[ROWS_MOVED_FRACTION]:.1%} of rows moved",
        ],
        "imbalance": [
            f"{row[IMBALANCE_HOME]:.2f} at home → {row[IMBALANCE_PLANNED]:.2f} as planned, "
            "busiest device over the mean, mean over layers"
        ],
    }
    return Group(*(_said(name, words) for name, words in lines.items() if any(words)))


def _said(name: str, words: list[str]) -> RenderableType:
    """A line, or several where the terminal is narrow: nothing is cut."""
    line = Table.grid()
    line.add_column(width=12, style="dim")
    line.add_column(overflow="fold")
    line.add_row(Text(name), Text.from_markup(" · ".join(words)))
    return line


def devices(row: Metrics) -> RenderableType:
    """Draw a bar for every device, before planning and after: its rows of all layers, in mean loads, so that what one
    layer has too many and another too few of is level here. The fullest devices first if they are many."""
    home, planned = row[DEVICE_LOAD_HOME], row[DEVICE_LOAD_PLANNED]
    mean = sum(home) / max(len(home), 1) or 1.0
    order, title = list(range(len(home))), "device"
    if len(home) > DEVICES:
        order, title = sorted(order, key=lambda rank: -home[rank])[:DEVICES], f"{DEVICES} of {len(home)}"
    table = Table.grid(padding=(0, 2))
    heads = f"{title:<8}", "at home, all layers", "", "as planned, all layers", ""
    table.add_row(*(Text(head, "dim") for head in heads))
    largest = max(*home, *planned, 1.0) / mean
    for rank in order:
        cells = [Text(f"{rank:>6}")]
        for loads, color in ((home, "red"), (planned, "green")):
            load = loads[rank] / mean
            filled = round(BAR * load / largest)
            bar = Text.assemble(("█" * filled, color), ("·" * (BAR - filled), "dim"))
            cells += [bar, Text(f"{load:.2f}")]
        table.add_row(*cells)
    return table


def hottest(row: Metrics) -> RenderableType:
    """List the experts with the largest load, in even shares."""
    found = []
    for name, shares in row.items():
        if name.endswith("/load"):
            layer = name.split("/")[1].removeprefix("layer_")
            found += [(share * len(shares), layer, expert) for expert, share in enumerate(shares)]
    found.sort(reverse=True)
    words = [f"layer {layer} expert {expert} [bold]{load:.1f}×[/bold]" for load, layer, expert in found[:HOTTEST]]
    return _said("hottest", words)


def _line(row: Metrics) -> str:
    return (
        f"loss {row[LM_LOSS]:.3f} · {row[TOKENS_PER_SECOND]:,.0f} tokens/s · imbalance "
        f"{row[IMBALANCE_HOME]:.2f} → {row[IMBALANCE_PLANNED]:.2f}"
    )


def _alert(step: int, alert: Alert) -> Text:
    return Text(f"step {step}: {alert.text}", style="yellow")


def _clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    whole = math.ceil(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
