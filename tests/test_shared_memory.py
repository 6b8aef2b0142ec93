"""Transfers through shared memory: equal to gloo's, in place, given back, and ended by a peer's end."""

import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain import comm
from moetrain.mesh import Mesh
from moetrain.shared_memory import FAMILY, SMALLEST, Lane, watchers

DTYPES = (torch.float32, torch.bfloat16, torch.int32)


def exchange(mesh: Mesh, times: int) -> tuple[list[bool], int]:
    """Whether each result equals gloo's, and how many blocks of memory there are in the end."""
    group, me, size = mesh.ep.rows, mesh.ep.rank, mesh.ep.size
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
    return same, len(comm._lanes[group]._blocks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_transfers_equal_those_of_gloo(pool, ranks: int) -> None:
    for same, blocks in pool.run(exchange, ranks, 40):
        assert same == [True] * 120
        assert blocks <= 12  # three transfers at a time: memory is used again


@pytest.fixture
def lanes() -> Iterator[tuple[Lane, Lane]]:
    yield from pair(timeout=5.0)


def pair(timeout: float) -> Iterator[tuple[Lane, Lane]]:
    one, two = socket.socketpair(*FAMILY)
    both = Lane(0, {1: one}, timeout), Lane(1, {0: two}, timeout)
    yield both
    for lane in both:
        lane.close()


def send(lanes: tuple[Lane, Lane], rows: Tensor) -> Tensor:
    """From rank 0 to rank 1."""
    finish = [
        lane.start(rows[: len(rows) * (1 - r)], s, t, None)
        for r, (lane, s, t) in enumerate(zip(lanes, ([0, len(rows)], [0, 0]), ([0, 0], [len(rows), 0]), strict=True))
    ]
    finish[0]()
    return finish[1]()


def test_what_came_stays_as_long_as_it_is_held(lanes) -> None:
    first = lanes[0].outgoing(torch.empty(0, 7), 3)
    first.fill_(1.0)
    held = send(lanes, first)[1:]
    del first
    for turn in range(5):
        assert send(lanes, torch.full((3, 7), 2.0 + turn)).eq(2.0 + turn).all()
        assert held.eq(1.0).all()
    assert len(lanes[0]._blocks) == 2
    del held
    for _ in range(5):
        both = [send(lanes, torch.full((3, 7), 3.0)), send(lanes, torch.full((3, 7), 4.0))]
        assert [int(rows[0, 0]) for rows in both] == [3, 4]
        del both
    assert len(lanes[0]._blocks) == 2


def test_what_is_never_sent_is_given_back(lanes) -> None:
    told: list[int] = []
    watchers.append(lambda number, size: told.append(size))
    try:
        for _ in range(3):
            rows = lanes[0].outgoing(torch.empty(0, 7), SMALLEST)
            del rows
        send(lanes, torch.zeros(1, 7))
    finally:
        watchers.pop()
    assert told[:6] == [28 * SMALLEST, 0] * 3
    assert len(lanes[0]._blocks) == 1


def test_a_peer_that_ends_ends_the_wait(lanes) -> None:
    finish = lanes[0].start(torch.zeros(0, 7), [0, 0], [0, 3], None)
    lanes[1].close()
    with pytest.raises(RuntimeError, match="connection closed by rank 1"):
        finish()
    with pytest.raises(RuntimeError, match="connection closed by rank 1"):
        lanes[0].start(torch.zeros(3, 7), [0, 3], [0, 0], None)


def test_a_peer_that_hangs_ends_the_wait() -> None:
    for lanes in pair(timeout=0.05):
        finish = lanes[0].start(torch.zeros(0, 7), [0, 0], [0, 3], None)
        with pytest.raises(RuntimeError, match="timed out"):
            finish()
