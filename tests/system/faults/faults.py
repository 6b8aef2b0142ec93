"""Real faults for real runs: processes of a run that are killed, stopped or asked to end at a given step.

A run is `python -m moetrain train` as a user starts it. `Job.at(step)` waits until the run has written that step.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

PATIENCE_SECONDS = 150.0


class Job:
    """A run in a process; its output is kept, or goes to `terminal`. What is left of it is killed on the way out."""

    def __init__(
        self, overrides: Sequence[str], command: Sequence[str] | None = None, terminal: int | None = None
    ) -> None:
        values = dict(o.split("=", 1) for o in overrides)
        self.folder = Path(values["run.dir"], values["run.name"])
        self._log = Path(values["run.dir"], f"{values['run.name']}-{time.monotonic_ns()}.txt")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        command = command or [sys.executable, "-m", "moetrain", "train"]
        with self._log.open("w") as log:
            out = log if terminal is None else terminal
            self.process = subprocess.Popen(
                [*command, *overrides], stdin=terminal, stdout=out, stderr=out, start_new_session=True
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        left = self.ranks()
        self.process.kill()
        self.process.wait()
        for pid in left.values():
            strike(pid, signal.SIGKILL)

    @property
    def said(self) -> str:
        return self._log.read_text()

    def ranks(self) -> dict[int, int]:
        """Rank -> process, of the workers that this job has now."""
        out = {}
        for pid in _descendants(self.process.pid):
            try:
                env = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            rank = next((int(e[5:]) for e in env if e.startswith(b"RANK=")), None)
            if rank is not None and b"moetrain" in words:
                out.setdefault(rank, pid)
        return out

    def at(self, step: int, after: float = 0.0) -> "Job":
        """Wait until the run has written this step, `after` (wall clock) if given."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            assert self.process.poll() is None, self.said
            metrics = self.folder / "metrics.jsonl"
            if metrics.is_file() and metrics.stat().st_mtime > after and last_step(self.folder) >= step:
                return self
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached:\n{self.said}")

    def saving(self) -> "Job":
        """Wait until a checkpoint is being written."""
        wait(lambda: any((self.folder / "checkpoints").glob(".step_*.part")))
        return self

    def strike(self, rank: int, number: signal.Signals) -> float:
        """Send a signal to a worker. Returns when, of the wall clock."""
        strike(self.ranks()[rank], number)
        return time.time()

    def end(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE_SECONDS)


def wait(until: Callable[[], object]) -> None:
    """Raises `AssertionError` where it does not become true."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not until():
        assert time.monotonic() < end, "nothing happens any more"
        time.sleep(0.002)


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def strike(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def steps(folder: Path) -> dict[int, float]:
    """Step -> cross entropy; the last line of a step counts."""
    out = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "train/lm_loss" in row:
            out[row["step"]] = row["train/lm_loss"]
    return out


def last_step(folder: Path) -> int:
    """That `metrics.jsonl` has, whole lines only."""
    lines = (folder / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def _descendants(pid: int) -> list[int]:
    """Processes below this one, nearest first."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(entry.name))
    out, front = [], [pid]
    while front:
        front = [child for parent in front for child in sorted(parents.get(parent, []))]
        out += front
    return out
