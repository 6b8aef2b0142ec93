"""Work shared out among processes, its results in the order of the work, a bounded number of them at a time."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import TypeVar

Work = TypeVar("Work")
Result = TypeVar("Result")
LEAST_BYTES = 1 << 25  # of work that another process is worth starting for
AHEAD = 3  # pieces of work a process that may wait to be taken


def choose_workers(wanted: int | None, size: int) -> int:
    """The number of processes for `size` bytes of work: `wanted`, or one for every core unless there is little work."""
    return wanted or max(1, min(os.cpu_count() or 1, size // LEAST_BYTES))


def map_in_order(function: Callable[[Work], Result], work: Iterable[Work], workers: int) -> Iterator[Result]:
    """Yields `function(each)`, with one worker in this process. What it raises is raised here, in the order of work."""
    if workers == 1:
        yield from map(function, work)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for each in work:
                waiting.append(pool.submit(function, each))
                if len(waiting) >= AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """One thread a process; and it ends with the process that started it, however that ends."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
