"""All-to-all between ranks of one host through shared memory: their bytes never enter the network stack.

A rank writes what it sends into a block of memory that the others map too, and tells each of them over a Unix socket
where its part lies; that one reads it there and gives the block back when it is done. Blocks are anonymous files
(memfd): they are gone with the processes that hold them, however these end. A rank that dies closes its sockets, and
so ends the others' waits.

Every process of the host can connect to such a socket: a peer is a process of this user that knows a secret, which the
ranks exchange over their process group. Whoever is not is dropped, and never waited for.

R ranks.
"""

import itertools
import mmap
import os
import secrets
import select
import socket
import struct
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

TELL = struct.Struct("<qqq")  # number of the transfer, or GIVEN_BACK; block; first byte
GIVEN_BACK = -1
SMALLEST = 1 << 16  # bytes of a block
MOST_SILENT = 1024  # processes that have connected and not said who they are
FAMILY = (socket.AF_UNIX, socket.SOCK_SEQPACKET)

watchers: list[Callable[[int, int], None]] = []  # told of tensors over shared memory: their number, and bytes or 0
_numbers = itertools.count()


def host_name() -> str:
    """The same for processes that can share memory this way; empty where none can, which needs Linux, memfd, /proc."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')} {os.getuid()}"
    except OSError:
        return ""


class Block:
    """Memory of this rank that others map."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self.size = number, size
        self.file = os.memfd_create("moetrain", os.MFD_CLOEXEC)
        os.ftruncate(self.file, size)
        self.memory = mmap.mmap(self.file, size)
        self.known: set[int] = set()  # the ranks that have mapped it
        self.users = 0  # who has not given it back, this rank included while it has tensors over it


class Told(NamedTuple):
    """Where a part of a transfer lies."""

    block: int
    begin: int


