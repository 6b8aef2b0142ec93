"""All-to-all between ranks of one host through shared memory: their bytes never enter the network stack.

A rank writes what it sends into a block of memory that the others map too, and announces to each of them over a Unix
socket where its part lies; that rank reads it there and releases the block when it is done. Blocks are anonymous files
(memfd): they are gone with the processes that hold them, however these end. A rank that dies closes its sockets, and
so ends the others' waits. `shared_memory_connect` makes the sockets.

R ranks.
"""

import itertools
import mmap
import os
import select
import socket
import struct
import sys
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MESSAGE = struct.Struct("<qqq")  # number of the transfer, or RELEASE; number of the block; first byte in it
RELEASE = -1
SMALLEST = 1 << 16  # bytes of a block

observers: list[Callable[[int, int], None]] = []  # called for tensors over shared memory: number, bytes; 0: released
_tensor_numbers = itertools.count()


def name_host() -> str:
    """Return a name that is the same for all processes that can share memory this way.

    Empty where none can: it takes Linux, memfd and /proc.
    """
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')} {os.getuid()}"
    except OSError:
        return ""


class SharedBlock:
    """A block of this rank's memory that others map."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        self.file = os.memfd_create("moetrain", os.MFD_CLOEXEC)
        os.ftruncate(self.file, size)
        self.memory = mmap.mmap(self.file, size)
        self.mapped_by: set[int] = set()  # the ranks that have mapped it
        self.num_users = 0  # ranks that have not released it, this one included while it has tensors over it


class Location(NamedTuple):
    """Where a part of a transfer lies in another rank's memory."""

    block: int
    begin: int


