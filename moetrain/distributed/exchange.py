"""The ways that the rows of an expert group can travel, which of them is in use, and how many bytes they have taken."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch.distributed as dist
from torch import Tensor

from moetrain.distributed.comm import GroupTransport, find_transport
from moetrain.distributed.shared_memory import count_row_bytes
from moetrain.distributed.transport import NodeGrid, SplitFlows, Transport, TwoLevel

ExchangeWay = Literal["flat", "two_level"]
AskedExchange = Literal["flat", "two_level", "auto"]


def find_obstacle(nodes_of_groups: Sequence[Sequence[int]]) -> str:
    """Return why rows cannot travel in two steps between ranks of these nodes, [G groups][R]; empty where they can."""
    grids = {NodeGrid.find(nodes) for nodes in nodes_of_groups}
    if all(len(set(nodes)) == 1 for nodes in nodes_of_groups):
        return "all ranks of an expert group are on one node"
    if None in grids or len(grids) > 1:
        return "expert groups do not have equally many ranks, one after another, on each of their nodes"
    return "each node has one rank of an expert group" if any(grid and grid.per_node == 1 for grid in grids) else ""


class SentBytes(NamedTuple):
    """Bytes of rows that this rank's own rows have put on links: every hop counts."""

    inside: int  # from rank to rank of a node
    between: int  # from node to node


class RowExchange:
    """A `Transport` that leads to the one in use. It begins with `flat`, and counts bytes.

    Rows are counted where they begin: in two steps a row for another node may be sent inside its own node first.
    """

    def __init__(
        self, rank: int, nodes: Sequence[int], asked: AskedExchange, ways: Mapping[ExchangeWay, Transport]
    ) -> None:
        """Begin with the way `flat`.

        Arguments:
            rank: of the group.
            nodes: [R] the node of each rank of the group.
            asked: as `parallel.exchange` has it.
            ways: those that there are; `flat` always.
        """
        self.asked: AskedExchange = asked
        order = list(dict.fromkeys(nodes))
        self.nodes = tuple(order.index(node) for node in nodes)  # numbered from 0
        self.way: ExchangeWay = "flat"
        self._ways = ways
        self._inside = self._between = 0
        is_far = np.array(nodes) != nodes[rank]
        is_near = ~is_far
        is_near[rank] = False
        is_elsewhere = is_far | is_near
        if (grid := NodeGrid.find(nodes)) is not None:
            is_elsewhere = np.arange(len(nodes)) % grid.per_node != rank % grid.per_node
        self._is_far, self._is_inside = is_far, {"flat": is_near, "two_level": is_elsewhere}

    @property
    def is_on_one_node(self) -> bool:
        """Whether all ranks of the group are on one node."""
        return len(set(self.nodes)) == 1

    @property
    def is_two_level_possible(self) -> bool:
        """Whether there is a way in two steps."""
        return "two_level" in self._ways

    def use(self, way: ExchangeWay) -> None:
        """Have rows travel this way from now on; all ranks of the group call it at the same place."""
        if way not in self._ways:
            raise ValueError(f"way={way}: there is none between these ranks")
        self.way = way

    @contextmanager
    def using(self, way: ExchangeWay) -> Iterator[None]:
        """Have rows travel this way inside the context; all ranks of the group enter it."""
        before = self.way
        self.use(way)
        try:
            yield
        finally:
            self.use(before)

    def allocate_outgoing(self, like: Tensor, count: int) -> Tensor:
        """Return [count, ...] as the way in use has it."""
        return self._ways[self.way].allocate_outgoing(like, count)

    def start(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], out: Tensor | None
    ) -> Callable[[], Tensor]:
        """Start a transfer on the way in use, and count it."""
        send_R, size = np.asarray(send), count_row_bytes(rows)
        self._between += size * int(send_R[self._is_far].sum())
        self._inside += size * int(send_R[self._is_inside[self.way]].sum())
        return self._ways[self.way].start(rows, send, receive, out)

    def take_sent(self) -> SentBytes:
        """Return the bytes sent since the last call."""
        sent, self._inside, self._between = SentBytes(self._inside, self._between), 0, 0
        return sent

    def close(self) -> None:
        """Close all ways."""
        for transport in self._ways.values():
            transport.close()


class ExchangeMaker(NamedTuple):
    """What the ways between the ranks of one expert group are made of."""

    rows: dist.ProcessGroup  # all ranks of the expert group
    flow_splits: int  # connections of a transfer
    on_host: bool  # whether rows lie in a host's memory, which the ranks of a node share
    make_group: Callable[[Sequence[int]], dist.ProcessGroup]  # of some ranks of the expert group, which all call it
    timeout: float  # of a wait, in seconds

    def connect(
        self, nodes_of_groups: Sequence[Sequence[int]], nodes: Sequence[int], asked: AskedExchange
    ) -> tuple[RowExchange, tuple[str, ...]]:
        """Return the exchange, and lines on what was asked for and cannot be had. All ranks of the world call it.

        `nodes_of_groups` of all expert groups of the world, `nodes` [R] of this one: all come to the same decision.
        """
        rank, notes = self.rows.rank(), []
        if len(set(nodes)) == 1 and self.on_host:
            flat = find_transport(self.rows, self.timeout)
        else:
            flat = self._connect_widely(range(len(nodes)), [self.rows])
        ways: dict[ExchangeWay, Transport] = {"flat": flat}
        obstacle = find_obstacle(nodes_of_groups)
        if asked != "flat" and obstacle:
            notes.append(f"parallel.exchange={asked}: rows travel flat, {obstacle}")
        elif asked != "flat" and (grid := NodeGrid.find(nodes)) is not None:
            ways["two_level"] = self._connect_in_two_steps(rank, grid)
        if self.flow_splits > 1 and self.on_host and all(len(set(each)) == 1 for each in nodes_of_groups):
            notes.append(f"parallel.flow_splits={self.flow_splits}: not used, rows of one host travel in its memory")
        exchange = RowExchange(rank, nodes, asked, ways)
        if asked == "two_level" and exchange.is_two_level_possible:
            exchange.use("two_level")
        return exchange, tuple(notes)

    def _connect_in_two_steps(self, rank: int, grid: NodeGrid) -> TwoLevel:
        node, place = divmod(rank, grid.per_node)
        near = self.make_group(range(node * grid.per_node, (node + 1) * grid.per_node))
        inside = find_transport(near, self.timeout) if self.on_host else GroupTransport(near)
        return TwoLevel(rank, grid, inside, self._connect_widely(range(place, self.rows.size(), grid.per_node), []))

    def _connect_widely(self, ranks: Sequence[int], groups: list[dist.ProcessGroup]) -> Transport:
        """Return a way between these ranks on `flow_splits` connections; `groups`: of theirs, that there are."""
        groups = groups + [self.make_group(ranks) for _ in range(self.flow_splits - len(groups))]
        ways = [GroupTransport(group) for group in groups]
        return ways[0] if len(ways) == 1 else SplitFlows(ways)
