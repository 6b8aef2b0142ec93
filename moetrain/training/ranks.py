"""One rank of a job, from its start to its exit code: every verb and benchmark that needs ranks enters here."""

import os
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal

from moetrain.common.console import console, errors
from moetrain.launch import worker
from moetrain.launch.local import WorkerPlace

if TYPE_CHECKING:  # torch is loaded when a rank begins, not for its command line
    from moetrain.distributed.mesh import Mesh

STAGED = "collectives go through host memory (gloo), for correctness only: ranks share a GPU, or parallel.backend=gloo"


def run_on_rank(
    task: Callable[["Mesh"], None],
    place: WorkerPlace,
    *,
    ep: int | None = None,
    dp_replicate: int = 1,
    threads: int | None = None,
    timeout: float = 600.0,
    backend: Literal["auto", "nccl", "gloo"] = "auto",
    exchange: Literal["flat", "two_level", "auto"] = "flat",
    flow_splits: int = 1,
) -> int:
    """Join the ranks of the job as `place` says, run `task` on their mesh, and return the exit code of this process.

    `ep`, `dp_replicate`, `timeout` (seconds), `backend`, `exchange` and `flow_splits` as in `mesh.start`. `threads`:
    that torch computes with; None: an even share of this host's cores. Never raises: what `task` raises is reported as
    `worker.run_worker` does.
    """

    def join_and_run() -> None:
        import torch

        from moetrain.moe import compiled

        if place.rank == 0 and not compiled.is_cached():
            console.print("compiling kernels for this machine, once", style="dim")
        from moetrain.distributed import mesh  # compiles the planners' kernels

        here = int(os.environ.get("LOCAL_WORLD_SIZE", place.world))
        torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // here))
        start = partial(mesh.start, ep=ep, dp_replicate=dp_replicate, timeout=timeout, backend=backend)
        with start(**place._asdict(), exchange=exchange, flow_splits=flow_splits) as joined:
            if joined.is_main and joined.is_staged:
                errors.print(STAGED, style="yellow")
            for line in joined.notes if joined.is_main else ():
                errors.print(line)
            task(joined)

    return worker.run_worker(join_and_run)
