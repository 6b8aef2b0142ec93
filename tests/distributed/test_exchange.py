"""Rows in two steps over nodes, and on several connections: equal to one message a pair of ranks, and counted."""

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain import config
from moetrain.distributed import comm
from moetrain.distributed.exchange import SentBytes, find_obstacle
from moetrain.distributed.mesh import Mesh
from moetrain.distributed.shared_memory import ShmChannel
from moetrain.distributed.shared_memory_connect import FAMILY
from moetrain.distributed.transport import NodeGrid, SplitFlows, Transport, TwoLevel
from moetrain.engine.exchange import choose_exchange, expect_bytes
from moetrain.moe.planning.cost import Link, default_costs
from moetrain.training.loop import train
from tests.moe.test_moe import layer_on_ranks
from tests.training.test_train import losses

TWO_NODES = (0, 0, 1, 1)
DTYPES = (torch.float32, torch.bfloat16, torch.int32)


def draw_counts(turn: int, size: int) -> Tensor:
    """[R, R] ragged numbers of rows, a third of them zero; every third turn a rank has nothing for anybody."""
    generator = torch.Generator().manual_seed(turn)
    counts = torch.randint(0, 9, (size, size), generator=generator)
    counts *= torch.rand(size, size, generator=generator) > 0.3
    if turn % 3 == 2:
        counts[turn % size] = 0
    return counts


def make_channels(size: int) -> list[ShmChannel]:
    """Channels between so many ranks of this process."""
    peers: list[dict[int, socket.socket]] = [{} for _ in range(size)]
    for one, two in combinations(range(size), 2):
        peers[one][two], peers[two][one] = socket.socketpair(*FAMILY)
    return [ShmChannel(rank, each, 20.0) for rank, each in enumerate(peers)]


def make_two_level(grid: NodeGrid) -> list[Transport]:
    """The ways of all ranks of a grid, both steps through shared memory of this process."""
    inside = [channel for _ in range(grid.num_nodes) for channel in make_channels(grid.per_node)]
    columns = [make_channels(grid.num_nodes) for _ in range(grid.per_node)]
    return [
        TwoLevel(rank, grid, inside[rank], columns[rank % grid.per_node][rank // grid.per_node])
        for rank in range(grid.num_nodes * grid.per_node)
    ]


def make_split(ranks: int, parts: int) -> list[Transport]:
    bundles = [make_channels(ranks) for _ in range(parts)]
    return [SplitFlows([bundle[rank] for bundle in bundles]) for rank in range(ranks)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_two_level(NodeGrid(2, 2)),
        lambda: make_two_level(NodeGrid(2, 3)),
        lambda: make_two_level(NodeGrid(3, 2)),
        lambda: make_split(3, 2),
        lambda: make_split(2, 4),
    ],
    ids=["2 nodes of 2", "2 nodes of 3", "3 nodes of 2", "2 parts", "4 parts"],
)
def test_every_row_arrives_where_a_plain_all_to_all_brings_it(make: Callable[[], list[Transport]]) -> None:
    ways = make()
    size = len(ways)

    def exchange(rank: int) -> list[Tensor]:
        found = []
        for turn in range(9):
            counts = draw_counts(turn, size)
            rows = torch.arange(int(counts[rank].sum()) * 3, dtype=torch.float32).view(-1, 3) + 1000 * rank
            out = rows.new_empty(int(counts[:, rank].sum()), 3) if turn % 2 else None
            found.append(ways[rank].start(rows, counts[rank].tolist(), counts[:, rank].tolist(), out)().clone())
        return found

    with ThreadPoolExecutor(size) as threads:
        arrived = list(threads.map(exchange, range(size)))
    for turn in range(9):
        counts = draw_counts(turn, size)
        for rank in range(size):
            parts = []
            for source in range(size):
                first = int(counts[source, :rank].sum())
                whole = torch.arange(int(counts[source].sum()) * 3, dtype=torch.float32).view(-1, 3) + 1000 * source
                parts.append(whole[first : first + int(counts[source, rank])])
            assert torch.equal(arrived[rank][turn], torch.cat(parts))
    for way in ways:
        way.close()


def compare_with_gloo(mesh: Mesh) -> tuple[list[bool], str, tuple[str, ...], SentBytes]:
    """Whether transfers under way together equal gloo's, the way in use, the notes, and what was sent."""
    group, me, size = mesh.ep.rows, mesh.ep.rank, mesh.ep.size
    same = []
    for turn in range(6):
        counts, pending = draw_counts(turn, size), []
        send, receive = counts[me].tolist(), counts[:, me].tolist()
        for dtype in DTYPES:
            rows = torch.randint(0, 1000, (sum(send), 5), generator=torch.Generator().manual_seed(me)).to(dtype)
            pending.append((rows, comm.start_all_to_all(rows, send, receive, group)))
        for rows, arriving in reversed(pending):
            expected = rows.new_empty(sum(receive), 5)
            dist.all_to_all_single(expected, rows, receive, send, group=mesh.saving)
            same.append(torch.equal(arriving.wait(), expected))
    return same, mesh.exchange.way, mesh.notes, mesh.exchange.take_sent()


def count_bytes(is_inside: Callable[[int, int], bool], is_between: Callable[[int, int], bool]) -> SentBytes:
    """What the ranks of 2 nodes of 2 send in `compare_with_gloo`, by pairs (source, destination)."""
    row = 5 * sum(dtype.itemsize for dtype in DTYPES)
    inside = between = 0
    for turn in range(6):
        for s, d in ((s, d) for s in range(4) for d in range(4)):
            num_bytes = row * int(draw_counts(turn, 4)[s, d])
            inside += num_bytes * is_inside(s, d)
            between += num_bytes * is_between(s, d)
    return SentBytes(inside, between)


def is_far(s: int, d: int) -> bool:
    return TWO_NODES[s] != TWO_NODES[d]


@pytest.mark.parametrize(("asked", "splits"), [("two_level", 1), ("flat", 2), ("two_level", 3)])
def test_the_ways_agree_with_gloo_and_count_their_bytes(pool, asked: str, splits: int) -> None:
    found = pool.run(compare_with_gloo, 4, nodes=TWO_NODES, exchange=asked, flow_splits=splits)
    for same, way, notes, _ in found:
        assert same == [True] * 18
        assert way == asked
        assert not notes
    sent = SentBytes(*(sum(kind) for kind in zip(*(sent for *_, sent in found), strict=True)))
    if asked == "flat":
        assert sent == count_bytes(lambda s, d: s != d and not is_far(s, d), is_far)
    else:  # whoever is not at the receiver's place hands its rows to the neighbor that is
        assert sent == count_bytes(lambda s, d: s % 2 != d % 2, is_far)


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ((0, 0, 0, 1), "rows travel flat, expert groups do not have equally many ranks"),
        ((0, 1, 0, 1), "rows travel flat, expert groups do not have equally many ranks"),
        ((0, 0, 0, 0), "rows travel flat, all ranks of an expert group are on one node"),
    ],
)
def test_where_two_steps_are_impossible_a_line_says_why(pool, nodes: tuple[int, ...], reason: str) -> None:
    for same, way, notes, _ in pool.run(compare_with_gloo, 4, nodes=nodes, exchange="two_level"):
        assert same == [True] * 18
        assert way == "flat"
        assert reason in notes[0]


