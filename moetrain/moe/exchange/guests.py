"""Guests: copies of experts on other ranks than their home, and the way home of their gradients.

Lending runs on a communicator of its own, so that weights travel while rows do. An expert with many guests is not
sent to each of them by its owner: every guest gets another slice from it, and passes that on to the others; gradients
take the same ways back, every guest summing one slice on the way (`cost_model.RELAY_FROM`).

Weights do not change between the micro-steps of an optimizer step: within a limit a guest stays until the last
backward of the step, its gradient adding up here in fp32. Beyond the limit its weights go after the forward and are
lent again in the backward, and its gradient goes home at once. What every rank lends and keeps follows from the plans
alone, so all ranks agree.

E experts, R ranks, W parameters of an expert, its matrices one after another.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
from torch import Tensor

from moetrain.distributed.comm import outgoing, start_all_to_all
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.planning.cost_model import RELAY_FROM
from moetrain.moe.planning.plan import Ints, Plan

Copy = tuple[int, int, int]  # (expert, home rank, guest rank)


class Parcel(NamedTuple):
    """A part of one packed expert, on its way."""

    source: int
    target: int
    expert: int
    begin: int
    end: int

    def back(self) -> "Parcel":
        return self._replace(source=self.target, target=self.source)


def ways(copies: Sequence[Copy], size: int) -> tuple[list[Parcel], list[Parcel]]:
    """What owners send to guests, and what guests pass on to each other. `copies` sorted, `size` = W."""
    first, second = [], []
    for (expert, home), group in groupby(copies, lambda copy: copy[:2]):
        guests = [guest for _, _, guest in group]
        if len(guests) < RELAY_FROM:
            first += [Parcel(home, guest, expert, 0, size) for guest in guests]
            continue
        cuts = [size * i // len(guests) for i in range(len(guests) + 1)]
        for guest, begin, end in zip(guests, cuts, cuts[1:], strict=False):
            first.append(Parcel(home, guest, expert, begin, end))
            second += [Parcel(guest, other, expert, begin, end) for other in guests if other != guest]
    return first, second


class Mail:
    """Parcels under way on the lending communicator; every rank sends the same list."""

    def __init__(
        self,
        parcels: list[Parcel],
        write: Callable[[Parcel, Tensor], None],
        like: Tensor,
        ep: ExpertGroup,
        ready: Tensor | None = None,
    ) -> None:
        """`write(parcel, out)` fills in what leaves here; `like` gives dtype and device. `ready`: what leaves, filled
        in already, by target, then expert."""
        leaving = sorted((p for p in parcels if p.source == ep.rank), key=lambda p: (p.target, p.expert, p.begin))
        self._coming = sorted((p for p in parcels if p.target == ep.rank), key=lambda p: (p.source, p.expert, p.begin))
        send, receive = [0] * ep.size, [0] * ep.size
        for parcel in leaving:
            send[parcel.target] += parcel.end - parcel.begin
        for parcel in self._coming:
            receive[parcel.source] += parcel.end - parcel.begin
        out = outgoing(like.view(-1), sum(send), ep.lend) if ready is None else ready
        if ready is None:
            for parcel, part in zip(leaving, out.split([p.end - p.begin for p in leaving]), strict=True):
                write(parcel, part)
        self._pending = start_all_to_all(out, send, receive, ep.lend)

    def open(self) -> list[tuple[Parcel, Tensor]]:
        """What came, by source, then expert."""
        came = self._pending.wait().split([p.end - p.begin for p in self._coming])
        return list(zip(self._coming, came, strict=True))


class Lending:
    """Weights on their way to their guests: `start`, then `relay`, then `finish`."""

    def __init__(self, weights: Sequence[Tensor], first: int, copies: Sequence[Copy], ep: ExpertGroup) -> None:
        """`first`: the expert in slot 0 of `weights`."""
        self._ep, self._like = ep, weights[0]
        self._size = size_of(weights)
        parcels, self._second = ways(copies, self._size)
        self._mail = Mail(
            parcels, lambda p, out: _copy([w.detach()[p.expert - first] for w in weights], p, out), self._like, ep
        )
        self._guests: dict[int, Tensor] = {}

    def relay(self) -> None:
        """Pass on what the owners sent in slices."""
        if self._second:  # the same on every rank
            self._collect()
            self._mail = Mail(
                self._second, lambda p, out: _copy([self._guests[p.expert]], p, out), self._like, self._ep
            )

    def _collect(self) -> None:
        for parcel, part in self._mail.open():
            if len(part) == self._size:
                self._guests[parcel.expert] = part
            else:
                whole = self._guests.setdefault(parcel.expert, part.new_empty(self._size))
                whole[parcel.begin : parcel.end] = part

    def finish(self) -> dict[int, Tensor]:
        """The guests that came here: expert -> [W]."""
        self._collect()
        return self._guests


class Returning:
    """Gradients on their way home: `finish` adds them there. Sums run in fp32, in the order of the guests' ranks."""

    def __init__(
        self,
        grads: dict[int, Tensor],
        copies: Sequence[Copy],
        like: Tensor,
        size: int,
        ep: ExpertGroup,
        ready: Tensor | None = None,
    ) -> None:
        """`grads`: [W] of each guest here that leaves. `like` gives the dtype they travel in; `ready`: all of them one
        after another, in that dtype."""
        self._ep, self._like = ep, like
        out, across = ways(copies, size)
        self._home = [p.back() for p in out]
        self._across = [p.back() for p in across]
        self._grads = grads
        write = lambda p, out: _copy([grads[p.expert]], p, out)  # noqa: E731
        self._mail = Mail(self._across or self._home, write, like, ep, ready)

    def _relay(self) -> None:
        """Sum the slice that is due here, and send it home."""
        if not self._across:  # the same on every rank
            return
        sums: dict[int, list[tuple[int, Tensor]]] = {}
        for parcel, part in self._mail.open():
            own = self._grads[parcel.expert][parcel.begin : parcel.end]
            sums.setdefault(parcel.expert, [(self._ep.rank, own)]).append((parcel.source, part))
        done = {e: _sum([part for _, part in sorted(parts, key=lambda x: x[0])]) for e, parts in sums.items()}

        def write(parcel: Parcel, out: Tensor) -> None:
            if parcel.expert in done:
                out.copy_(done[parcel.expert])
            else:
                _copy([self._grads[parcel.expert]], parcel, out)

        self._mail = Mail(self._home, write, self._like, self._ep)

    def finish(self, grads: Sequence[Tensor], first: int, lent_whole: Collection[int]) -> None:
        """Add what came home to the own gradients of its experts; in the slots `lent_whole` it is all there is.

        `first`: the expert in slot 0 of `grads`."""
        self._relay()
        parts: dict[tuple[int, int, int], list[Tensor]] = {}
        for parcel, part in self._mail.open():
            parts.setdefault((parcel.expert, parcel.begin, parcel.end), []).append(part)
        for (expert, begin, end), copies in sorted(parts.items(), key=lambda item: item[0]):
            total, at = _sum(copies), 0
            for grad in grads:
                own = grad[expert - first].view(-1)
                low, high = max(begin, at), min(end, at + len(own))
                if low < high:
                    mine, came = own[low - at : high - at], total[low - begin : high - begin]
                    (mine.copy_ if expert - first in lent_whole else mine.add_)(came)
                at += len(own)


