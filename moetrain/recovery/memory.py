"""Where snapshots lie: files in the shared memory of a host, which outlive every worker, and what is known of them.

`/dev/shm/moetrain-UID/RUN/HOST/{a,b}/rank_N.safetensors`, each with a stamp beside it, `rank_N.json`: written last, it
is what makes the file count. A host keeps the files of its own ranks and of those that it is a peer to.

Every user of the host can make files in `/dev/shm`. What counts is this user's, in folders that nobody else can write
to, and reached without a link.
"""

import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from moetrain.checkpoint import files
from moetrain.common import disk
from moetrain.distributed.comm import receive, start_sending
from moetrain.distributed.mesh import Mesh

CHUNK = 1 << 26  # bytes of a message between hosts
ROOT = Path("/dev/shm")
SLOTS = ("a", "b")
FETCHED = "fetched"  # from another host, to start with


@dataclass(frozen=True)
class SnapshotStamp:
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


def new_identity(name: str) -> str:
    """Return a new identity for a run of this name; no other run has it."""
    plain = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    return f"{plain[:100]}-{uuid.uuid4().hex[:12]}"


def is_identity(text: str) -> bool:
    """Tell whether a text can be the identity of a run, hence the name of a folder: nothing that leads elsewhere."""
    return re.fullmatch(r"[\w.-]+-[0-9a-f]{12}", text, re.ASCII) is not None


def root() -> Path:
    """Return the folder of all snapshots of this user on this host."""
    return ROOT / f"moetrain-{os.getuid()}"


def host_folder(run: str, host: str) -> Path:
    """Return the folder of a run's snapshots on a host. `run`: its identity."""
    return root() / run / host


def data_file(slot: Path, rank: int) -> Path:
    return slot / f"rank_{rank:05d}.safetensors"


def stamp_file(slot: Path, rank: int) -> Path:
    return slot / f"rank_{rank:05d}.json"


def stamps(place: Path) -> Iterator[tuple[Path, SnapshotStamp]]:
    """Yield (slot, stamp) of the files below a host's folder that are there in their length; their bytes are not
    read."""
    if distrust_reason(place):
        return
    for path in sorted(place.glob("*/rank_*.json")):
        with suppress(OSError, ValueError):
            if distrust_reason(path.parent) or not _is_ours(path):
                continue
            stamp = TypeAdapter(SnapshotStamp).validate_json(disk.read(path))
            data = data_file(path.parent, stamp.rank)
            if isinstance(stamp.layout.get("ranks"), int) and _is_ours(data) and data.stat().st_size == stamp.bytes:
                yield path.parent, stamp


def is_whole(slot: Path, stamp: SnapshotStamp) -> bool:
    """Tell whether the file's bytes are those that were stamped."""
    try:
        return files.stamp(data_file(slot, stamp.rank)) == (stamp.bytes, stamp.crc32)
    except OSError:
        return False


def put_stamp(slot: Path, stamp: SnapshotStamp) -> None:
    disk.write(stamp_file(slot, stamp.rank), json.dumps(asdict(stamp)))


def reserve(path: Path, size: int) -> Tensor:
    """Return uint8 [size], the memory of a new file.

    Raises `OSError` where there is not so much, or no such file system; `PermissionError` where somebody else could
    write to its folder.
    """
    if not ROOT.is_dir():
        raise FileNotFoundError(f"there is no {ROOT}")
    make(path.parent)
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
    """Return uint8 [size] that is mapped to the file: what is written into it is in the file."""
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


def remove(place: Path) -> None:
    """Remove a run's snapshots from this host."""
    if distrust_reason(place):
        return
    shutil.rmtree(place, ignore_errors=True)
    with suppress(OSError):
        place.parent.rmdir()


def make(folder: Path) -> None:
    """Make a folder below `root()`, every level of it this user's alone. Raises `OSError`, see `distrust_reason`."""
    for level in _levels(folder):
        disk.make_private(level)


def distrust_reason(folder: Path) -> str:
    """Return why a folder below `root()` may hold what is somebody else's; empty where it does not, or is not there."""
    with suppress(FileNotFoundError):
        return next(filter(None, map(disk.not_private, _levels(folder))), "")
    return ""


def _levels(folder: Path) -> list[Path]:
    """From `root()` down to it."""
    parts = folder.relative_to(ROOT).parts
    return [ROOT.joinpath(*parts[: n + 1]) for n in range(len(parts))]


def _is_ours(path: Path) -> bool:
    about = path.lstat()
    return stat.S_ISREG(about.st_mode) and about.st_uid == os.getuid()


def left_behind() -> list[tuple[Path, int]]:
    """Return (folder of a run, bytes) of all snapshots of this user on this host."""
    runs = sorted(root().iterdir()) if root().is_dir() and not distrust_reason(root()) else []
    return [(run, sum(p.stat().st_size for p in run.rglob("*") if p.is_file())) for run in runs]


def start_sending_file(data: Tensor, stamp: SnapshotStamp, to: int, mesh: Mesh) -> list[Any]:
    """Begin to send a file to another host's rank: its stamp first, then its bytes, uint8 [bytes].

    Wait for each of what is returned; `data` stays as it is until then.
    """
    text = torch.frombuffer(bytearray(json.dumps(asdict(stamp)).encode()), dtype=torch.uint8)
    return [start_sending(part, to, mesh.peers) for part in (torch.tensor([len(text)]), text, *_chunks(data))]


def receive_stamp(source: int, mesh: Mesh) -> SnapshotStamp:
    """Return the stamp of the file that the rank `source` sends."""
    size = receive(torch.zeros(1, dtype=torch.int64), source, mesh.peers)
    text = receive(torch.zeros(int(size), dtype=torch.uint8), source, mesh.peers)
    return SnapshotStamp(**json.loads(bytes(text.tolist())))


def receive_file(out: Tensor, source: int, mesh: Mesh) -> None:
    """Fill uint8 [bytes] with the file whose stamp has come."""
    for part in _chunks(out):
        receive(part, source, mesh.peers)


def _chunks(data: Tensor) -> Iterator[Tensor]:
    return iter(data.split(CHUNK))
