"""Where metrics go: one tracker, many sinks. A rank that does not report has a tracker without sinks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol

from moetrain.common.console import console
from moetrain.observe.collect.alerts import Alert

Metrics = Mapping[str, Any]


class Sink(Protocol):
    def log(self, step: int, metrics: Metrics) -> None: ...

    def alert(self, step: int, alert: Alert) -> None: ...

    def close(self) -> None: ...


class Tracker:
    """Hands metrics to every sink. Names are those of `docs/metrics.md`; values numbers or lists of numbers.

    Its context closes the sinks; where a step was not finite it tells them so before.
    """

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = sinks
        self._step = 0

    def log(self, step: int, metrics: Metrics) -> None:
        self._step = step
        for sink in self._sinks:
            sink.log(step, metrics)

    def alert(self, step: int, alert: Alert) -> None:
        for sink in self._sinks:
            sink.alert(step, alert)

    def close(self) -> None:
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            sink.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, FloatingPointError):
            self.alert(self._step + 1, Alert("not_finite", str(error).removeprefix(f"step {self._step + 1}: ")))
        self.close()


class Tolerant:
    """A sink of somebody else's, made at its first use. What it raises never ends a run: it is said in one line, and
    nothing goes there from then on."""

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name, self._make = name, make
        self._sink: Sink | None = None
        self._failed = False

    def log(self, step: int, metrics: Metrics) -> None:
        self._try(lambda sink: sink.log(step, metrics))

    def alert(self, step: int, alert: Alert) -> None:
        self._try(lambda sink: sink.alert(step, alert))

    def close(self) -> None:
        if self._sink is not None:
            self._try(lambda sink: sink.close())

    def _try(self, act: Callable[[Sink], None]) -> None:
        if self._failed:
            return
        try:
            self._sink = self._sink or self._make()
            act(self._sink)
        except Exception as error:
            self._failed = True
            said = f"{self._name}: {one_line(error)}; nothing more goes there, metrics.jsonl has everything"
            console.print(said, style="yellow")
            with suppress(Exception):
                if self._sink is not None:
                    self._sink.close()


def one_line(error: Exception) -> str:
    """Return what an error says, without the end of the sentence."""
    return (" ".join(str(error).split()) or type(error).__name__)[:240].rstrip(".")
