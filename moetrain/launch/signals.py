"""Requests to end: SIGTERM, SIGUSR1 (which Slurm sends some minutes before it takes a node back), Ctrl-C, and
SIGHUP: the terminal is gone, as after a dropped SSH session; under `nohup` it is ignored.

Python runs its handlers between two of its own instructions, and so not at all while a collective waits for a peer that
is gone. What has to happen at once is done by a thread, which the C-level handler wakes through a pipe.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moetrain.common.console import forget_terminal
from moetrain.launch.exits import REQUEUE

INTERRUPTED = 130  # exit code
NOTED = "the run ends after this step and saves; Ctrl-C again ends it now"
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
ONE_PRESS_SECONDS = 0.5  # a launcher passes on what the terminal has sent already

_requested = threading.Event()
_callbacks: list[Callable[[], None]] = []


@contextmanager
def on_request(callback: Callable[[], None]) -> Iterator[None]:
    """Inside, have another thread call `callback` at once when the first request is noted, as `note_requests` does."""
    _callbacks.append(callback)
    try:
        yield
    finally:
        _callbacks.remove(callback)


def end_requested() -> bool:
    """Tell whether this process was asked to end."""
    return _requested.is_set()


def end_on_request() -> None:
    """End this process at once when it is asked to: before a training loop, and after it, there is nothing to save."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(REQUEUE))


@contextmanager
def note_requests() -> Iterator[None]:
    """Inside, note the first request (`end_requested`), for the ranks to agree on; a second Ctrl-C ends at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    listener = threading.Thread(target=_listen, args=(reading,), daemon=True)
    listener.start()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    heard = [number for number in REQUESTS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, lambda *_: None) for number in heard}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(writing)
        listener.join()
        os.close(reading)


def _listen(reading: int) -> None:
    pressed = None
    while number := os.read(reading, 1):
        if number[0] == signal.SIGINT:
            now = time.monotonic()
            if pressed is not None and now - pressed > ONE_PRESS_SECONDS:
                os._exit(INTERRUPTED)
            pressed = now
        if number[0] == signal.SIGHUP:
            forget_terminal()
        if number[0] in REQUESTS and not _requested.is_set():
            _requested.set()
            for callback in [*_callbacks]:
                callback()
