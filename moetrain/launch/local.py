"""Starts the workers of one host when no other launcher did, and starts them again when one of them dies.

The workers meet at a store that rank 0 keeps, at a socket of the loopback interface that this process opens, a new one
every time. A worker that fails writes its traceback to a file without a name; the first cause has the last word.
Requests to end are passed on; a second Ctrl-C kills. No torch: workers start as soon as it is known that they can.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

from moetrain.common.console import console, errors, styled
from moetrain.common.errors import ConfigError
from moetrain.launch import heartbeat
from moetrain.launch.exits import GAVE_UP, REQUEUE
from moetrain.launch.signals import INTERRUPTED, NOTED, ONE_PRESS_SECONDS, REQUESTS, forget_terminal
from moetrain.launch.worker import BAD_INPUT, ERROR_FILE, STORE_SOCKET

MALLOC = (  # keep big blocks, on huge pages: faulting them in anew in every step costs a CPU run a quarter of its time
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296:"
    "glibc.malloc.arena_max=1:glibc.malloc.top_pad=67108864"
)
LOOPBACK = "127.0.0.1"
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # there where a driver is: NVIDIA's, AMD's, that of WSL
LOOK_SECONDS = 0.05  # between two looks at the workers
GOODBYE_SECONDS = 10.0  # for the last worker to close its files, after the first one has ended as all agreed


class WorkerPlace(NamedTuple):
    """Which of a job's ranks a process is."""

    rank: int
    world: int
    local_rank: int


def from_env() -> WorkerPlace | None:
    """The place that torchrun or `launch` gave this process; None outside of them. Raises `ConfigError`."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    place = {name: os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    for name, value in place.items():
        if not value.isdecimal():
            raise ConfigError(f"{name}={value}: must be a whole number, as torchrun sets it; unset it to start workers")
    return WorkerPlace(*map(int, place.values()))


def auto_nproc() -> int:
    """Workers on this machine when nobody said how many: one a GPU, else two."""
    if not may_have_gpus():
        return 2  # a second sooner than torch says so
    import torch

    return torch.cuda.device_count() or 2


def may_have_gpus() -> bool:
    """Tell whether this machine may have GPUs: whether there is a driver of theirs. Loads no torch."""
    return sys.platform != "linux" or any(Path(name).exists() for name in GPU_DEVICES)


class Failure(NamedTuple):
    """The first worker that ended in any other way than it should."""

    rank: int
    code: int  # below zero: killed by that signal
    message: str
    pids: Collection[int] = ()  # of all workers of the attempt


class RestartPolicy(NamedTuple):
    """Workers that died are started again up to `times` times in a row without getting further in the run."""

    times: int
    heartbeats: Path  # of the run, which say how far it got


def launch(arguments: Sequence[str], workers: int, restarts: RestartPolicy | None = None) -> int:
    """Run `python -m moetrain ARGUMENTS` in `workers` processes on this host and return the exit code.

    `restarts`: when workers that died are started again; None: never.
    """
    os.environ.setdefault("GLIBC_TUNABLES", MALLOC)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    console.print(f"starting {workers} worker{'s' * (workers > 1)}", style="dim")
    requests = _Requests()
    in_vain, reached = 0, heartbeat.furthest_step(restarts.heartbeats) if restarts else 0
    while True:
        failure = _run_attempt(arguments, workers, requests)
        if failure is None:
            return 0
        if requests.interrupted:
            errors.print("interrupted")
            return INTERRUPTED
        if failure.code == REQUEUE or requests.heard:
            return REQUEUE
        if failure.code == BAD_INPUT:  # a worker has said what was wrong already
            return BAD_INPUT
        beats = heartbeat.read_beats(restarts.heartbeats) if restarts else []
        beats = [beat for beat in beats if beat.pid in failure.pids]  # of this attempt, whatever the clock says
        where = next((f" in {beat.place()}" for beat in beats if beat.rank == failure.rank and beat.step), "")
        errors.print(styled((f"rank {failure.rank} failed{where}:", "bold red"), (f"\n{failure.message}", "")))
        if restarts is None or failure.code == GAVE_UP:
            return 1
        here = max((beat.step for beat in beats), default=0)
        if failure.code > 0 and not here:  # it raised before its first step, and would again
            return 1
        in_vain = 1 if here > reached else in_vain + 1
        reached = max(reached, here)
        if in_vain > restarts.times:
            return 1
        errors.print(
            f"the workers start again ({in_vain} of {restarts.times} times without getting beyond step {reached})"
        )


class _Requests:
    """SIGTERM, SIGUSR1, SIGHUP and Ctrl-C, as this process gets them."""

    def __init__(self) -> None:
        self.heard = False
        self.hung_up = False  # the terminal is gone
        self.interrupted = False
        self.insists = False  # a second Ctrl-C; one press, or one SIGTERM, may come twice, to all of a process group
        self._pressed = 0.0
        for number in REQUESTS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        if number == signal.SIGHUP:
            self.hung_up = True
            forget_terminal()
        elif number == signal.SIGINT and not self.interrupted:
            self.interrupted, self._pressed = True, time.monotonic()
            if not (console.is_terminal and not console.quiet):  # else the live view says it when it has made room
                os.write(2, f"{NOTED}\n".encode())  # it may be amid a print
        elif number == signal.SIGINT and time.monotonic() - self._pressed > ONE_PRESS_SECONDS:
            self.insists = True


def _run_attempt(arguments: Sequence[str], workers: int, requests: _Requests) -> Failure | None:
    """One attempt. All workers are gone when it returns."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server((LOOPBACK, 0)))
        words = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(workers)]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "moetrain", *arguments],
                env={
                    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(workers),
                    "LOCAL_WORLD_SIZE": str(workers),
                    "MASTER_ADDR": LOOPBACK,
                    "MASTER_PORT": str(listening.getsockname()[1]),
                    STORE_SOCKET: str(listening.fileno()),
                    ERROR_FILE: f"/dev/fd/{words[rank].fileno()}",
                },
                stdin=subprocess.DEVNULL,
                pass_fds=[words[rank].fileno(), *([listening.fileno()] if rank == 0 else [])],
                start_new_session=True,  # what the terminal sends, this process passes on
            )
            for rank in range(workers)
        ]
        listening.close()  # rank 0 has it now
        passed_on = False
        try:
            while True:
                codes = [worker.poll() for worker in running]
                for rank, code in enumerate(codes):
                    if code == REQUEUE:
                        _wait(running, GOODBYE_SECONDS)
                    if code:
                        pids = [worker.pid for worker in running]
                        return Failure(rank, code, _message(words[rank], code), pids)
                if all(code == 0 for code in codes):
                    return None
                if requests.insists:
                    return Failure(0, REQUEUE, "")
                if requests.heard and not passed_on:
                    passed_on = True
                    for worker in running:
                        worker.send_signal(signal.SIGHUP if requests.hung_up else signal.SIGTERM)
                time.sleep(LOOK_SECONDS)
        finally:
            for worker in running:
                worker.kill()
                worker.wait()


def _wait(running: Sequence[subprocess.Popen], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(worker.poll() is None for worker in running):
        time.sleep(LOOK_SECONDS)


def _message(word: IO[bytes], code: int) -> str:
    try:
        word.seek(0)
        return json.load(word)["message"]["extraInfo"]["py_callstack"]
    except (OSError, ValueError, KeyError):
        return f"the process was killed by signal {-code}" if code < 0 else f"its exit code was {code}"
