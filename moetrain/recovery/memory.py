"""Where snapshots lie: files in the shared memory of a host, which outlive every worker, and what is known of them.

`/dev/shm/moetrain-UID/RUN/HOST/{a,b}/rank_N.safetensors`, each with a stamp beside it, `rank_N.json`: written last, it
is what makes the file count. A host keeps the files of its own ranks and of those that it is a peer to.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from moetrain import disk
from moetrain.checkpoint import files

ROOT = Path("/dev/shm")
SLOTS = ("a", "b")
FETCHED = "fetched"  # from another host, to start with


@dataclass(frozen=True)
class Stamp:
    """Of one rank's file."""

    rank: int
    step: int
    samples: int
    layout: dict[str, Any]  # as in a checkpoint's manifest
    bytes: int
    crc32: str
    holding: Mapping[str, tuple[str, Sequence[int], int, int]]  # name -> dtype, shape, begin, end

    @property
    def world(self) -> int:
        return int(self.layout["ranks"])


def root() -> Path:
    """Of this user."""
    return ROOT / f"moetrain-{os.getuid()}"


def home(run: str, host: str) -> Path:
    """Of a run, by its identity, on a host."""
    return root() / run / host


def data_file(slot: Path, rank: int) -> Path:
    return slot / f"rank_{rank:05d}.safetensors"


def stamp_file(slot: Path, rank: int) -> Path:
    return slot / f"rank_{rank:05d}.json"


def stamps(place: Path) -> Iterator[tuple[Path, Stamp]]:
    """(slot, stamp) of the files below a host's folder that are there in their length; their bytes are not read."""
    for path in sorted(place.glob("*/rank_*.json")):
        with suppress(OSError, ValueError):
            stamp = TypeAdapter(Stamp).validate_json(disk.read(path))
            if (
                isinstance(stamp.layout.get("ranks"), int)
                and data_file(path.parent, stamp.rank).stat().st_size == stamp.bytes
            ):
                yield path.parent, stamp


def is_whole(slot: Path, stamp: Stamp) -> bool:
    """Whether the file's bytes are those that were stamped."""
    try:
        return files.stamp(data_file(slot, stamp.rank)) == (stamp.bytes, stamp.crc32)
    except OSError:
        return False


def put_stamp(slot: Path, stamp: Stamp) -> None:
    disk.write(stamp_file(slot, stamp.rank), json.dumps(asdict(stamp)))


def reserve(path: Path, size: int) -> Tensor:
    """uint8 [size]: the memory of a new file. Raises `OSError` where there is not so much, or no such file system."""
    if not ROOT.is_dir():
        raise FileNotFoundError(f"there is no {ROOT}")
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(handle, 0, size)  # to write into a hole of a full file system would kill the process
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(handle)
    return mapped(path, size)


def mapped(path: Path, size: int) -> Tensor:
    """uint8 [size]: what is written into it is in the file."""
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def forget(place: Path) -> None:
    """Take a run's snapshots off this host."""
    shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        place.parent.rmdir()


def left_behind() -> list[tuple[Path, int]]:
    """(folder of a run, bytes) of all snapshots of this user on this host."""
    runs = sorted(root().iterdir()) if root().is_dir() else []
    return [(run, sum(p.stat().st_size for p in run.rglob("*") if p.is_file())) for run in runs]
