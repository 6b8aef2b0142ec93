"""The collectives of moetrain. None has a gradient of its own: the nodes that use them send it back.

Every rank of a group enters every one of them, in forward and in backward, with zero-sized parts where it has
nothing to say. Row counts are host integers: what is to be sent is known before anything is.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.distributed import shared_memory as lanes

Splits = Sequence[int]
_at_once = False
_lanes: dict[dist.ProcessGroup, lanes.Lane] = {}


def all_gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[...] of every rank, stacked: [R, ...]. No gradient."""
    out = local.new_empty(group.size() * local.numel())
    with warnings.catch_warnings():  # newer versions of torch have a new name for it, older ones do not
        warnings.simplefilter("ignore", FutureWarning)
        dist.all_gather_into_tensor(out, local.flatten(), group=group)
    return out.view(group.size(), *local.shape)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Summed over all ranks, in place. No gradient."""
    dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's values, in place."""
    dist.broadcast(tensor, 0)
    return tensor


def broadcast_text(text: str, device: torch.device) -> str:
    """Rank 0's text."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = broadcast(torch.tensor(len(data), device=device))
    if len(data) != int(size):
        data = torch.zeros(int(size), dtype=torch.uint8, device=device)
    return bytes(broadcast(data).tolist()).decode()


def gather_texts(text: str, group: dist.ProcessGroup) -> list[str]:
    """The text of every rank of a gloo group."""
    data = torch.from_numpy(np.frombuffer(text.encode(), dtype=np.uint8).copy())
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
    longest = max(int(size) for size in sizes)
    rows = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(rows, torch.cat([data, data.new_zeros(longest - len(data))]), group=group)
    return [bytes(row[: int(size)].numpy()).decode() for row, size in zip(rows, sizes, strict=True)]


def start_sending(tensor: Tensor, to: int, group: dist.ProcessGroup) -> Any:
    """Begin to send to rank `to` of the world; wait for what is returned."""
    return dist.isend(tensor, to, group=group)


def receive(out: Tensor, source: int, group: dist.ProcessGroup) -> Tensor:
    """What rank `source` of the world sends, in `out`."""
    dist.recv(out, source, group=group)
    return out


def barrier() -> None:
    dist.barrier()


class Pending:
    """Rows under way: `wait()` returns what came in, [sum(receive), ...]; on one host perhaps where another rank has
    put it, so it is not to be written to."""

    def __init__(self, out: Tensor | None, finish: Callable[[], Tensor] | None) -> None:
        self._out, self._finish = out, finish

    def wait(self) -> Tensor:
        if self._finish is not None:
            self._out, self._finish = self._finish(), None
        assert self._out is not None
        return self._out


def outgoing(like: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    """[count, ...] to fill with rows for other ranks and to send as a whole: perhaps where these can read them."""
    lane = _lanes.get(group)
    return like.new_empty(count, *like.shape[1:]) if lane is None else lane.outgoing(like, count)


def start_all_to_all(
    rows: Tensor, send: Splits, receive: Splits, group: dist.ProcessGroup, out: Tensor | None = None
) -> Pending:
    """Begin to send `rows` [sum(send), ...], `send[r]` of them to rank r. No gradient."""
    if group.size() == 1:
        return Pending(rows, None)
    rows = rows.contiguous()
    lane = _lanes.get(group)
    if lane is not None:
        pending = Pending(None, lane.start(rows, send, receive, out))
    else:
        arriving = rows.new_empty(sum(receive), *rows.shape[1:]) if out is None else out
        work = dist.all_to_all_single(arriving, rows, list(receive), list(send), group=group, async_op=True)
        pending = Pending(None, lambda: (work.wait(), arriving)[1])
    if _at_once:
        pending.wait()
    return pending


@contextmanager
def shared_memory(groups: Sequence[dist.ProcessGroup], timeout: float) -> Iterator[None]:
    """Where all ranks of a group are on this host, its all-to-alls leave out the network."""
    try:
        for group in groups:
            lane = lanes.connect(group.rank(), group.size(), partial(gather_texts, group=group), timeout)
            if lane is not None:
                _lanes[group] = lane
        yield
    finally:
        for group in groups:
            if group in _lanes:
                _lanes.pop(group).close()


@contextmanager
def waiting_at_once() -> Iterator[None]:
    """Every transfer is waited for where it starts: to measure what it is worth to compute meanwhile."""
    global _at_once
    _at_once = True
    try:
        yield
    finally:
        _at_once = False
