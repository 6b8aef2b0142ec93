"""Dispatch and combine: tokens travel to the ranks that the plan names, partial sums come back.

A token goes to a rank once, however many of its experts are computed there; what is computed where it lies does not
travel at all. Every rank announces its selections (which of the copies it sends, and the weight), so that partial
sums are formed where the experts are. The two directions are each other's transpose: dispatch brings a [T, D]
tensor to the rows of the slots, combine sums rows back into [T, D]; the backward uses them the other way round. What
travels and is computed are *rows*: token copies, one for each selection of an expert.

The dispatcher holds no parameters and never asks who made the plan. Sums run in fp32 and in a fixed order, without
atomic adds, so that a repeat is equal bit for bit on any device.

Rows may be computed in chunks (`chunks`, `transfers`): then they stand chunk by chunk, and slot by slot in each.

T tokens here, D width, N selections made here, C copies sent, P pool: T own tokens, then the copies that arrived,
M rows computed here, A of them announced and the others padding of weight zero (`Backend.row_step`), S slots here, R
ranks, E experts, K chunks.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from moetrain.distributed.comm import Pending, start_all_to_all
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.exchange.chunks import ChunkCut, cut_evenly
from moetrain.moe.kernels.api import Backend
from moetrain.moe.kernels.bags import Bags
from moetrain.moe.kernels.tables import Travel
from moetrain.moe.planning.plan import Plan
from moetrain.moe.routing.base import Routing


@dataclass(frozen=True)
class DispatchTables:
    """One rank's index tables for one layer and micro-step: which rows travel where, and back."""

    ep: ExpertGroup
    kernels: Backend
    selection_N: Tensor  # which selection is the n-th announced (by rank, then expert)
    announcement_N: Tensor  # where its announcement stands
    announced: list[int]  # [R] selections announced to each rank, and one header
    received: list[int]  # [R] what each rank announced here
    arrived_A: Tensor  # where the announcement of each real row stands among those received; in the order of the rows
    row_A: Tensor  # and where the row stands among the M
    token_C: Tensor  # tokens whose copies leave, by chunk, then rank
    copies_out: list[int]  # [R]
    copies_in: list[int]  # [R]
    pool_M: Tensor  # which entry of the pool each row reads
    weight_M: Tensor  # fp32
    chunk_rows: list[list[int]]  # [K][S] rows of each slot in each chunk
    slotwise_M: Tensor | None  # which row comes next in the order of a single chunk; None: there is one
    bag_M: Tensor  # which entry of the pool each row is summed for; one that is not there for padding
    copies_of_token: Bags  # the copies of each token that were sent
    num_tokens: int
    most: int  # selections of a token

    @classmethod
    def build(
        cls,
        routing: Routing,
        plan: Plan,
        ep: ExpertGroup,
        kernels: Backend,
        num_tokens: int,
        most: int,
        num_chunks: int = 1,
    ) -> "DispatchTables":
        """Announce the selections to the ranks that compute them. One host sync: how many copies come and go; a second
        one for several chunks.

        All ranks of the group call it. `num_tokens`: T; `most`: selections of a token, on any rank; `num_chunks`: K,
        the same on every rank.
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
        tables = cls(
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
            chunk_rows=[travel.rows_S.tolist()],
            slotwise_M=None,
            bag_M=rows.bag_M,
            copies_of_token=copies_of_token,
            num_tokens=num_tokens,
            most=most,
        )
        return tables if num_chunks == 1 or ep.size == 1 else tables._cut_in_chunks(num_chunks, travel)

    def _cut_in_chunks(self, num_chunks: int, travel: Travel) -> "DispatchTables":
        """Return the tables of the same rows in several chunks; waits for the device."""
        cut = ChunkCut.find(num_chunks, self.num_tokens, self.copies_out, self.copies_in, self.pool_M.device)
        rows = cut.cut_rows(self.pool_M.index_select(0, self.row_A), self.weight_M.index_select(0, self.row_A), travel)
        bags = self.copies_of_token
        return replace(
            self,
            arrived_A=self.arrived_A.index_select(0, rows.order_A),
            row_A=rows.row_A,
            token_C=self.token_C.index_select(0, cut.order_C),
            pool_M=rows.pool_M,
            weight_M=rows.weight_M,
            bag_M=rows.bag_M,
            chunk_rows=rows.chunk_rows,
            slotwise_M=rows.slotwise_M,
            copies_of_token=replace(bags, row_M=cut.place_C.index_select(0, bags.row_M)),
        )

    @property
    def num_chunks(self) -> int:
        """K, the parts in which rows travel and are computed."""
        return len(self.chunk_rows)

    @cached_property
    def slot_rows(self) -> list[int]:
        """[S] rows of each slot."""
        return [sum(rows) for rows in zip(*self.chunk_rows, strict=True)]

    @cached_property
    def sent_sizes(self) -> list[list[int]]:
        """[K][R] copies that leave for each rank in each chunk."""
        return cut_evenly(self.copies_out, self.num_chunks)

    @cached_property
    def received_sizes(self) -> list[list[int]]:
        """[K][R] copies that come from each rank in each chunk."""
        return cut_evenly(self.copies_in, self.num_chunks)

    def find_sent(self, chunk: int) -> slice:
        """Return where the copies of a chunk stand among the C."""
        begin = sum(map(sum, self.sent_sizes[:chunk]))
        return slice(begin, begin + sum(self.sent_sizes[chunk]))

    def find_received(self, chunk: int) -> slice:
        """Return where the copies of a chunk stand in the pool."""
        begin = self.num_tokens + sum(map(sum, self.received_sizes[:chunk]))
        return slice(begin, begin + sum(self.received_sizes[chunk]))

    def find_rows(self, chunk: int) -> slice:
        """Return where the rows of a chunk stand among the M."""
        begin = sum(map(sum, self.chunk_rows[:chunk]))
        return slice(begin, begin + sum(self.chunk_rows[chunk]))

    # Made when rows are first summed: the host has time then, for the device is at the experts.
    @cached_property
    def rows_of_pool(self) -> Bags:
        """The rows that read each entry of the pool."""
        return Bags.group(self.bag_M, self.num_tokens + sum(self.copies_in), self.most)

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
