"""Where the time of a layer's pass goes: seconds per phase, on the host, or on the device where there is one.

In the phases of the forward: `route`, `plan`, `lend`, `dispatch`, `experts`, `combine`; of the backward: the last four
with `backward_` before them. Inside of them, `wait_counts` and the like are the time from a rank's arrival at an
exchange to the exchange's end: the rank that comes last waits least, and the others wait for it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

PHASES = ("route", "plan", "lend", "dispatch", "experts", "combine")
BACKWARD_PHASES = ("backward_lend", "backward_dispatch", "backward_experts", "backward_combine")
WAITS = ("wait_counts", "wait_dispatch", "wait_combine", "backward_wait_dispatch", "backward_wait_combine")

Observer = Callable[[str], None]  # is called with the name of a phase when it begins


def ignore_phase(phase: str) -> None:
    """Observe nothing."""


class Clock:
    """Adds up the phases of one layer and micro-step; `seconds()` may wait for the device."""

    def __init__(self, device: torch.device, observer: Observer = ignore_phase) -> None:
        self._observe = observer
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.current_stream(device) if self._cuda else None  # finding it takes longer than to mark
        self._marks: list[tuple[str, Any, Any]] = []
        self._running = True
        self.sent_bytes = 0  # of tokens, to other ranks, in the forward

    def stop(self) -> None:
        """Count no more: the forward is over, and what a recompute does is not counted again."""
        self._running = False

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the forward, inside the context."""
        self._observe(name)
        if not self._running:
            yield
            return
        with self._marked(name):
            yield

    @contextmanager
    def backward(self, name: str) -> Iterator[None]:
        """Time a part of the backward, inside the context; it is called `backward_` and `name`."""
        self._observe(f"backward_{name}")
        with self._marked(f"backward_{name}"):
            yield

    @contextmanager
    def _marked(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._marks.append((name, begin, self._now()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase so far; waits for the device."""
        total: dict[str, float] = {}
        for name, begin, end in self._marks:
            if self._cuda:
                end.synchronize()
            passed = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            total[name] = total.get(name, 0.0) + passed
        return total
