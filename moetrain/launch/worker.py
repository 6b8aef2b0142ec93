"""A worker around its task: it dies with its launcher, and writes how it ended to the file that the launcher reads."""

import ctypes
import errno
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from moetrain.common.console import errors
from moetrain.common.errors import ConfigError
from moetrain.common.redact import hide_passwords
from moetrain.launch import signals
from moetrain.launch.exits import Ended

PEER_GONE = re.compile(r"connection (closed|reset|refused)|gloo|nccl|socket|broken pipe", re.IGNORECASE)
PATIENCE_SECONDS = 5.0  # for which a rank that lost its peer leaves the first word to the peer
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the user's to cure: no traceback
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # as torchrun names it to its workers, and our launcher to its own
STORE_SOCKET = "MOETRAIN_STORE_SOCKET"  # our launcher's: the open socket at which rank 0 keeps the store
PR_SET_PDEATHSIG = 1
BAD_INPUT = 2  # exit code


def die_with_launcher() -> None:
    """Where torchrun or our launcher started this process: when they are killed, so is it (Linux)."""
    if ERROR_FILE in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def let_gpu_segments_grow() -> None:
    """Row counts change with every batch: torch is to grow segments of GPU memory, not to keep one for each size.

    To be called before torch is loaded. What the user has set goes before; torch warns of the second name."""
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def is_first_of_external_job() -> bool:
    """Tell whether this worker is rank 0 of a job of torchrun or Slurm. Our own launcher acts for its workers."""
    return os.environ.get("RANK") == "0" and STORE_SOCKET not in os.environ


def report_bad_input(error: Exception) -> int:
    """Print one line on each host, however many workers found the same mistake, and return the exit code."""
    number = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
    if number.isdecimal() and int(number) > 0:
        time.sleep(2)  # a launcher ends all workers when the first one exits: leave the first of the host time to speak
        return BAD_INPUT
    errors.print(hide_passwords(f"error: {error}"))
    _ask_torchrun_to_end()
    return BAD_INPUT


def _ask_torchrun_to_end() -> None:
    """Stop torchrun, our parent, where it would start its workers again: they would make the same mistake."""
    restarts, most = (os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if restarts.isdecimal() and most.isdecimal() and int(restarts) < int(most):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(os.getppid(), signal.SIGTERM)


def run_worker(body: Callable[[], None]) -> int:
    """Run `body` and return the exit code of this worker; what it raises is reported, never raised again."""
    signals.end_on_request()
    try:
        body()
    except ConfigError as error:
        return report_bad_input(error)
    except Ended as end:
        if str(end):
            _write_error(str(end), str(end))
        return end.code
    except KeyboardInterrupt:
        return signals.INTERRUPTED
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK:
            line = f"{error.strerror}{f': {error.filename}' if error.filename else ''}; earlier checkpoints are kept"
            _write_error(line, line)
            return 1
        if isinstance(error, RuntimeError) and PEER_GONE.search(str(error)) and not signals.end_requested():
            time.sleep(PATIENCE_SECONDS)
        _write_error(f"{type(error).__name__}: {error}", traceback.format_exc())
        return 1
    return 0


def end_now(line: str) -> None:
    """End this process from any of its threads, whatever the others wait for; `line` says why."""
    errors.print(line)
    _write_error(line, line, printed=True)
    os._exit(1)


def _write_error(message: str, details: str, printed: bool = False) -> None:
    """Write an error to the launcher's file, as torch's own workers do; to the terminal where there is no launcher."""
    rank = int(os.environ.get("RANK", 0))
    if ERROR_FILE in os.environ:
        about = {"py_callstack": details, "timestamp": str(int(time.time()))}
        Path(os.environ[ERROR_FILE]).write_text(json.dumps({"message": {"message": message, "extraInfo": about}}))
    elif not printed and (details != message or rank == 0):
        errors.print(details if details == message else f"rank {rank} failed:\n{details}")
