"""Dispatch and combine: tokens travel to the ranks that the plan names, partial sums come back.

A token goes to a rank once, however many of its experts are computed there; what is computed where it lies does not
travel at all. Every rank announces its selections (which of the copies it sends, and the weight), so that partial
sums are formed where the experts are. The two directions are each other's transpose: dispatch brings a [T, D]
tensor to the rows of the slots, combine sums rows back into [T, D]; the backward uses them the other way round. What
travels and is computed are *rows*: token copies, one for each selection of an expert.

The dispatcher holds no parameters and never asks who made the plan. Sums run in fp32 and in a fixed order, without
atomic adds, so that a repeat is equal bit for bit on any device.

T tokens here, D width, N selections made here, C copies sent, P pool: T own tokens, then the copies that arrived,
M rows computed here, A of them announced and the others padding of weight zero (`Backend.row_step`), S slots here, R
ranks, E experts.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.distributed.comm import Pending, allocate_outgoing, start_all_to_all
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.kernels.api import Backend
from moetrain.moe.kernels.bags import Bags
from moetrain.moe.kernels.tables import Travel
from moetrain.moe.planning.plan import Plan
from moetrain.moe.routing.base import Routing


class Tokens(NamedTuple):
    """Tokens, or their gradients, on their way to the ranks that compute with them."""

    pool_PD: Tensor  # complete when `pending` is
    pending: Pending


class Sums(NamedTuple):
    """Partial sums on their way back to the tokens' ranks."""

    own_TD: Tensor
    pending: Pending  # [C, D] those of the copies


@dataclass(frozen=True)
class DispatchTables:
    """One rank's index tables for one layer and micro-step: which rows travel where, and back."""

    ep: ExpertGroup
    kernels: Backend
    selection_N: Tensor  # which selection is the n-th announced (by rank, then expert)
    announcement_N: Tensor  # where its announcement stands
    announced: list[int]  # [R] selections announced to each rank, and one header
    received: list[int]  # [R] what each rank announced here
    arrived_A: Tensor  # where the announcement of each real row stands among those received; rows slot by slot
    row_A: Tensor  # and where the row stands among the M
    token_C: Tensor  # tokens whose copies leave, by rank
    copies_out: list[int]  # [R]
    copies_in: list[int]  # [R]
    pool_M: Tensor  # which entry of the pool each row reads
    weight_M: Tensor  # fp32
    slot_rows: list[int]  # [S]
    bag_M: Tensor  # which entry of the pool each row is summed for; one that is not there for padding
    copies_of_token: Bags  # the copies of each token that were sent
    num_tokens: int
    most: int  # selections of a token

    @classmethod
    def build(
        cls, routing: Routing, plan: Plan, ep: ExpertGroup, kernels: Backend, num_tokens: int, most: int
    ) -> "DispatchTables":
        """Announce the selections to the ranks that compute them. One host sync: how many copies come and go.

        All ranks of the group call it. `num_tokens`: T; `most`: selections of a token, on any rank.
        """
        travel = Travel(
            rank=ep.rank,
            num_tokens=num_tokens,
            sent_ER=plan.rows(ep.rank),
            received_RE=plan.received(ep.rank),
            slots=plan.slots(ep.rank),
            row_step=kernels.row_step,
        )
        index = kernels.tables(travel, routing.expert_N.device)
        out = index.announce(routing.token_N, routing.expert_N, routing.weight_N.detach())
        announced, received = (travel.to_rank + 1).tolist(), travel.received.tolist()  # a header before every rank's
        rows = index.read(start_all_to_all(out.announcements, announced, received, ep.rows).wait())
        copies_out, copies_in = rows.copies.tolist()  # the host sync
        token_C, copies_of_token = index.list_copies(sum(copies_out), min(most, ep.size - 1))
        return cls(
            ep=ep,
            kernels=kernels,
            selection_N=out.selection_N,
            announcement_N=out.announcement_N,
            announced=announced,
            received=received,
            arrived_A=rows.arrived_A,
            row_A=rows.row_A,
            token_C=token_C,
            copies_out=copies_out,
            copies_in=copies_in,
            pool_M=rows.pool_M,
            weight_M=rows.weight_M,
            slot_rows=travel.rows_S.tolist(),
            bag_M=rows.bag_M,
            copies_of_token=copies_of_token,
            num_tokens=num_tokens,
            most=most,
        )

    # Made when rows are first summed: the host has time then, for the device is at the experts.
    @cached_property
    def rows_of_pool(self) -> Bags:
        """The rows that read each entry of the pool."""
        return Bags.group(self.bag_M, self.num_tokens + sum(self.copies_in), self.most)

    def start_dispatch(self, x_TD: Tensor) -> Tokens:
        """Begin to fill the pool [P, D]: own tokens, and the copies under way."""
        if self.ep.size == 1:
            return Tokens(x_TD, Pending(x_TD, None))
        pool_PD = x_TD.new_empty(len(x_TD) + sum(self.copies_in), x_TD.shape[1])
        leaving_CD = allocate_outgoing(x_TD, len(self.token_C), self.ep.rows)
        torch.index_select(x_TD, 0, self.token_C, out=leaving_CD)
        pending = start_all_to_all(leaving_CD, self.copies_out, self.copies_in, self.ep.rows, out=pool_PD[len(x_TD) :])
        pool_PD[: len(x_TD)] = x_TD
        return Tokens(pool_PD, pending)

    def start_combine(self, rows_MD: Tensor, weight_M: Tensor | None) -> Sums:
        """Sum the rows of every entry of the pool, times their weights; begin to send those of others' copies back."""
        sums_PD = self.kernels.sum_rows(rows_MD, weight_M, self.rows_of_pool)
        if self.ep.size == 1:
            return Sums(sums_PD, Pending(sums_PD, None))
        num_tokens = len(sums_PD) - sum(self.copies_in)
        back = start_all_to_all(sums_PD[num_tokens:], self.copies_in, self.copies_out, self.ep.rows)
        return Sums(sums_PD[:num_tokens], back)

    def finish_combine(self, sums: Sums) -> Tensor:
        """Wait; return [T, D]: own sums, and those that came back."""
        if self.ep.size == 1:
            return sums.own_TD
        return self.kernels.sum_rows(sums.pending.wait(), None, self.copies_of_token, sums.own_TD)

    def start_returning(self, value_M: Tensor) -> Pending:
        """Begin to send a number per row back to where its selection was made, headers and all."""
        received = value_M.new_zeros(sum(self.received))
        received[self.arrived_A] = value_M.index_select(0, self.row_A)
        return start_all_to_all(received, self.received, self.announced, self.ep.rows)

    def finish_returning(self, pending: Pending) -> Tensor:
        """Wait; return [N] the numbers, by selection."""
        arrived = pending.wait()
        out_N = arrived.new_empty(len(self.selection_N))
        out_N[self.selection_N] = arrived.index_select(0, self.announcement_N)
        return out_N