class Lane:
    """The ranks of a group; transfers begin in the same order on each of them and may be waited for in any."""

    def __init__(self, rank: int, peers: dict[int, socket.socket], timeout: float) -> None:
        """`peers`: a socket to every other rank; `timeout` in seconds."""
        self._rank, self._peers, self._timeout = rank, peers, timeout
        self._count = 0  # of transfers
        self._blocks: list[Block] = []
        self._taken: dict[int, Block] = {}  # address -> block that is being filled
        self._theirs: dict[tuple[int, int], mmap.mmap] = {}  # (rank, block)
        self._told: dict[tuple[int, int], Told] = {}  # (rank, transfer)
        self._done: deque[tuple[int, int]] = deque()  # (rank, block) to give back
        for peer in peers.values():
            peer.setblocking(False)

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        while self._blocks:
            os.close(self._blocks.pop().file)

    def outgoing(self, like: Tensor, count: int) -> Tensor:
        """[count, ...] to be filled and sent: then nothing is copied. Rows to this rank itself cannot be in it."""
        if not count:
            return like.new_empty(0, *like.shape[1:])
        block = self._take(count * row_bytes(like))
        rows = self._over(block.memory, 0, like, count, self._rank, block.number)
        self._taken[rows.data_ptr()] = block
        return rows

    def _over(self, memory: mmap.mmap, begin: int, like: Tensor, count: int, owner: int, block: int) -> Tensor:
        """[count, ...] over a part of a block, which is given back to its owner with the last tensor over it."""
        view = memoryview(memory)[begin : begin + count * row_bytes(like)]
        number = next(_numbers)
        for watch in watchers:
            watch(number, len(view))
        weakref.finalize(view, self._end, owner, block, number).atexit = False
        return torch.frombuffer(view, dtype=like.dtype).view(count, *like.shape[1:])

    def _end(self, owner: int, block: int, number: int) -> None:
        """The last tensor over a part is gone, whichever thread let go of it."""
        if owner == self._rank:
            self._done.append((owner, block))
        else:
            try:
                self._peers[owner].send(TELL.pack(GIVEN_BACK, block, 0))
            except OSError:  # the next transfer tries again, or finds out who is gone
                self._done.append((owner, block))
        for watch in watchers:
            watch(number, 0)

    def start(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], out: Tensor | None
    ) -> Callable[[], Tensor]:
        """Send; what is returned waits, and returns what came, perhaps where it lies in another rank's memory."""
        transfer, self._count = self._count, self._count + 1
        self._give_back()
        size, me = row_bytes(rows), self._rank
        begins = [sum(send[:r]) for r in range(len(send))]
        own = rows[begins[me] : begins[me] + send[me]]
        others = [r for r, count in enumerate(send) if count and r != me]
        if others:
            block = self._taken.pop(rows.data_ptr(), None)
            if block is None:
                leaving = self.outgoing(rows, len(rows) - len(own))
                torch.cat([rows[: begins[me]], rows[begins[me] + send[me] :]], out=leaving)
                block = self._taken.pop(leaving.data_ptr())
            for r in others:
                begin = begins[r] - (send[me] if r > me else 0)
                block.users += 1
                self._tell(r, transfer, block, begin * size)

        def finish() -> Tensor:
            sources = [r for r, count in enumerate(receive) if count]
            if out is None and len(sources) == 1 and sources[0] != me:
                return self._came(sources[0], transfer, rows, receive[sources[0]])
            whole = rows.new_empty(sum(receive), *rows.shape[1:]) if out is None else out
            for r, part in enumerate(whole.split(list(receive))):
                if len(part):
                    part.copy_(own if r == me else self._came(r, transfer, rows, len(part)))
            return whole

        return finish

    def _came(self, source: int, transfer: int, like: Tensor, count: int) -> Tensor:
        """[count, ...] where they lie; given back when the last tensor over them is gone."""
        while (source, transfer) not in self._told:
            self._hear(source, wait=True)
        told = self._told.pop((source, transfer))
        return self._over(self._theirs[source, told.block], told.begin, like, count, source, told.block)

    def _take(self, size: int) -> Block:
        """A block that nobody uses."""
        self._give_back()
        for peer in self._peers:
            while self._hear(peer, wait=False):
                pass
        fits = [block for block in self._blocks if not block.users and block.size >= size]
        block = min(fits, key=lambda block: block.size, default=None)
        if block is None:
            rounded = SMALLEST
            while rounded < size:
                rounded *= 2
            step = rounded // 8  # an eighth more than is asked for, at most
            block = Block(len(self._blocks), max(-(-size // step) * step, SMALLEST))
            self._blocks.append(block)
        block.users = 1
        return block

    def _tell(self, to: int, transfer: int, block: Block, begin: int) -> None:
        new = to not in block.known
        block.known.add(to)
        self._send(to, TELL.pack(transfer, block.number, begin), [block.file] if new else [])

    def _give_back(self) -> None:
        while self._done:
            owner, block = self._done.popleft()
            if owner == self._rank:
                self._blocks[block].users -= 1
            else:
                self._send(owner, TELL.pack(GIVEN_BACK, block, 0), [])

    def _send(self, to: int, message: bytes, files: list[int]) -> None:
        try:
            while True:
                try:
                    socket.send_fds(self._peers[to], [message], files)
                    return
                except BlockingIOError:
                    self._await(to, select.POLLOUT)
        except OSError as error:
            raise self._gone(to) from error

    def _hear(self, source: int, wait: bool) -> bool:
        """Take in one message, if there is one."""
        peer = self._peers[source]
        while True:
            try:
                message, files, *_ = socket.recv_fds(peer, TELL.size, 1)
                break
            except BlockingIOError:
                if not wait:
                    return False
                self._give_back()
                self._await(source, select.POLLIN)
            except OSError as error:
                raise self._gone(source) from error
        if not message:
            raise self._gone(source)
        transfer, number, begin = TELL.unpack(message)
        if transfer == GIVEN_BACK:
            self._blocks[number].users -= 1
            return True
        for file in files:
            self._theirs[source, number] = mmap.mmap(file, 0)
            os.close(file)
        self._told[source, transfer] = Told(number, begin)
        return True

    def _await(self, peer: int, event: int) -> None:
        poll = select.poll()
        poll.register(self._peers[peer], event)
        if not poll.poll(1e3 * self._timeout):
            raise RuntimeError(
                f"shared memory: the socket to rank {peer} of the group timed out after {self._timeout:g} s"
            )

    def _gone(self, rank: int) -> RuntimeError:
        return RuntimeError(f"shared memory: connection closed by rank {rank} of the group")


def row_bytes(rows: Tensor) -> int:
    return rows.element_size() * rows.shape[1:].numel()


def connect(rank: int, size: int, exchange: Callable[[str], list[str]], timeout: float) -> Lane | None:
    """A lane among the ranks of a group if all of them are on this host, else None; all ranks call it.

    `exchange(text)`: the texts of all ranks.
    """
    names = exchange(host_name())
    if not names[0] or len(set(names)) > 1 or size == 1:
        return None
    peers: dict[int, socket.socket] = {}
    until = time.monotonic() + timeout
    with socket.socket(*FAMILY) as door:
        secret = secrets.token_hex(16)
        address = _open(door)
        doors = exchange(f"{address} {secret}" if address else "")
        good = all(doors)
        if good:
            try:
                for other in range(rank):
                    peers[other] = socket.socket(*FAMILY)
                    _knock(peers[other], rank, doors[other], until)
                _welcome(door, {f"{r} {secret}".encode(): r for r in range(rank + 1, size)}, peers, until)
            except OSError:
                good = False
    lane = Lane(rank, peers, timeout)
    if all(exchange("good" if good else "")):
        return lane
    lane.close()
    return None


def _knock(peer: socket.socket, rank: int, door: str, until: float) -> None:
    """Connect to a `door`, its address and its secret, and say who this is.

    Raises `OSError` where that cannot be done in time, or somebody else listens.
    """
    address, secret = door.split()
    peer.setblocking(False)
    while True:
        try:
            peer.connect(f"\0{address}")
            break
        except BlockingIOError:  # too many others wait to be let in
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
    if not _is_ours(peer):
        raise PermissionError(f"the socket {address} belongs to another user")
    peer.send(f"{rank} {secret}".encode())


def _welcome(door: socket.socket, greetings: dict[bytes, int], peers: dict[int, socket.socket], until: float) -> None:
    """Let in the ranks that greet so, and add them to `peers`. Raises `TimeoutError` where one has not come by then."""
    poll = select.poll()
    silent: dict[int, socket.socket] = {}  # by file descriptor: connected, and not heard yet
    poll.register(door, select.POLLIN)
    try:
        while greetings:
            if (left := until - time.monotonic()) <= 0:
                raise TimeoutError("a rank of the group did not connect")
            for file, _ in poll.poll(1e3 * left):
                if file != door.fileno():
                    poll.unregister(file)
                    peer = silent.pop(file)
                    if (rank := _greeted(peer, greetings)) is None:
                        peer.close()
                    else:
                        peers[rank] = peer
                    continue
                with suppress(BlockingIOError):
                    peer, _ = door.accept()
                    if not _is_ours(peer) or len(silent) == MOST_SILENT:
                        peer.close()
                        continue
                    peer.setblocking(False)
                    silent[peer.fileno()] = peer
                    poll.register(peer, select.POLLIN)
    finally:
        for peer in silent.values():
            peer.close()


def _greeted(peer: socket.socket, greetings: dict[bytes, int]) -> int | None:
    """The rank that a peer is, which is then no longer expected; None where it is none."""
    with suppress(OSError):
        said = peer.recv(256)
        for greeting in greetings:
            if secrets.compare_digest(said, greeting):
                return greetings.pop(greeting)
    return None


def _is_ours(peer: socket.socket) -> bool:
    """Whether the process at the other end is this user's, as the kernel knows."""
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return user == os.geteuid()


def _open(door: socket.socket) -> str:
    """The address, or nothing if that cannot be had here."""
    address = f"moetrain-{secrets.token_hex(16)}"
    try:
        os.close(os.memfd_create("moetrain", os.MFD_CLOEXEC))
        door.bind(f"\0{address}")
        door.listen()
        door.setblocking(False)
    except OSError:
        return ""
    return address
