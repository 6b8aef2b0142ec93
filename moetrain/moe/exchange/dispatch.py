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

import numpy as np
import torch
from torch import Tensor

from moetrain.distributed.comm import Pending, allocate_outgoing, start_all_to_all
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.kernels.api import Backend
from moetrain.moe.kernels.bags import Bags, find_true, sort_stably, upload
from moetrain.moe.planning.plan import Ints, Plan
from moetrain.moe.routing.base import Routing

Runs = tuple[Ints, Ints]  # values, and how often each of them


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
    num_tokens: int
    most: int  # selections of a token

    @classmethod
    def build(
        cls, routing: Routing, plan: Plan, ep: ExpertGroup, kernels: Backend, num_tokens: int, most: int
    ) -> "DispatchTables":
        """Announce the selections to the ranks that compute them. One host sync: how many copies come and go.

        All ranks of the group call it. `num_tokens`: T; `most`: selections of a token, on any rank.
        """
        me, device = ep.rank, routing.expert_N.device
        sent_ER, received_RE, slots_S = plan.rows(me), plan.received(me), plan.slots(me)
        to_rank, arriving_RS = sent_ER.sum(0), received_RE[:, slots_S]
        announced, received = to_rank + 1, received_RE.sum(1) + 1  # a header stands before every rank's
        real_S, step = arriving_RS.sum(0), kernels.row_step
        rows_S = -(-real_S // step) * step
        ranks, once = np.arange(ep.size), np.ones(ep.size, np.int64)

        # Selections sorted by expert; then each expert's run is cut into what every rank gets.
        (order_N, announcement_N, arrived_A, row_A), (header_R, received_R, first_N, source_A) = _expand(
            device,
            rising=[
                _regroup(sent_ER),
                (ranks + 1, to_rank),
                _regroup(received_RE, slots_S, np.cumsum(received) - received + 1),
                (np.cumsum(rows_S - real_S) - (rows_S - real_S), real_S),
            ],
            level=[
                (np.cumsum(announced) - announced, once),
                (np.cumsum(received) - received, once),
                (ranks * num_tokens, to_rank),
                (np.tile(ranks, len(slots_S)), arriving_RS.T.ravel()),
            ],
        )
        selection_N = sort_stably(routing.expert_N).index_select(0, order_N)
        token_N = routing.token_N.index_select(0, selection_N)
        cell_N = first_N + token_N  # of [R, T]
        goes_RT = torch.zeros(ep.size * num_tokens, dtype=torch.bool, device=device)
        goes_RT.index_fill_(0, cell_N, True)  # an assignment would wait for the device, here and below
        goes_RT = goes_RT.view(ep.size, num_tokens)
        goes_RT[me].fill_(False)
        place_RT = goes_RT.cumsum(1, dtype=torch.int32)  # from one
        copies_R = place_RT[:, -1].clone() if num_tokens else place_RT.new_zeros(ep.size)
        torch.arange(1, num_tokens + 1, out=place_RT[me])
        place_N = place_RT.view(-1).index_select(0, cell_N)

        announcements = torch.empty(int(announced.sum()), 2, dtype=torch.int32, device=device)
        announcements[header_R, 0] = copies_R
        announcements[announcement_N] = torch.stack(
            [place_N, routing.weight_N.detach().index_select(0, selection_N).view(torch.int32)], 1
        )
        announcements = start_all_to_all(announcements, announced.tolist(), received.tolist(), ep.rows).wait()

        arriving_R = announcements[received_R, 0]
        arriving_R[me].fill_(0)
        base_R = arriving_R.cumsum(0) - arriving_R + (num_tokens - 1)  # places count from one
        base_R[me].fill_(-1)
        announcement_A2 = announcements.index_select(0, arrived_A)
        pool_A = announcement_A2[:, 0] + base_R.index_select(0, source_A)
        weight_A = announcement_A2[:, 1].contiguous().view(torch.float32)
        copies_out, copies_in = torch.stack([copies_R, arriving_R]).tolist()  # the host sync
        num_rows, num_pool = int(rows_S.sum()), num_tokens + sum(copies_in)
        pool_M = bag_M = pool_A
        weight_M = weight_A
        if num_rows > len(pool_A):  # padding reads the first row of its slot
            _, (reads_M,) = _expand(device, rising=[], level=[(np.cumsum(real_S) - real_S, rows_S)])
            pool_M = pool_A.index_select(0, reads_M)
            pool_M[row_A] = pool_A
            bag_M = torch.full((num_rows,), num_pool, device=device)
            bag_M[row_A] = pool_A
            weight_M = torch.zeros(num_rows, device=device)
            weight_M[row_A] = weight_A
        token_C = find_true(goes_RT.view(-1), sum(copies_out)) % max(num_tokens, 1)
        return cls(
            ep=ep,
            kernels=kernels,
            selection_N=selection_N,
            announcement_N=announcement_N,
            announced=announced.tolist(),
            received=received.tolist(),
            arrived_A=arrived_A,
            row_A=row_A,
            token_C=token_C,
            copies_out=copies_out,
            copies_in=copies_in,
            pool_M=pool_M,
            weight_M=weight_M,
            slot_rows=rows_S.tolist(),
            bag_M=bag_M,
            num_tokens=num_tokens,
            most=most,
        )

    # Made when rows are first summed: the host has time then, for the device is at the experts.
    @cached_property
    def rows_of_pool(self) -> Bags:
        """The rows that read each entry of the pool."""
        return Bags.group(self.bag_M, self.num_tokens + sum(self.copies_in), self.most)

    @cached_property
    def copies_of_token(self) -> Bags:
        """The copies of each token that were sent."""
        return Bags.group(self.token_C, self.num_tokens, min(self.most, self.ep.size - 1))

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


def _regroup(sizes: Ints, second: list[int] | None = None, first_at: Ints | None = None) -> Runs:
    """Return rising runs: the index that turns an order by (first, second) into one by (second, first).

    `sizes` [first, second] are run lengths; `second` the order of the second key, ascending if None; `first_at`
    where each first key's runs begin, one after another if None.
    """
    ends = np.cumsum(sizes, 1)
    if first_at is None:
        first_at = np.cumsum(ends[:, -1]) - ends[:, -1]
    columns = slice(None) if second is None else second
    start = (ends - sizes + first_at[:, None])[:, columns].T.ravel()
    moved = sizes[:, columns].T.ravel()
    return start - (np.cumsum(moved) - moved), moved


def _expand(device: torch.device, rising: list[Runs], level: list[Runs]) -> tuple[list[Tensor], list[Tensor]]:
    """Return tables of each value so many times; in `rising` ones an element is larger by its place in the table.

    On a GPU all of them are one copy from the host and one expansion there.
    """
    totals = [int(times.sum()) for _, times in (*rising, *level)]
    begins = np.cumsum([0, *totals])
    values = [value - begin for (value, _), begin in zip(rising, begins, strict=False)]
    packed = np.stack(
        [
            np.concatenate([*values, *(value for value, _ in level)]),
            np.concatenate([times for _, times in (*rising, *level)]),
        ]
    )
    if device.type == "cpu":
        flat = torch.from_numpy(np.repeat(*packed))
    else:
        values_times = upload(packed, device)
        flat = values_times[0].repeat_interleave(values_times[1], output_size=sum(totals))
    num_rising = int(begins[len(rising)])
    flat[:num_rising].add_(torch.arange(num_rising, device=device))
    tables = list(flat.split(totals))
    return tables[: len(rising)], tables[len(rising) :]
