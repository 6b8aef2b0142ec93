"""How ranks of one host find each other for `shared_memory`: they connect Unix sockets, and prove who they are.

Every process of the host can connect to such a socket: a peer is a process of this user that knows a secret, which the
ranks exchange over their process group. Whoever is not is dropped, and never waited for.
"""

import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress

from moetrain.distributed.shared_memory import ShmChannel, name_host

MAX_SILENT = 1024  # processes that have connected and not said who they are
FAMILY = (socket.AF_UNIX, socket.SOCK_SEQPACKET)


def connect(rank: int, size: int, exchange: Callable[[str], list[str]], timeout: float) -> ShmChannel | None:
    """Return a channel between the ranks of a group if all of them are on this host, else None; all ranks call it.

    `exchange(text)` returns the texts of all ranks; `timeout` in seconds, of this and of every later wait.
    """
    names = exchange(name_host())
    if not names[0] or len(set(names)) > 1 or size == 1:
        return None
    peers: dict[int, socket.socket] = {}
    until = time.monotonic() + timeout
    with socket.socket(*FAMILY) as listener:
        secret = secrets.token_hex(16)
        address = _listen(listener)
        listeners = exchange(f"{address} {secret}" if address else "")
        good = all(listeners)
        if good:
            try:
                for other in range(rank):
                    peers[other] = socket.socket(*FAMILY)
                    _connect_to(peers[other], rank, listeners[other], until)
                _accept_peers(listener, {f"{r} {secret}".encode(): r for r in range(rank + 1, size)}, peers, until)
            except OSError:
                good = False
    channel = ShmChannel(rank, peers, timeout)
    if all(exchange("good" if good else "")):
        return channel
    channel.close()
    return None


def _connect_to(peer: socket.socket, rank: int, listener: str, until: float) -> None:
    """Connect to a `listener`, given as its address and its secret, and say who this is.

    Raises `OSError` where that cannot be done in time, or somebody else listens.
    """
    address, secret = listener.split()
    peer.setblocking(False)
    while True:
        try:
            peer.connect(f"\0{address}")
            break
        except BlockingIOError:  # too many others wait to be let in
            if time.monotonic() > until:
                raise
            time.sleep(0.01)
    if not _is_own_process(peer):
        raise PermissionError(f"the socket {address} belongs to another user")
    peer.send(f"{rank} {secret}".encode())


def _accept_peers(
    listener: socket.socket, greetings: dict[bytes, int], peers: dict[int, socket.socket], until: float
) -> None:
    """Accept the ranks that send these greetings, and add them to `peers`.

    Raises `TimeoutError` where one has not come by `until` (of the monotonic clock).
    """
    poll = select.poll()
    silent: dict[int, socket.socket] = {}  # by file descriptor: connected, and not heard yet
    poll.register(listener, select.POLLIN)
    try:
        while greetings:
            if (left := until - time.monotonic()) <= 0:
                raise TimeoutError("a rank of the group did not connect")
            for file, _ in poll.poll(1e3 * left):
                if file != listener.fileno():
                    poll.unregister(file)
                    peer = silent.pop(file)
                    if (rank := _match_greeting(peer, greetings)) is None:
                        peer.close()
                    else:
                        peers[rank] = peer
                    continue
                with suppress(BlockingIOError):
                    peer, _ = listener.accept()
                    if not _is_own_process(peer) or len(silent) == MAX_SILENT:
                        peer.close()
                        continue
                    peer.setblocking(False)
                    silent[peer.fileno()] = peer
                    poll.register(peer, select.POLLIN)
    finally:
        for peer in silent.values():
            peer.close()


def _match_greeting(peer: socket.socket, greetings: dict[bytes, int]) -> int | None:
    """Return the rank that a peer is, which is then no longer expected; None where it is none."""
    with suppress(OSError):
        said = peer.recv(256)
        for greeting in greetings:
            if secrets.compare_digest(said, greeting):
                return greetings.pop(greeting)
    return None


def _is_own_process(peer: socket.socket) -> bool:
    """Tell whether the process at the other end is this user's, as the kernel knows."""
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user) == os.geteuid()


def _listen(listener: socket.socket) -> str:
    """Listen at a new address and return it; empty where that cannot be had here."""
    address = f"moetrain-{secrets.token_hex(16)}"
    try:
        os.close(os.memfd_create("moetrain", os.MFD_CLOEXEC))
        listener.bind(f"\0{address}")
        listener.listen()
        listener.setblocking(False)
    except OSError:
        return ""
    return address
