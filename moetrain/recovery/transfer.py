"""Files of shared memory on their way from rank to rank, over the hosts' network: the stamp first, then the bytes."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from moetrain.distributed.comm import receive, start_sending
from moetrain.distributed.mesh import Mesh
from moetrain.recovery.memory import SnapshotStamp

CHUNK = 1 << 26  # bytes of a message


def start_send(data: Tensor, stamp: SnapshotStamp, to: int, mesh: Mesh) -> list[Any]:
    """Begin to send a file, uint8 [bytes]. Wait for each of what is returned; `data` stays as it is until then."""
    text = torch.frombuffer(bytearray(json.dumps(asdict(stamp)).encode()), dtype=torch.uint8)
    return [start_sending(part, to, mesh.peers) for part in (torch.tensor([len(text)]), text, *_chunks(data))]


def receive_stamp(source: int, mesh: Mesh) -> SnapshotStamp:
    size = receive(torch.zeros(1, dtype=torch.int64), source, mesh.peers)
    text = receive(torch.zeros(int(size), dtype=torch.uint8), source, mesh.peers)
    return SnapshotStamp(**json.loads(bytes(text.tolist())))


def receive_file(out: Tensor, source: int, mesh: Mesh) -> None:
    """Fill uint8 [bytes] with the file whose stamp has come."""
    for part in _chunks(out):
        receive(part, source, mesh.peers)


def _chunks(data: Tensor) -> Iterator[Tensor]:
    return iter(data.split(CHUNK))
