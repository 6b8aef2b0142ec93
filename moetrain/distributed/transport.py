"""How the rows of an all-to-all travel: one protocol, and the ways that are made of other ways.

`comm.GroupTransport` is one message to every rank through the process group, `ShmChannel` shared memory on one host.
`TwoLevel` gathers what goes to another node inside its own node first (hierarchical all-to-all: Tutel, MLSys 2023).
`SplitFlows` cuts every message into parts that travel on connections of their own. All of them move bytes and compute
nothing: the results are equal bit for bit.

R ranks of the group, N nodes of L ranks each: R = N · L, rank r is the (r mod L)-th of node r // L.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Transport(Protocol):
    """Carries the all-to-alls of one group (docs/gpu.md).

    Transfers begin in the same order on each rank, and may be waited for in any.
    """

    def allocate_outgoing(self, like: Tensor, count: int) -> Tensor:
        """Return [count, ...] to fill with rows for other ranks and to send as a whole."""

    def start(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], out: Tensor | None
    ) -> Callable[[], Tensor]:
        """Send `rows` [sum(send), ...], `send[r]` of them to rank r; return a function that waits for what comes.

        It returns [sum(receive), ...] by source rank, in `out` where that is given.
        """

    def close(self) -> None:
        """Release what the way holds; nothing is under way any more."""


class NodeGrid(NamedTuple):
    """N nodes of L ranks each, the ranks of a node one after another."""

    num_nodes: int
    per_node: int

    @classmethod
    def find(cls, nodes: Sequence[int]) -> "NodeGrid | None":
        """Return the grid of ranks whose nodes [R] are these; None where nodes are uneven or interleaved."""
        num_nodes = len(set(nodes))
        per_node, rest = divmod(len(nodes), num_nodes)
        blocks = [set(nodes[first : first + per_node]) for first in range(0, len(nodes), per_node)]
        return None if rest or any(len(block) > 1 for block in blocks) else cls(num_nodes, per_node)


class TwoLevel:
    """All-to-all in two steps: inside the node, then one message to the rank of the same place in each other node.

    A rank hands every row to the neighbor whose place in the node is the receiver's, and sends on what its neighbors
    handed to it. Nodes exchange as many bytes as without it, in 1/L as many messages; inside a node a share of
    (L - 1)/L of them travels once more. How much the neighbors hand over is told to them by a small exchange inside the
    node before. The first step is waited for where the transfer starts.
    """

    def __init__(self, rank: int, grid: NodeGrid, inside: Transport, between: Transport) -> None:
        """Make the way of one rank.

        Arguments:
            rank: of the group.
            grid: the nodes of the group.
            inside: a way between the L ranks of this node.
            between: a way between the N ranks at this place in their nodes.
        """
        self._node, self._place = divmod(rank, grid.per_node)
        self._grid, self._inside, self._between = grid, inside, between

    def allocate_outgoing(self, like: Tensor, count: int) -> Tensor:
        """Return [count, ...]; rows are put in another order before they leave."""
        return like.new_empty(count, *like.shape[1:])

    def start(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], out: Tensor | None
    ) -> Callable[[], Tensor]:
        """Start a transfer as `Transport.start` has it."""
        (num_nodes, per_node), me = self._grid, self._place
        send_NL = np.reshape(np.asarray(send, np.int64), self._grid)
        once = [1] * per_node
        sizes = torch.from_numpy(np.ascontiguousarray(send_NL.T))
        sizes_LN = self._inside.start(sizes, once, once, None)().numpy()  # what each neighbor hands over, by node
        pieces = rows.split(list(send))  # by node, then place

        given = [pieces[n * per_node + place] for place in range(per_node) if place != me for n in range(num_nodes)]
        leaving, coming = send_NL.sum(0), sizes_LN.sum(1)
        leaving[me] = coming[me] = 0  # one's own rows stay where they are
        outgoing = self._inside.allocate_outgoing(rows, int(leaving.sum()))
        torch.cat(given, out=outgoing)
        arrived = self._inside.start(outgoing, leaving.tolist(), coming.tolist(), None)()

        others = [place for place in range(per_node) if place != me]
        handed = iter(arrived.split(sizes_LN[others].ravel().tolist()))
        rows_of = {place: [next(handed) for _ in range(num_nodes)] for place in others}
        rows_of[me] = list(pieces[me::per_node])
        second = torch.cat([rows_of[place][n] for n in range(num_nodes) for place in range(per_node)])
        receive_N = np.reshape(np.asarray(receive, np.int64), self._grid).sum(1)
        return self._between.start(second, sizes_LN.sum(0).tolist(), receive_N.tolist(), out)

    def close(self) -> None:
        """Close both ways."""
        self._inside.close()
        self._between.close()


class SplitFlows:
    """Every message in as many nearly equal parts as there are `ways`, each on a connection of its own."""

    def __init__(self, ways: Sequence[Transport]) -> None:
        """`ways`: between the same ranks."""
        self._ways = ways

    def allocate_outgoing(self, like: Tensor, count: int) -> Tensor:
        """Return [count, ...]; rows are put in another order before they leave."""
        return like.new_empty(count, *like.shape[1:])

    def start(
        self, rows: Tensor, send: Sequence[int], receive: Sequence[int], out: Tensor | None
    ) -> Callable[[], Tensor]:
        """Start a transfer as `Transport.start` has it."""
        sent, received = self._split(send), self._split(receive)
        pieces = rows.split([count for shares in sent for count in shares])
        finish = []
        for part, way in enumerate(self._ways):
            own = torch.cat(pieces[part :: len(self._ways)])
            finish.append(way.start(own, [s[part] for s in sent], [s[part] for s in received], None))

        def wait() -> Tensor:
            whole = rows.new_empty(sum(receive), *rows.shape[1:]) if out is None else out
            places = whole.split([count for shares in received for count in shares])
            for part, arrived in enumerate(finish):
                for place, piece in zip(
                    places[part :: len(finish)], arrived().split([s[part] for s in received]), strict=True
                ):
                    place.copy_(piece)
            return whole

        return wait

    def _split(self, counts: Sequence[int]) -> list[list[int]]:
        """Return the sizes of the parts of each count."""
        num_parts = len(self._ways)
        return [[count // num_parts + (part < count % num_parts) for part in range(num_parts)] for count in counts]

    def close(self) -> None:
        """Close all ways."""
        for way in self._ways:
            way.close()
