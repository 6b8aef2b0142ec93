"""The collectives of moetrain. None has a gradient of its own: the nodes that use them send it back.

Every rank of a group enters every one of them, in forward and in backward, with zero-sized parts where it has
nothing to say. Row counts are host integers: what is to be sent is known before anything is.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.distributed.shared_memory_connect import connect

Splits = Sequence[int]
_at_once = False
_channels: "dict[Group, Channel]" = {}


class Channel(Protocol):
    """Carries the all-to-alls of one group in the place of its process group's backend (docs/gpu.md).

    Transfers begin in the same order on every rank, and may be waited for in any.
    """

    def allocate_outgoing(self, like: Tensor, count: int) -> Tensor:
        """Return [count, ...] to be filled and sent as a whole, where this channel can send from."""
        ...

    def start(self, rows: Tensor, send: Splits, receive: Splits, out: Tensor | None) -> Callable[[], Tensor]:
        """Begin to send `send[r]` of `rows` to rank r. Returns a function that waits and returns what came, in `out` if
        given."""
        ...

    def close(self) -> None:
        """Free what the channel holds."""
        ...


class Alone:
    """The group of one process: nothing is ever sent. Stands in where there is no process group."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


ALONE = Alone()
Group = dist.ProcessGroup | Alone


def all_gather(local: Tensor, group: Group) -> Tensor:
    """Return [R, ...]: the tensor [...] of every rank, stacked. No gradient."""
    if isinstance(group, Alone):
        return local[None]
    out = local.new_empty(group.size() * local.numel())
    with warnings.catch_warnings():  # newer versions of torch have a new name for it, older ones do not
        warnings.simplefilter("ignore", FutureWarning)
        dist.all_gather_into_tensor(out, local.flatten(), group=group)
    return out.view(group.size(), *local.shape)


def all_reduce_sum(tensor: Tensor, *groups: Group) -> Tensor:
    """Sum over the ranks of each group in turn, in place; over all ranks where none is named. No gradient."""
    for group in groups or (everyone(),):
        if not isinstance(group, Alone):
            dist.all_reduce(tensor, group=group)
    return tensor


def everyone() -> Group:
    """Return the group of all ranks; this process alone where no process group has been made."""
    if not dist.is_initialized():
        return ALONE
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def broadcast(tensor: Tensor, group: Group | None = None) -> Tensor:
    """Receive the values of the group's rank 0, in place. `group` None: all ranks."""
    group = group or everyone()
    if not isinstance(group, Alone):
        dist.broadcast(tensor, group=group, group_src=0)
    return tensor


def broadcast_text(text: str, device: torch.device, group: Group | None = None) -> str:
    """Return the text of the group's rank 0. `group` None: all ranks."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = broadcast(torch.tensor(len(data), device=device), group)
    if len(data) != int(size):
        data = torch.zeros(int(size), dtype=torch.uint8, device=device)
    return bytes(broadcast(data, group).tolist()).decode()


def gather_texts(text: str, group: dist.ProcessGroup) -> list[str]:
    """Return the text of every rank of a gloo group."""
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
    """Receive in `out` what rank `source` of the world sends."""
    dist.recv(out, source, group=group)
    return out


def barrier(group: Group | None = None) -> None:
    """Wait for the ranks of the group. `group` None: for all."""
    group = group or everyone()
    if not isinstance(group, Alone):
        dist.barrier(group=group)


class Pending:
    """Rows on their way: `wait()` returns what has arrived, [sum(receive), ...].

    On one host perhaps where another rank has put it, so it is not to be written to.
    """

    def __init__(self, out: Tensor | None, finish: Callable[[], Tensor] | None) -> None:
        self._out, self._finish = out, finish

    def wait(self) -> Tensor:
        """Wait for the rows, once; return them."""
        if self._finish is not None:
            self._out, self._finish = self._finish(), None
        assert self._out is not None
        return self._out


def allocate_outgoing(like: Tensor, count: int, group: Group) -> Tensor:
    """Return [count, ...] to fill with rows for other ranks and to send as a whole.

    Perhaps it lies where these can read it.
    """
    channel = _channels.get(group)
    return like.new_empty(count, *like.shape[1:]) if channel is None else channel.allocate_outgoing(like, count)


def start_all_to_all(rows: Tensor, send: Splits, receive: Splits, group: Group, out: Tensor | None = None) -> Pending:
    """Begin to send `rows` [sum(send), ...], `send[r]` of them to rank r. No gradient."""
    if isinstance(group, Alone) or group.size() == 1:
        return Pending(rows, None)
    rows = rows.contiguous()
    channel = _channels.get(group)
    if channel is not None:
        pending = Pending(None, channel.start(rows, send, receive, out))
    else:
        arriving = rows.new_empty(sum(receive), *rows.shape[1:]) if out is None else out
        work = dist.all_to_all_single(arriving, rows, list(receive), list(send), group=group, async_op=True)
        pending = Pending(None, lambda: (work.wait(), arriving)[1])
    if _at_once:
        pending.wait()
    return pending


@contextmanager
def use_shared_memory(groups: Sequence[Group], timeout: float) -> Iterator[None]:
    """Have groups whose ranks are all on this host exchange rows without the network, inside the context."""
    try:
        for group in groups:
            if isinstance(group, Alone):
                continue
            channel = connect(group.rank(), group.size(), partial(gather_texts, group=group), timeout)
            if channel is not None:
                _channels[group] = channel
        yield
    finally:
        for group in groups:
            if group in _channels:
                _channels.pop(group).close()


@contextmanager
def waiting_at_once() -> Iterator[None]:
    """Wait for every transfer where it starts, inside the context: to measure what computing meanwhile is worth."""
    global _at_once
    _at_once = True
    try:
        yield
    finally:
        _at_once = False