class ShmChannel:
    """A channel between the ranks of a group that are on one host.

    Transfers begin in the same order on each rank, and may be waited for in any.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket], timeout: float) -> None:
        """`peers`: a connected socket to every other rank; `timeout` of a wait, in seconds."""
        self._rank, self._peers, self._timeout = rank, peers, timeout
        self._count = 0  # of transfers
        self._blocks: list[SharedBlock] = []
        self._acquired: dict[int, SharedBlock] = {}  # address -> block that is being filled
        self._mapped: dict[tuple[int, int], mmap.mmap] = {}  # (rank, block)
        self._locations: dict[tuple[int, int], Location] = {}  # (rank, transfer)
        self._finished: deque[tuple[int, int]] = deque()  # (rank, block) to release
        for peer in peers.values():
            peer.setblocking(False)

    def close(self) -> None:
        """Close the sockets and the blocks of this rank."""
        for peer in self._peers.values():
            peer.close()
        while self._blocks:
            os.close(self._blocks.pop().file)

    def allocate_outgoing(self, like: Tensor, count: int) -> Tensor:
        """Return [count, ...] to be filled and sent: then nothing is copied.

        Rows to this rank itself cannot be in it.
        """
        if not count:
            return like.new_empty(0, *like.shape[1:])
        block = self._acquire_block(count * count_row_bytes(like))
        rows = self._map_tensor(block.memory, 0, like, count, self._rank, block.number)
        self._acquired[rows.data_ptr()] = block
        return rows

    def _map_tensor(self, memory: mmap.mmap, begin: int, like: Tensor, count: int, owner: int, block: int) -> Tensor:
        """Return [count, ...] over a part of a block, which is released to its owner with the last tensor over it."""
        view = memoryview(memory)[begin : begin + count * count_row_bytes(like)]
        number = next(_tensor_numbers)
        for observe in observers:
            observe(number, len(view))
        weakref.finalize(view, self._release_part, owner, block, number).atexit = False
        return torch.frombuffer(view, dtype=like.dtype).view(count, *like.shape[1:])

    def _release_part(self, owner: int, block: int, number: int) -> None:
        """Release a part: the last tensor over it is gone, whichever thread let go of it."""
        if owner == self._rank:
            self._finished.append((owner, block))
        else:
            try:
                self._peers[owner].send(MESSAGE.pack(RELEASE, block, 0))
            except OSError:  # the next transfer tries again, or finds out who is gone
                self._finished.append((owner, block))
        for observe in observers:
            observe(number, 0)

    def start(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], out: Tensor | None
    ) -> Callable[[], Tensor]:
        """Send `rows` [sum(send), ...], `send[r]` of them to rank r; `receive[r]` come from rank r.

        Returns a function that waits and returns [sum(receive), ...]: in `out` if given, else perhaps where they lie in
        another rank's memory. It raises `RuntimeError` where a rank is gone, or nothing comes within the timeout.
        """
        transfer, self._count = self._count, self._count + 1
        self._release_blocks()
        size, me = count_row_bytes(rows), self._rank
        begins = [sum(send[:r]) for r in range(len(send))]
        own = rows[begins[me] : begins[me] + send[me]]
        others = [r for r, count in enumerate(send) if count and r != me]
        if others:
            block = self._acquired.pop(rows.data_ptr(), None)
            if block is None:
                packed = self.allocate_outgoing(rows, len(rows) - len(own))
                torch.cat([rows[: begins[me]], rows[begins[me] + send[me] :]], out=packed)
                block = self._acquired.pop(packed.data_ptr())
            for r in others:
                begin = begins[r] - (send[me] if r > me else 0)
                block.num_users += 1
                self._announce_part(r, transfer, block, begin * size)

        def finish() -> Tensor:
            sources = [r for r, count in enumerate(receive) if count]
            if out is None and len(sources) == 1 and sources[0] != me:
                return self._view_part(sources[0], transfer, rows, receive[sources[0]])
            whole = rows.new_empty(sum(receive), *rows.shape[1:]) if out is None else out
            for r, part in enumerate(whole.split(list(receive))):
                if len(part):
                    part.copy_(own if r == me else self._view_part(r, transfer, rows, len(part)))
            return whole

        return finish

    def _view_part(self, source: int, transfer: int, like: Tensor, count: int) -> Tensor:
        """Return [count, ...] where they lie; released when the last tensor over them is gone."""
        while (source, transfer) not in self._locations:
            self._receive_message(source, wait=True)
        location = self._locations.pop((source, transfer))
        return self._map_tensor(
            self._mapped[source, location.block], location.begin, like, count, source, location.block
        )

    def _acquire_block(self, size: int) -> SharedBlock:
        """Return a block that nobody uses, of at least `size` bytes."""
        self._release_blocks()
        for peer in self._peers:
            while self._receive_message(peer, wait=False):
                pass
        fits = [block for block in self._blocks if not block.num_users and block.size >= size]
        block = min(fits, key=lambda block: block.size, default=None)
        if block is None:
            rounded = SMALLEST
            while rounded < size:
                rounded *= 2
            step = rounded // 8  # an eighth more than is asked for, at most
            block = SharedBlock(len(self._blocks), max(-(-size // step) * step, SMALLEST))
            self._blocks.append(block)
        block.num_users = 1
        return block

    def _announce_part(self, to: int, transfer: int, block: SharedBlock, begin: int) -> None:
        new = to not in block.mapped_by
        block.mapped_by.add(to)
        self._send_message(to, MESSAGE.pack(transfer, block.number, begin), [block.file] if new else [])

    def _release_blocks(self) -> None:
        while self._finished:
            owner, block = self._finished.popleft()
            if owner == self._rank:
                self._blocks[block].num_users -= 1
            else:
                self._send_message(owner, MESSAGE.pack(RELEASE, block, 0), [])

    def _send_message(self, to: int, message: bytes, files: list[int]) -> None:
        try:
            while True:
                try:
                    socket.send_fds(self._peers[to], [message], files)
                    return
                except BlockingIOError:
                    self._wait_for(to, select.POLLOUT)
        except OSError as error:
            raise self._closed_error(to) from error

    def _receive_message(self, source: int, wait: bool) -> bool:
        """Receive one message, if there is one. Returns whether there was."""
        peer = self._peers[source]
        while True:
            try:
                message, files, *_ = socket.recv_fds(peer, MESSAGE.size, 1)
                break
            except BlockingIOError:
                if not wait:
                    return False
                self._release_blocks()
                self._wait_for(source, select.POLLIN)
            except OSError as error:
                raise self._closed_error(source) from error
        if not message:
            raise self._closed_error(source)
        transfer, number, begin = MESSAGE.unpack(message)
        if transfer == RELEASE:
            self._blocks[number].num_users -= 1
            return True
        for file in files:
            self._mapped[source, number] = mmap.mmap(file, 0)
            os.close(file)
        self._locations[source, transfer] = Location(number, begin)
        return True

    def _wait_for(self, peer: int, event: int) -> None:
        poll = select.poll()
        poll.register(self._peers[peer], event)
        if not poll.poll(1e3 * self._timeout):
            raise RuntimeError(
                f"shared memory: the socket to rank {peer} of the group timed out after {self._timeout:g} s"
            )

    def _closed_error(self, rank: int) -> RuntimeError:
        return RuntimeError(f"shared memory: connection closed by rank {rank} of the group")


def count_row_bytes(rows: Tensor) -> int:
    """Return the bytes of one row of [M, ...]."""
    return rows.element_size() * rows.shape[1:].numel()
