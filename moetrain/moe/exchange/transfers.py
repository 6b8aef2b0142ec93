"""Tokens on their way to the experts, and sums on their way back, chunk by chunk (Tutel's adaptive pipelining).

The copies for each rank are cut into as many contiguous parts as there are chunks, and so are a rank's own tokens.
While one chunk is computed the next one travels, and the sums of the one before go home. A token's rows on a rank are
all in one chunk, so that sums are formed in the same order whatever the number of chunks.

T tokens here, D width, C copies sent, P pool (`dispatch`), M rows computed here.
"""

import torch
from torch import Tensor

from moetrain.distributed.comm import Pending, allocate_outgoing, start_all_to_all
from moetrain.moe.exchange.dispatch import DispatchTables


class TokenDispatch:
    """Tokens, or their gradients, on their way to the ranks that compute with them: it starts when it is made."""

    def __init__(self, tables: DispatchTables, x_TD: Tensor) -> None:
        """Begin to fill the pool: own tokens at once, copies as they come.

        On a GPU all chunks set off now, one after another on a stream. On a CPU each sets off when the one before has
        come: gloo would have two of them share the link, and the first would come as late as the second.
        """
        self._tables, self._x_TD = tables, x_TD
        self._pending: list[Pending] = []
        self.pool_PD = x_TD  # complete when the last chunk is
        if tables.ep.size == 1:
            return
        self.pool_PD = x_TD.new_empty(len(x_TD) + sum(tables.copies_in), x_TD.shape[1])
        for _ in range(tables.num_chunks if x_TD.is_cuda else 1):
            self._start_next()
        self.pool_PD[: len(x_TD)] = x_TD

    def _start_next(self) -> None:
        tables, chunk = self._tables, len(self._pending)
        if chunk == tables.num_chunks:
            return
        token_C = tables.token_C[tables.find_sent(chunk)]
        leaving_CD = allocate_outgoing(self._x_TD, len(token_C), tables.ep.rows)
        torch.index_select(self._x_TD, 0, token_C, out=leaving_CD)
        arriving = self.pool_PD[tables.find_received(chunk)]
        sizes = tables.sent_sizes[chunk], tables.received_sizes[chunk]
        self._pending.append(start_all_to_all(leaving_CD, *sizes, tables.ep.rows, out=arriving))

    def drop_pool(self) -> None:
        """Let go of all tokens: their rows have been taken."""
        self.pool_PD = self._x_TD = self._x_TD.new_empty(0)

    def wait(self, chunk: int) -> None:
        """Wait until this chunk's part of the pool is complete; chunks are waited for in their order."""
        if self._pending:
            self._pending[chunk].wait()
            self._start_next()


class SumCombine:
    """Sums of rows on their way to the tokens' ranks. Call `start` for each chunk, then `sum_own`, and `finish`."""

    def __init__(self, tables: DispatchTables, rows_MD: Tensor, weight_M: Tensor | None) -> None:
        """`rows_MD` is filled in chunk by chunk; `weight_M` fp32 is what rows are multiplied by."""
        self._tables, self._rows_MD, self._weight_M = tables, rows_MD, weight_M
        self._pending: list[Pending] = []
        self._back_CD = rows_MD.new_empty(len(tables.token_C) if tables.num_chunks > 1 else 0, rows_MD.shape[1])

    def start(self, chunk: int) -> None:
        """Sum the rows of the copies of this chunk, times their weights; begin to send the sums back.

        Those of a single chunk are summed together with those of own tokens.
        """
        tables = self._tables
        if tables.num_chunks == 1:
            self._rows_MD = tables.kernels.sum_rows(self._rows_MD, self._weight_M, tables.rows_of_pool)
            sums_CD, out = self._rows_MD[tables.num_tokens :], None
        else:
            bags = tables.rows_of_pool.select(tables.find_received(chunk))
            sums_CD = tables.kernels.sum_rows(self._rows_MD, self._weight_M, bags)
            out = self._back_CD[tables.find_sent(chunk)]
        if tables.ep.size > 1:
            sizes = tables.received_sizes[chunk], tables.sent_sizes[chunk]
            self._pending.append(start_all_to_all(sums_CD, *sizes, tables.ep.rows, out=out))

    def sum_own(self) -> None:
        """Sum the rows of own tokens, while the last sums travel; let go of all rows."""
        tables = self._tables
        if tables.num_chunks > 1:
            bags = tables.rows_of_pool.select(slice(tables.num_tokens))
            self._rows_MD = tables.kernels.sum_rows(self._rows_MD, self._weight_M, bags)

    def wait(self) -> None:
        """Wait until the sums of all chunks have come back."""
        for pending in self._pending:
            pending.wait()

    def finish(self) -> Tensor:
        """Wait; return [T, D]: own sums, and those that came back."""
        tables = self._tables
        if tables.ep.size == 1:
            return self._rows_MD
        self.wait()
        own_TD = self._rows_MD[: tables.num_tokens]
        back_CD = self._pending[0].wait() if tables.num_chunks == 1 else self._back_CD
        return tables.kernels.sum_rows(back_CD, None, tables.copies_of_token, own_TD)
