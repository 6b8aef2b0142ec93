"""Transfers through shared memory: equal to gloo's, in place, given back, and ended by a peer's end."""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.distributed import comm
from moetrain.distributed.mesh import Mesh
from moetrain.distributed.shared_memory import SMALLEST, ShmChannel, observers
from moetrain.distributed.shared_memory_connect import FAMILY, connect

DTYPES = (torch.float32, torch.bfloat16, torch.int32)


def exchange(mesh: Mesh, times: int) -> tuple[list[bool], int]:
    """Whether each result equals gloo's, and how many blocks of memory there are in the end."""
    group, me, size = mesh.ep.lend, mesh.ep.rank, mesh.ep.size
    same: list[bool] = []
    for turn in range(times):
        torch.manual_seed(turn % 10)  # the same on every rank
        counts = [torch.randint(0, 9, (size, size)).mul(torch.rand(size, size) > 0.3) for _ in DTYPES]
        sent, pending = [], []
        for counts_RR, dtype in zip(counts, DTYPES, strict=True):
            send, receive = counts_RR[me].tolist(), counts_RR[:, me].tolist()
            rows = torch.randint(0, 1000, (sum(send), 50, 100), generator=torch.Generator().manual_seed(me)).to(dtype)
            out = rows.new_empty(sum(receive), 50, 100) if turn % 2 else None
            sent.append((rows, send, receive))
            pending.append(comm.start_all_to_all(rows, send, receive, group, out))
        for (rows, send, receive), arriving in reversed(list(zip(sent, pending, strict=True))):
            expected = rows.new_empty(sum(receive), 50, 100)
            dist.all_to_all_single(expected, rows, receive, send, group=group)
            same.append(torch.equal(arriving.wait(), expected))
        del arriving, pending
    return same, len(comm._transports[group]._blocks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_transfers_equal_those_of_gloo(pool, ranks: int) -> None:
    for same, blocks in pool.run(exchange, ranks, 40):
        assert same == [True] * 120
        assert blocks <= 12  # three transfers at a time: memory is used again


@pytest.fixture
def channels() -> Iterator[tuple[ShmChannel, ShmChannel]]:
    yield from pair(timeout=5.0)


def pair(timeout: float) -> Iterator[tuple[ShmChannel, ShmChannel]]:
    one, two = socket.socketpair(*FAMILY)
    both = ShmChannel(0, {1: one}, timeout), ShmChannel(1, {0: two}, timeout)
    yield both
    for channel in both:
        channel.close()


def send(channels: tuple[ShmChannel, ShmChannel], rows: Tensor) -> Tensor:
    """From rank 0 to rank 1."""
    finish = [
        channel.start(rows[: len(rows) * (1 - r)], s, t, None)
        for r, (channel, s, t) in enumerate(
            zip(channels, ([0, len(rows)], [0, 0]), ([0, 0], [len(rows), 0]), strict=True)
        )
    ]
    finish[0]()
    return finish[1]()


def test_what_came_stays_as_long_as_it_is_held(channels) -> None:
    first = channels[0].allocate_outgoing(torch.empty(0, 7), 3)
    first.fill_(1.0)
    held = send(channels, first)[1:]
    del first
    for turn in range(5):
        assert send(channels, torch.full((3, 7), 2.0 + turn)).eq(2.0 + turn).all()
        assert held.eq(1.0).all()
    assert len(channels[0]._blocks) == 2
    del held
    for _ in range(5):
        both = [send(channels, torch.full((3, 7), 3.0)), send(channels, torch.full((3, 7), 4.0))]
        assert [int(rows[0, 0]) for rows in both] == [3, 4]
        del both
    assert len(channels[0]._blocks) == 2


def test_what_is_never_sent_is_released(channels) -> None:
    told: list[int] = []
    observers.append(lambda number, size: told.append(size))
    try:
        for _ in range(3):
            rows = channels[0].allocate_outgoing(torch.empty(0, 7), SMALLEST)
            del rows
        send(channels, torch.zeros(1, 7))
    finally:
        observers.pop()
    assert told[:6] == [28 * SMALLEST, 0] * 3
    assert len(channels[0]._blocks) == 1


def test_a_peer_that_ends_ends_the_wait(channels) -> None:
    finish = channels[0].start(torch.zeros(0, 7), [0, 0], [0, 3], None)
    channels[1].close()
    with pytest.raises(RuntimeError, match="connection closed by rank 1"):
        finish()
    with pytest.raises(RuntimeError, match="connection closed by rank 1"):
        channels[0].start(torch.zeros(3, 7), [0, 3], [0, 0], None)


def test_a_peer_that_hangs_ends_the_wait() -> None:
    for channels in pair(timeout=0.05):
        finish = channels[0].start(torch.zeros(0, 7), [0, 0], [0, 3], None)
        with pytest.raises(RuntimeError, match="timed out"):
            finish()


def connected(intrude: Callable[[str], object], timeout: float = 20.0) -> list[ShmChannel | None]:
    """Two ranks, one a thread, that connect; before the second does, `intrude` has the address of the first."""
    texts, barrier = ["", ""], threading.Barrier(2)

    def exchange(rank: int, text: str) -> list[str]:
        texts[rank] = text
        barrier.wait()
        found = [*texts]
        barrier.wait()
        if rank == 1 and text.startswith("moetrain-"):
            intrude(found[0].split()[0])
        return found

    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(connect, rank, 2, partial(exchange, rank), timeout) for rank in range(2)]
        return [each.result() for each in both]


def intruder(address: str, *said: bytes) -> socket.socket:
    """As any process of the host can: the names of such sockets are in /proc/net/unix."""
    peer = socket.socket(*FAMILY)
    peer.connect(f"\0{address}")
    for text in said:
        peer.send(text)
    return peer


def test_whoever_does_not_know_the_secret_is_dropped() -> None:
    """Silent, talking rubbish, gone at once, or with the address for a secret: the ranks find each other."""
    there: list[socket.socket] = []

    def intrude(address: str) -> None:
        said = (b"\xff\xfe", b"junk", b"1 ", f"1 {address}".encode(), b"x" * 10_000)
        there.extend(intruder(address, text) for text in said)
        there.extend(intruder(address) for _ in range(3))
        intruder(address).close()

    one, two = connected(intrude)
    assert one is not None
    assert two is not None
    assert send((one, two), torch.full((3, 7), 5.0)).eq(5.0).all()
    for peer in there:
        peer.settimeout(5)
        with suppress(ConnectionResetError):  # with what it has said unread
            assert peer.recv(1) == b""
        peer.close()
    for channel in (one, two):
        channel.close()


def test_processes_of_other_users_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, here: then there is no shared memory, and all ranks know."""
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert connected(lambda address: None, timeout=0.2) == [None, None]
