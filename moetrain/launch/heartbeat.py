"""A heartbeat per rank: where it is, once a second, in a small file of the run's folder, which all hosts share.

A rank that stands still for longer than the time-out reads everybody's, says which rank is missing and where it was
last seen, and ends its process; so does every other rank that waits. Time in which a process was itself stopped does
not count: a job that is suspended as a whole goes on where it was.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from pydantic import TypeAdapter

from moetrain.common import disk
from moetrain.launch.worker import end_now

BEAT_SECONDS = 1.0
SILENT_BEATS = 5  # missed in a row: the process is stopped or gone, or its host is
FIRST_STEP_SECONDS = 120.0  # at least: it compiles
LONG = ("save", "evaluate")  # phases that may take longer than the time-out


@dataclass(frozen=True)
class Beat:
    """Where a rank is, and when it said so."""

    rank: int
    host: str
    pid: int
    step: int  # the one under way, counted from one; 0: none yet
    marks: int  # phases begun in it
    layer: int | None
    phase: str
    since: float  # when it began, of the wall clock
    now: float

    def place(self) -> str:
        layer = "" if self.layer is None else f"layer {self.layer}, "
        return f"step {self.step}, {layer}{self.phase}"


class Heartbeat:
    """The heartbeat of one rank: a thread, alive inside the context, writes the last phase that `mark_phase` named.

    `mark_phase` is cheap: it stores a tuple.
    """

    def __init__(self, folder: Path, rank: int, world: int, timeout: float) -> None:
        self._folder, self._rank, self._world, self._timeout = folder, rank, world, timeout
        self._host = socket.gethostname()
        self._beat = min(BEAT_SECONDS, timeout / 10)
        self._place: tuple[int, int, int | None, str, float] = (0, 0, None, "start", time.time())
        self._begun = 0  # steps
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._write()

    def begin_step(self, step: int) -> None:
        self._begun += 1
        self._place = (step, 0, None, "data", time.time())

    def mark_phase(self, layer: int | None, phase: str) -> None:
        step, marks, *_ = self._place
        self._place = (step, marks + 1, layer, phase, time.time())

    def _run(self) -> None:
        seen, waited, woke = self._place, 0.0, time.monotonic()
        while not self._over.wait(self._beat):
            self._write()
            now = time.monotonic()
            waited += min(now - woke, 2 * self._beat)  # a process that was stopped did not wait
            woke = now
            if self._place is not seen:
                seen, waited = self._place, 0.0
            limit = max(self._timeout, FIRST_STEP_SECONDS if self._begun == 1 else 0)
            if waited > limit and seen[3] not in LONG and self._begun:
                before = read_beats(self._folder, self._world)
                for _ in range(SILENT_BEATS):  # who is alive is told by what changes: clocks differ, and are set
                    time.sleep(self._beat)
                    self._write()
                end_now(describe_stall(before, read_beats(self._folder, self._world), self._rank, waited))

    def _write(self) -> None:
        step, marks, layer, phase, since = self._place
        beat = Beat(self._rank, self._host, os.getpid(), step, marks, layer, phase, since, time.time())
        with suppress(OSError):  # a full disk takes what stands there already in other words
            handle = os.open(_path(self._folder, self._rank), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                os.pwrite(handle, json.dumps(asdict(beat)).ljust(400).encode(), 0)
            finally:
                os.close(handle)


def read_beats(folder: Path, world: int | None = None) -> list[Beat]:
    """Read the last beat of every rank below `world` that has one; None: of all ranks there are."""
    paths = sorted(folder.glob("rank_*")) if world is None else [_path(folder, rank) for rank in range(world)]
    out = []
    for path in paths:
        with suppress(OSError, ValueError):
            out.append(TypeAdapter(Beat).validate_json(disk.read(path)))
    return out


def furthest_step(folder: Path) -> int:
    """Return the furthest step that a rank of the run has reached; 0: none."""
    return max((beat.step for beat in read_beats(folder)), default=0)


def describe_stall(before: Sequence[Beat], beats: Sequence[Beat], own: int, waited: float) -> str:
    """Describe in one line which rank is missing and where it was last seen, and where the others wait.

    Missing are those whose heartbeat is still the one of `before`; else those that are behind the others.
    """
    missing = [beat for beat in beats if beat in before and beat.rank != own]
    alive = [beat for beat in beats if beat not in missing]
    newest = max(beat.now for beat in alive or beats)
    how = "no longer responds"
    if not missing and len({(b.step, b.marks) for b in alive}) > 1:
        first = min((b.step, b.marks) for b in alive)
        missing, how = [b for b in alive if (b.step, b.marks) == first], "is behind"
        alive = [b for b in alive if b not in missing]
    lines = [f"rank {own}: no progress for {waited:.0f} s"]
    here = next((b.host for b in beats if b.rank == own), "")
    for beat in missing:
        state = _state(beat) if how != "is behind" and beat.host == here else ""
        ago = max(0.0, newest - (beat.since if how == "is behind" else beat.now))  # a clock may have been set back
        lines.append(f"rank {beat.rank} on {beat.host} {state or how}, last seen {ago:.0f} s ago in {beat.place()}")
    if not missing:
        lines.append("all ranks respond and wait at the same place: the network between them may be down")
    waiting: dict[str, list[str]] = {}
    for beat in alive:
        waiting.setdefault(beat.place(), []).append(str(beat.rank))
    for place, ranks in waiting.items():
        lines.append(f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} wait{'s' * (len(ranks) == 1)} in {place}")
    return "; ".join(lines)


def _state(beat: Beat) -> str:
    """What the kernel says of a process on this host; nothing where it runs."""
    try:
        state = Path(f"/proc/{beat.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # or there is no /proc
        return "" if _exists(beat.pid) else "is gone"
    return {"T": "is stopped", "Z": "is gone", "X": "is gone", "D": "waits for a device"}.get(state, "")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}"
