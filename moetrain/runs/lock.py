"""One job at a time trains in a run's folder: its launcher holds a lock, or rank 0 where torchrun or Slurm started it.

`RUN/.lock` is locked by the kernel (flock), which frees it when the holder dies, however it does. It names the holder,
for the message, and for hosts between which the file system does not share locks: there the run's heartbeats tell.
Reading the run (`eval`, `report`) needs no lock.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moetrain import runs
from moetrain.common.errors import ConfigError

LOCK = ".lock"
SILENCE_SECONDS = 3.0  # in which a run that is alive has written a heartbeat


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold the lock of the run in `folder`, which is made if need be; the lock of a dead holder is taken over.

    Raises `ConfigError` where another job holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise ConfigError(f"run.name={folder.name}: {folder / LOCK} cannot be written ({error.strerror})") from None
    try:
        _take(handle, folder)
        _write(handle, {"host": socket.gethostname(), "pid": os.getpid(), "job": _job()})
        try:
            yield
        finally:
            with suppress(OSError):  # a disk that is read-only by now: the lock of the kernel goes, and the process
                os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _take(handle: int, folder: Path) -> None:
    alone = None  # whether the kernel says that nobody else has it; None: it cannot say
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except BlockingIOError:
        alone = False
    except OSError:  # a file system without locks
        pass
    holder = _read(handle)
    here = holder.get("host") == socket.gethostname()
    if alone is False or (holder and not (alone and here) and _lives(holder, folder)):
        who = f"process {holder.get('pid', '?')} on {holder.get('host', 'this host')}"
        rule = f"is being trained by {who}; take another name, or end that job first"
        raise ConfigError(f"run.name={folder.name}: {rule}")


def _lives(holder: dict[str, Any], folder: Path) -> bool:
    """Whether a holder seems to be at work, whom no lock of the kernel speaks for."""
    if holder.get("host") == socket.gethostname():
        try:
            os.kill(int(holder.get("pid", 0)), 0)
        except (ProcessLookupError, ValueError):
            return False
        except PermissionError:
            return True
        return True
    if holder.get("job") and holder.get("job") == _job():  # this job, started again: rank 0 is on another host now
        return False
    before = _beats(folder)
    if not before:
        return False
    time.sleep(SILENCE_SECONDS)
    return _beats(folder) != before


def _beats(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(runs.heartbeats(folder).glob("rank_*"))]


def _job() -> str:
    """What torchrun or Slurm calls this job; empty where neither does."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return os.environ.get("SLURM_JOB_ID", "") if name == "none" else name


def _read(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(handle: int, record: dict[str, Any]) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(record).encode(), 0)
