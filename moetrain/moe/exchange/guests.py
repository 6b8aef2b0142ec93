"""Lending: weights of experts travel to their guests, and gradients of the guests travel home.

A guest is a temporary replica of an expert on another rank than its home. Lending runs on a communicator of its own, so
that weights travel while rows do. An expert with many guests is not sent to each of them by its owner: every guest gets
another slice from it, and passes that on to the others; gradients take the same ways back, every guest summing one
slice on the way (`cost_model.RELAY_FROM`).

R ranks, S slots here, G guests here, W parameters of an expert, its matrices one after another.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from moetrain.distributed.comm import allocate_outgoing, start_all_to_all
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.planning.cost_model import RELAY_FROM

Copy = tuple[int, int, int]  # (expert, home rank, guest rank)


class WeightSlice(NamedTuple):
    """A part of one packed expert, on its way: elements `begin` to `end` of its W."""

    source: int
    target: int
    expert: int
    begin: int
    end: int

    def reverse(self) -> "WeightSlice":
        """Return the same part on its way back."""
        return self._replace(source=self.target, target=self.source)


def plan_slices(copies: Sequence[Copy], size: int) -> tuple[list[WeightSlice], list[WeightSlice]]:
    """Return what owners send to guests, and what guests pass on to each other. `copies` sorted, `size` = W."""
    first, second = [], []
    for (expert, home), group in groupby(copies, lambda copy: copy[:2]):
        guests = [guest for _, _, guest in group]
        if len(guests) < RELAY_FROM:
            first += [WeightSlice(home, guest, expert, 0, size) for guest in guests]
            continue
        cuts = [size * i // len(guests) for i in range(len(guests) + 1)]
        for guest, begin, end in zip(guests, cuts, cuts[1:], strict=False):
            first.append(WeightSlice(home, guest, expert, begin, end))
            second += [WeightSlice(guest, other, expert, begin, end) for other in guests if other != guest]
    return first, second


class SliceTransfer:
    """Slices under way on the lending communicator; every rank starts the same list."""

    def __init__(
        self,
        slices: list[WeightSlice],
        write: Callable[[WeightSlice, Tensor], None],
        like: Tensor,
        ep: ExpertGroup,
        ready: Tensor | None = None,
    ) -> None:
        """Begin to send. `write(part, out)` fills in a slice that leaves here; `like` gives dtype and device.

        `ready`: what leaves, filled in already, by target, then expert.
        """
        leaving = sorted((p for p in slices if p.source == ep.rank), key=lambda p: (p.target, p.expert, p.begin))
        self._coming = sorted((p for p in slices if p.target == ep.rank), key=lambda p: (p.source, p.expert, p.begin))
        send, receive = [0] * ep.size, [0] * ep.size
        for slice_ in leaving:
            send[slice_.target] += slice_.end - slice_.begin
        for slice_ in self._coming:
            receive[slice_.source] += slice_.end - slice_.begin
        out = allocate_outgoing(like.view(-1), sum(send), ep.lend) if ready is None else ready
        if ready is None:
            for slice_, part in zip(leaving, out.split([p.end - p.begin for p in leaving]), strict=True):
                write(slice_, part)
        self._pending = start_all_to_all(out, send, receive, ep.lend)

    def finish(self) -> list[tuple[WeightSlice, Tensor]]:
        """Wait; return the slices that came here, by source, then expert."""
        arrived = self._pending.wait().split([p.end - p.begin for p in self._coming])
        return list(zip(self._coming, arrived, strict=True))


class Lending:
    """Weights on their way to their guests: it starts when it is made; then `relay`, then `finish`."""

    def __init__(self, weights: Sequence[Tensor], first_expert: int, copies: Sequence[Copy], ep: ExpertGroup) -> None:
        """Begin to send. `weights` [S, ...] each, from `first_expert` on; `copies`: what is lent, sorted."""
        self._ep, self._like = ep, weights[0]
        self._size = packed_size(weights)
        slices, self._second = plan_slices(copies, self._size)
        self._transfer = SliceTransfer(
            slices, lambda p, out: _copy([w.detach()[p.expert - first_expert] for w in weights], p, out), self._like, ep
        )
        self._guests: dict[int, Tensor] = {}

    def relay(self) -> None:
        """Pass on what the owners sent in slices; waits for it."""
        if self._second:  # the same on every rank
            self._collect()
            self._transfer = SliceTransfer(
                self._second, lambda p, out: _copy([self._guests[p.expert]], p, out), self._like, self._ep
            )

    def _collect(self) -> None:
        for slice_, part in self._transfer.finish():
            if len(part) == self._size:
                self._guests[slice_.expert] = part
            else:
                whole = self._guests.setdefault(slice_.expert, part.new_empty(self._size))
                whole[slice_.begin : slice_.end] = part

    def finish(self) -> dict[int, Tensor]:
        """Wait; return the guests that came here: expert -> [W]."""
        self._collect()
        return self._guests


class Returning:
    """Gradients on their way home: `finish` adds them there. Sums run in fp32, in the order of the guests' ranks.

    The communicator returns what `Lending` lent: the same slices, backwards.
    """

    def __init__(
        self,
        grads: dict[int, Tensor],
        copies: Sequence[Copy],
        like: Tensor,
        size: int,
        ep: ExpertGroup,
        ready: Tensor | None = None,
    ) -> None:
        """Begin to send. `grads`: expert -> [W] of each guest here that leaves; `size` = W.

        `like` gives the dtype that they travel in; `ready`: all of them one after another, in that dtype.
        """
        self._ep, self._like = ep, like
        out, across = plan_slices(copies, size)
        self._home = [p.reverse() for p in out]
        self._across = [p.reverse() for p in across]
        self._grads = grads
        write = lambda p, out: _copy([grads[p.expert]], p, out)  # noqa: E731
        self._transfer = SliceTransfer(self._across or self._home, write, like, ep, ready)

    def _relay(self) -> None:
        """Sum the slice that is due here, and send it home."""
        if not self._across:  # the same on every rank
            return
        sums: dict[int, list[tuple[int, Tensor]]] = {}
        for slice_, part in self._transfer.finish():
            own = self._grads[slice_.expert][slice_.begin : slice_.end]
            sums.setdefault(slice_.expert, [(self._ep.rank, own)]).append((slice_.source, part))
        done = {e: _sum([part for _, part in sorted(parts, key=lambda x: x[0])]) for e, parts in sums.items()}

        def write(slice_: WeightSlice, out: Tensor) -> None:
            if slice_.expert in done:
                out.copy_(done[slice_.expert])
            else:
                _copy([self._grads[slice_.expert]], slice_, out)

        self._transfer = SliceTransfer(self._home, write, self._like, self._ep)

    def finish(self, grads: Sequence[Tensor], first_expert: int, overwritten: Collection[int]) -> None:
        """Wait; add what came home to the gradients `grads` [S, ...] of the experts here, from `first_expert` on.

        In the slots `overwritten` it is all there is, and takes the place of what stands there.
        """
        self._relay()
        parts: dict[tuple[int, int, int], list[Tensor]] = {}
        for slice_, part in self._transfer.finish():
            parts.setdefault((slice_.expert, slice_.begin, slice_.end), []).append(part)
        for (expert, begin, end), copies in sorted(parts.items(), key=lambda item: item[0]):
            total, at = _sum(copies), 0
            for grad in grads:
                own = grad[expert - first_expert].view(-1)
                low, high = max(begin, at), min(end, at + len(own))
                if low < high:
                    mine, arrived = own[low - at : high - at], total[low - begin : high - begin]
                    (mine.copy_ if expert - first_expert in overwritten else mine.add_)(arrived)
                at += len(own)


def _copy(matrices: Sequence[Tensor], slice_: WeightSlice, out: Tensor) -> None:
    """Copy the slice of the packed matrices to `out`."""
    at = 0
    for matrix in matrices:
        flat = matrix.reshape(-1)
        low, high = max(slice_.begin, at), min(slice_.end, at + len(flat))
        if low < high:
            out[low - slice_.begin : high - slice_.begin] = flat[low - at : high - at]
        at += len(flat)


def _sum(parts: list[Tensor]) -> Tensor:
    """Add them one after another in fp32; a single one stays as it is."""
    total = parts[0]
    for part in parts[1:]:
        total = total.float() + part
    return total


class PackedGradients:
    """Guests' gradients: `packed_GW`, and views of its rows as matrices."""

    def __init__(self, num_guests: int, like: Sequence[Tensor], ep: ExpertGroup) -> None:
        """Make room for them where they can be sent from, not filled in; `like` [S, ...] each gives shapes, dtype."""
        self.packed_GW = allocate_outgoing(like[0].new_empty(0, packed_size(like)), num_guests, ep.lend)
        rows = [split_packed(row, like) for row in self.packed_GW]
        self.matrices = [[parts[n] for parts in rows] for n in range(len(like))]

    def fill_zero(self) -> "PackedGradients":
        """Set all of them to zero."""
        self.packed_GW.zero_()
        return self


def packed_size(like: Sequence[Tensor]) -> int:
    """Return W; `like`: [S, ...] each, S may be zero."""
    return sum(w.shape[1:].numel() for w in like)


def split_packed(packed_W: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the matrices of one packed expert, as views; `like`: [S, ...] each gives their shapes."""
    parts = packed_W.split([w.shape[1:].numel() for w in like])
    return [part.view(w.shape[1:]) for part, w in zip(parts, like, strict=True)]