def test_obstacles_are_of_all_expert_groups() -> None:
    assert not find_obstacle([(0, 0, 1, 1), (2, 2, 3, 3)])
    assert "one rank" in find_obstacle([(0, 1), (2, 3)])
    assert "equally many" in find_obstacle([(0, 0, 1, 1), (1, 1, 1, 2)])
    assert "one node" in find_obstacle([(0, 0), (1, 1)])


def run_layer_both_ways(mesh: Mesh) -> tuple[list[bool], SentBytes, SentBytes]:
    """A layer with guests, forward and backward, flat and in two steps."""
    mesh.exchange.use("flat")
    one = layer_on_ranks(mesh, [30, 20, 0, 17], 4, "llep")
    flat = mesh.exchange.take_sent()
    mesh.exchange.use("two_level")
    two = layer_on_ranks(mesh, [30, 20, 0, 17], 4, "llep")
    return [torch.equal(one[name], two[name]) for name in one], flat, mesh.exchange.take_sent()


def test_a_layer_is_the_same_bit_for_bit_in_two_steps(pool) -> None:
    found = pool.run(run_layer_both_ways, 4, nodes=TWO_NODES, exchange="auto")
    for same, flat, two_level in found:
        assert same
        assert all(same)
        assert two_level.between == flat.between
    assert sum(two.inside for _, _, two in found) > sum(flat.inside for _, flat, _ in found)


def train_on_nodes(mesh: Mesh, overrides: list[str]) -> tuple[str, str]:
    """The folder of a run, and its log."""
    folder = train(config.load(overrides), mesh)
    return str(folder), (folder / "log.txt").read_text()


def last_row(folder: str) -> dict[str, float]:
    row: dict[str, float] = json.loads(Path(folder, "metrics.jsonl").read_text().splitlines()[-2])
    return row


def test_a_run_is_the_same_bit_for_bit_however_its_rows_travel(pool, tiny: list[str]) -> None:
    more = [*tiny, "train.steps=3", "planner=llep", "planner.min_rows=1", "router.skew=2"]
    run = lambda name, **how: pool.run(train_on_nodes, 4, [*more, f"run.name={name}"], nodes=TWO_NODES, **how)[0]  # noqa: E731
    flat, _ = run("flat")
    steps, _ = run("steps", exchange="two_level", flow_splits=2)
    auto, said = run("auto", exchange="auto")
    assert losses(steps) == losses(auto) == losses(flat)
    rows = [last_row(folder) for folder in (flat, steps)]
    assert rows[0]["perf/bytes_between_nodes"] == rows[1]["perf/bytes_between_nodes"] > 0
    assert rows[0]["perf/bytes_inside_nodes"] < rows[1]["perf/bytes_inside_nodes"]
    assert "ms flat" in said.partition("exchange: ")[2]
    kept = json.loads(Path(auto, "costs.json").read_text())
    assert kept["two_level"]["bandwidth"] > 0


def test_auto_takes_the_way_that_the_links_make_faster() -> None:
    costs = replace(default_costs(), between=Link(2e-3, 1e8), two_level=Link(1e-3, 0.5e8))
    assert choose_exchange(costs, 10_000) == "two_level"  # messages count
    assert choose_exchange(costs, 10_000_000) == "flat"  # bytes count
    assert choose_exchange(default_costs(), 10_000) == "flat"  # not measured
    assert expect_bytes(replace(costs, nodes=(0, 0, 1, 1)), 100) == 50 * costs.row_bytes
