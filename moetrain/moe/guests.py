"""Guests: copies of experts on other ranks than their home, and the way home of their gradients.

Lending runs on a communicator of its own, so that weights travel while rows do. Weights do not change between the
micro-steps of an optimizer step: within a limit a guest stays until the last backward of the step, its gradient
adding up here in fp32. Beyond the limit its weights go after the forward and are lent again in the backward, and its
gradient goes home at once. What every rank lends and keeps follows from the plans alone, so all ranks agree.

E experts, R ranks, G guests here, L copies lent from here, W parameters of an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moetrain.comm import Pending, start_all_to_all
from moetrain.mesh import Expert
from moetrain.moe.plan import Ints, Plan

Copy = tuple[int, int, int]  # (expert, home rank, guest rank)


@dataclass(frozen=True)
class Loan:
    """Copies under way between homes and guests, as one rank sees them."""

    lent_L: list[int]  # experts whose copies leave, by guest rank, then expert
    borrowed_G: list[int]  # experts that come, by home rank, then expert
    send: list[int]  # [R] copies
    receive: list[int]  # [R]

    @classmethod
    def of(cls, copies: Sequence[Copy], ep: Expert) -> "Loan":
        lent = sorted((guest, expert) for expert, home, guest in copies if home == ep.rank)
        borrowed = sorted((home, expert) for expert, home, guest in copies if guest == ep.rank)
        count = lambda pairs: np.bincount([rank for rank, _ in pairs], minlength=ep.size).tolist()  # noqa: E731
        return cls([e for _, e in lent], [e for _, e in borrowed], count(lent), count(borrowed))


@dataclass
class Store:
    """The guests of one layer that stay, here and, by number, on all ranks of the group."""

    slots: int  # guests that a rank keeps at most
    keeps_RE: Ints
    has_RE: Ints  # those whose weights have come
    weights: dict[int, Tensor] = field(default_factory=dict)  # expert -> [W]
    grads: dict[int, Tensor] = field(default_factory=dict)  # expert -> [W] fp32, the sum so far
    grown: bool = False  # gradients of earlier micro-steps wait here or on another rank
    last: bool = True  # the next backward is the last of this optimizer step

    @classmethod
    def empty(cls, slots: int, num_ranks: int, num_experts: int) -> "Store":
        nobody = np.zeros((num_ranks, num_experts), np.int64)
        return cls(slots, nobody, nobody.copy())

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
        copies = {copy for copy in plan.guests() if self.last or not self.has_RE[copy[2], copy[0]]}
        if self.last:
            copies |= {(e, int(home[e]), r) for r, e in np.argwhere(self.has_RE).tolist()}
        return sorted(copies)

    def close(self) -> None:
        """A backward is over; after the last one of the optimizer step nobody stays."""
        self.grown = not self.last
        if not self.last:
            return
        self.keeps_RE[:] = 0
        self.has_RE[:] = 0
        self.weights.clear()
        self.grads.clear()


def start_lending(weights: Sequence[Tensor], first: int, loan: Loan, ep: Expert) -> Pending:
    """Send the lent experts; `first`: the expert in slot 0 of `weights`. What comes is [G, W]."""
    size = sum(w[0].numel() for w in weights)
    packed_LW = weights[0].new_empty(len(loan.lent_L), size)
    for row_W, expert in zip(packed_LW, loan.lent_L, strict=True):
        torch.cat([w.detach()[expert - first].flatten() for w in weights], out=row_W)
    return start_all_to_all(packed_LW, loan.send, loan.receive, ep.lend)


def start_returning(grads_GW: Tensor, loan: Loan, ep: Expert) -> Pending:
    """Send the guests' gradients home. What comes is [L, W], by guest rank, then expert."""
    return start_all_to_all(grads_GW, loan.receive, loan.send, ep.lend)


def add_returned(grads: Sequence[Tensor], returned_LW: Tensor, first: int, loan: Loan) -> None:
    """Add what came home to the experts' own gradients: in fp32, copy by copy in the order of the guests' ranks."""
    for expert in sorted(set(loan.lent_L)):
        copies = [split(returned_LW[at], grads) for at, lent in enumerate(loan.lent_L) if lent == expert]
        for grad, *parts in zip(grads, *copies, strict=True):
            total = grad[expert - first]
            total.copy_(sum(parts[1:], parts[0].float()).add_(total))


def split(packed_W: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The matrices of one packed expert, as views; `like`: [S, ...] each."""
    parts = packed_W.split([w[0].numel() for w in like])
    return [part.view(w.shape[1:]) for part, w in zip(parts, like, strict=True)]
