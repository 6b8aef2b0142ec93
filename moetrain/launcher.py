"""Workers: started with torchrun's API when nobody else did, and how one of them ends.

A worker that raises writes its traceback where the launcher finds it; the launcher prints the first cause last.
"""

import logging
import os
import re
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Sequence

from rich.markup import escape
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, get_error_handler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from moetrain.config import ConfigError
from moetrain.mesh import from_env
from moetrain.observe.console import BAD_INPUT, errors, say_bad_input

PEER_GONE = re.compile(r"connection (closed|reset)|gloo|nccl|socket|broken pipe", re.IGNORECASE)
MALLOC = (  # keep big blocks, on huge pages: faulting them in anew in every step costs a CPU run a quarter of its time
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296:"
    "glibc.malloc.arena_max=1:glibc.malloc.top_pad=67108864"
)
PATIENCE_SECONDS = 5.0  # for which a rank that lost its peer leaves the first word to the peer


def launch(arguments: Sequence[str], workers: int) -> int:
    """Run `python -m moetrain ARGUMENTS` in `workers` processes on this host. Returns the exit code."""
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("GLIBC_TUNABLES", MALLOC)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    plan = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=f"moetrain-{uuid.uuid4().hex[:8]}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(plan, sys.executable)("-m", "moetrain", *arguments)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode != BAD_INPUT:  # a worker has said what was wrong already
            _report(rank, failure.message, failure.exitcode)
        return BAD_INPUT if failure.exitcode == BAD_INPUT else 1
    except (SignalException, KeyboardInterrupt):
        errors.print("interrupted")
        return 130
    return 0


def work(body: Callable[[], None]) -> int:
    """Run a worker's part. Returns its exit code; never raises."""
    place = from_env()
    rank = place[0] if place else 0
    try:
        body()
    except ConfigError as error:
        return say_bad_input(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, RuntimeError) and PEER_GONE.search(str(error)):
            time.sleep(PATIENCE_SECONDS)
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)
        else:
            errors.print(f"rank {rank} failed:\n{traceback.format_exc()}", markup=False)
        return 1
    return 0


def _report(rank: int, message: object, code: int) -> None:
    if isinstance(message, dict):
        message = message.get("extraInfo", {}).get("py_callstack") or message.get("message")
    elif code < 0:
        message = f"the process was killed by signal {-code}"
    errors.print(f"[bold red]rank {rank} failed:[/bold red]\n{escape(str(message))}")
