"""The collectives of moetrain. None has a gradient of its own: the nodes that use them send it back.

Every rank of a group enters every one of them, in forward and in backward, with zero-sized parts where it has
nothing to say. Row counts are host integers: what is to be sent is known before anything is.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.distributed.shared_memory_connect import connect
from moetrain.distributed.transport import Transport

Splits = Sequence[int]
_at_once = False
_transports: "dict[Group, Transport]" = {}  # of the groups whose rows do not simply go through the process group


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
    transport = _transports.get(group)
    return like.new_empty(count, *like.shape[1:]) if transport is None else transport.allocate_outgoing(like, count)


def start_all_to_all(rows: Tensor, send: Splits, receive: Splits, group: Group, out: Tensor | None = None) -> Pending:
    """Begin to send `rows` [sum(send), ...], `send[r]` of them to rank r. No gradient."""
    if isinstance(group, Alone) or group.size() == 1:
        return Pending(rows, None)
    transport = _transports.get(group) or GroupTransport(group)
    pending = Pending(None, transport.start(rows.contiguous(), send, receive, out))
    if _at_once:
        pending.wait()
    return pending


class GroupTransport:
    """A `Transport` through a process group: one message to each of its ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """`group`: whose ranks exchange rows, on the connections or the communicator that it has."""
        self._group = group

    def allocate_outgoing(self, like: Tensor, count: int) -> Tensor:
        """Return [count, ...] of ordinary memory."""
        return like.new_empty(count, *like.shape[1:])

    def start(self, rows: Tensor, send: Splits, receive: Splits, out: Tensor | None) -> Callable[[], Tensor]:
        """Start a transfer as `Transport.start` has it."""
        arriving = rows.new_empty(sum(receive), *rows.shape[1:]) if out is None else out
        work = dist.all_to_all_single(arriving, rows, list(receive), list(send), group=self._group, async_op=True)
        return lambda: (work.wait(), arriving)[1]

    def close(self) -> None:
        """Leave the group as it is: who made it ends it."""


def find_transport(group: dist.ProcessGroup, timeout: float) -> Transport:
    """Return a way through shared memory where all ranks of a gloo group are on this host, else through the group.

    All ranks of the group call it; `timeout` of a wait, in seconds.
    """
    return connect(group.rank(), group.size(), partial(gather_texts, group=group), timeout) or GroupTransport(group)


@contextmanager
def use_transports(transports: "Mapping[Group, Transport]") -> Iterator[None]:
    """Have the rows of these groups travel so inside the context, which closes the transports in the end."""
    _transports.update(transports)
    try:
        yield
    finally:
        for group, transport in transports.items():
            if _transports.pop(group, None) is not None:
                transport.close()


@contextmanager
def waiting_at_once() -> Iterator[None]:
    """Wait for every transfer where it starts, inside the context: to measure what computing meanwhile is worth."""
    global _at_once
    _at_once = True
    try:
        yield
    finally:
        _at_once = False