def _copy(matrices: Sequence[Tensor], parcel: Parcel, out: Tensor) -> None:
    """The parcel's part of the packed matrices."""
    at = 0
    for matrix in matrices:
        flat = matrix.reshape(-1)
        low, high = max(parcel.begin, at), min(parcel.end, at + len(flat))
        if low < high:
            out[low - parcel.begin : high - parcel.begin] = flat[low - at : high - at]
        at += len(flat)


def _sum(parts: list[Tensor]) -> Tensor:
    """One after another in fp32; a single one as it is."""
    total = parts[0]
    for part in parts[1:]:
        total = total.float() + part
    return total


@dataclass
class Store:
    """The guests of one layer that stay, here and, by number, on all ranks of the group."""

    slots: int  # guests that a rank keeps at most
    keeps_RE: Ints
    has_RE: Ints  # those whose weights have come
    weights: dict[int, Tensor] = field(default_factory=dict)  # expert -> [W]
    grads: dict[int, Tensor] = field(default_factory=dict)  # expert -> [W] fp32, the sum so far
    grown: bool = False  # gradients of earlier micro-steps wait here or on another rank
    last: bool = True  # this micro-step is the last of the optimizer step
    later: int = 0  # of this micro-step, backwards of the layer after the next one: a chained layer has several

    @classmethod
    def empty(cls, slots: int, num_ranks: int, num_experts: int) -> "Store":
        nobody = np.zeros((num_ranks, num_experts), np.int64)
        return cls(slots, nobody, nobody.copy())

    @property
    def final(self) -> bool:
        """Whether the next backward is the optimizer step's last of this layer."""
        return self.last and not self.later

    def admit(self, plan: Plan) -> None:
        """Keep the guests of `plan`, as far as there is room."""
        for expert, _, guest in plan.guests():
            if not self.keeps_RE[guest, expert] and self.keeps_RE[guest].sum() < self.slots:
                self.keeps_RE[guest, expert] = 1

    def missing(self, plan: Plan) -> list[Copy]:
        """Guests of `plan` whose weights have to come."""
        return [copy for copy in plan.guests() if not self.has_RE[copy[2], copy[0]]]

    def leaving(self, plan: Plan, home: Ints) -> list[Copy]:
        """Guests whose gradients go home with this backward: those that do not stay, and at the last one all."""
        copies = {copy for copy in plan.guests() if self.final or not self.has_RE[copy[2], copy[0]]}
        if self.final:
            copies |= {(e, int(home[e]), r) for r, e in np.argwhere(self.has_RE).tolist()}
        return sorted(copies)

    def close(self) -> None:
        """A backward is over; after the last one of the optimizer step nobody stays."""
        self.grown = not self.final
        if self.final:
            self.reset()
        self.later = max(self.later - 1, 0)

    def reset(self) -> None:
        """Forget all guests, and what has added up."""
        self.grown = False
        self.keeps_RE[:] = 0
        self.has_RE[:] = 0
        self.weights.clear()
        self.grads.clear()


class Packed:
    """Guests' gradients: `packed_GW`, and views of its rows as matrices."""

    def __init__(self, num_guests: int, like: Sequence[Tensor], ep: ExpertGroup) -> None:
        """`like`: [S, ...] each. They are made where they can be sent from."""
        self.packed_GW = outgoing(like[0].new_empty(0, size_of(like)), num_guests, ep.lend)
        split_ = [split(row, like) for row in self.packed_GW]
        self.matrices = [[parts[n] for parts in split_] for n in range(len(like))]

    def zero(self) -> "Packed":
        self.packed_GW.zero_()
        return self


def size_of(like: Sequence[Tensor]) -> int:
    """W; `like`: [S, ...] each, S may be zero."""
    return sum(w.shape[1:].numel() for w in like)


def split(packed_W: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The matrices of one packed expert, as views; `like`: [S, ...] each."""
    parts = packed_W.split([w.shape[1:].numel() for w in like])
    return [part.view(w.shape[1:]) for part, w in zip(parts, like, strict=True)]
