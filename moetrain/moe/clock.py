"""Where the time of one forward pass goes: seconds per phase, on the host, or on the device where there is one."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Adds up the phases of one layer and micro-step; `seconds()` may wait for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        self._running = True

    def stop(self) -> None:
        """The forward is over: what a recompute does is not counted again."""
        self._running = False

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if not self._running:
            yield
            return
        begin = self._now()
        yield
        self._marks.append((name, begin, self._now()))

    def seconds(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for name, begin, end in self._marks:
            if self._cuda:
                end.synchronize()
            passed = begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
            total[name] = total.get(name, 0.0) + passed
        return total
