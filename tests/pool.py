"""A pool of ranks that lives for the whole test session: real processes, real gloo, milliseconds a test.

`pool.run(function, ranks, *args)` calls `function(mesh, *args)` in every rank, under a fresh process group, and
returns what each returned. Every rank's traceback is collected; after a failure the ranks are replaced.
"""

import itertools
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch.multiprocessing as mp

from tests.shapes import are_checked, check_shapes

MOST = 4
JOIN_SECONDS = 90  # for a collective; a rank may compile a kernel meanwhile
TIMEOUT_SECONDS = 150  # for a job


def _serve(rank: int, jobs: Any, results: Any) -> None:
    import warnings

    import torch

    from moetrain.distributed import mesh
    from moetrain.observe import picture

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")  # on a GPU
    picture.draw = lambda folder: None  # a third of a small run; test_cli.py looks at it
    torch.set_num_threads(1)
    while (job := _next(jobs)) is not None:
        number, function, world, path, axes, checked, args = job
        try:
            with mesh.start(
                rank=rank, world=world, **axes, init_method=f"file://{path}", timeout=JOIN_SECONDS
            ) as joined:
                with check_shapes() if checked else nullcontext():
                    result = function(joined, *args)
            results.put((number, rank, True, result))
        except BaseException:
            results.put((number, rank, False, traceback.format_exc()))


def _next(jobs: Any) -> Any:
    """None where the session has ended, however it did."""
    session = mp.parent_process()
    while session is not None and session.is_alive():
        with suppress(queue.Empty):
            return jobs.get(timeout=5)
    return None


class Pool:
    def __init__(self) -> None:
        self._context = mp.get_context("forkserver")  # which imports once what every rank needs
        self._context.set_forkserver_preload(["torch", "moetrain.training.loop", "moetrain.hf"])
        self._numbers = itertools.count()
        self._ranks: list[Any] = []
        self._folder = tempfile.mkdtemp(prefix="moetrain-pool-")

    def _start(self) -> None:
        self._results = self._context.Queue()
        for rank in range(MOST):
            jobs = self._context.Queue()
            process = self._context.Process(target=_serve, args=(rank, jobs, self._results), daemon=True)
            process.start()
            self._ranks.append((process, jobs))

    def stop(self) -> None:
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks = []

    def run(
        self,
        function: Callable[..., Any],
        ranks: int,
        *args: Any,
        ep: int | None = None,
        replicate: int = 1,
        **exchange: Any,
    ) -> list:
        """[ranks] results. `function` is a module-level function of (mesh, *args); `exchange`: what else `mesh.start`
        is given."""
        if not self._ranks:
            self._start()
        axes = {"ep": ep, "dp_replicate": replicate, **exchange}
        number = next(self._numbers)
        path = os.path.join(self._folder, f"rendezvous-{number}")
        for _, jobs in self._ranks[:ranks]:
            jobs.put((number, function, ranks, path, axes, are_checked(), args))
        found: dict[int, Any] = {}
        failures: list[str] = []
        while len(found) + len(failures) < ranks:
            try:
                job, rank, good, result = self._results.get(timeout=5 if failures else TIMEOUT_SECONDS)
            except queue.Empty:
                failures.append("some ranks gave no answer")
                break
            if job != number:
                continue
            if good:
                found[rank] = result
            else:
                failures.append(f"rank {rank}:\n{result}")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))
        return [found[rank] for rank in range(ranks)]
