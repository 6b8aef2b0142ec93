"""Guests: expert weights lent to another rank for a while, and their gradients on the way home.

Lending runs on a communicator of its own and starts before the rows leave, so that both travel together. Every
rank of the group enters it whenever the plan lends anything, in forward and in backward.

S home experts here, G guests here, L copies lent from here.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.comm import Pending, start_all_to_all
from moetrain.mesh import Expert
from moetrain.moe.plan import Plan


@dataclass(frozen=True)
class Loan:
    """Who lends what to whom, as one rank sees it."""

    lent_L: list[int]  # home slots of the copies that leave, by borrower, then expert
    send: list[int]  # [R] copies
    receive: list[int]  # [R]

    @classmethod
    def of(cls, plan: Plan, rank: int) -> "Loan":
        own = {expert: slot for slot, expert in enumerate(plan.slots(rank))}
        out = sorted((guest, expert) for expert, home, guest in plan.guests() if home == rank)
        send, receive = [0] * plan.num_ranks, [0] * plan.num_ranks
        for _, home, guest in plan.guests():
            send[guest] += home == rank
            receive[home] += guest == rank
        return cls([own[expert] for _, expert in out], send, receive)


def start(weights: tuple[Tensor, ...], loan: Loan, ep: Expert) -> Pending:
    """Send the lent experts' weights; each expert's matrices travel as one row."""
    return start_all_to_all(_pack([w.detach()[loan.lent_L] for w in weights]), loan.send, loan.receive, ep.lend)


def finish(weights: tuple[Tensor, ...], pending: Pending, loan: Loan, ep: Expert) -> tuple[Tensor, ...]:
    """The weights of all slots here: the home experts' and, behind them, the guests'. Each [S + G, ...]."""
    return _Lend.apply(pending, loan, ep, *weights)


class _Lend(torch.autograd.Function):
    """Gradient: each guest's goes to its home in fp32 and is added there, copy by copy in a fixed order."""

    @staticmethod
    def forward(ctx: Any, pending: Pending, loan: Loan, ep: Expert, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.loan, ctx.ep = loan, ep
        guests = _unpack(pending.wait(), weights)
        return tuple(torch.cat([w, g]) for w, g in zip(weights, guests, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        loan: Loan = ctx.loan
        num_home = grads[0].shape[0] - sum(loan.receive)
        away = _pack([g[num_home:].float() for g in grads])
        returned = start_all_to_all(away, loan.receive, loan.send, ctx.ep.lend)
        home = [g[:num_home].to(torch.float32, copy=True) for g in grads]
        back = _unpack(returned.wait(), home)
        for copy, slot in enumerate(loan.lent_L):
            for total, part in zip(home, back, strict=True):
                total[slot] += part[copy]
        return None, None, None, *(h.to(g.dtype) for h, g in zip(home, grads, strict=True))


def _pack(weights: list[Tensor]) -> Tensor:
    return torch.cat([w.flatten(1) for w in weights], dim=1)


def _unpack(rows: Tensor, like: Any) -> list[Tensor]:
    parts = rows.split([w[0].numel() for w in like], dim=1)
    return [part.reshape(-1, *w.shape[1:]) for part, w in zip(parts, like, strict=True)]
