"""Index tables of one rank's dispatch, made where the tensors are: which rows are announced, and where rows are read.

What a plan says is counts, run lengths; `Travel` has them as numpy arrays. `TorchTables` makes tables of them with
operations of torch, on any device, and is the specification of `triton_tables.TritonTables`.

T tokens here, N selections made here, C copies sent, M rows computed here, A of them announced and the others padding
of weight zero, P pool (T own tokens, then the copies that arrived), S slots here, R ranks, E experts.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetrain.moe.kernels.bags import Bags, find_true, sort_stably, upload

Ints = NDArray[np.int64]
Runs = tuple[Ints, Ints]  # values, and how often each of them; a value is larger by an element's place in the table


@dataclass(frozen=True)
class Travel:
    """How many rows go from where to where, as one rank sees it."""

    rank: int
    num_tokens: int
    sent_ER: Ints  # rows of each expert that this rank sends to each rank
    received_RE: Ints  # rows of each expert that each rank sends here
    slots: list[int]  # [S] the experts computed here
    row_step: int  # rows of a slot are padded to a multiple of this

    @cached_property
    def to_rank(self) -> Ints:
        """[R] selections announced to each rank."""
        totals: Ints = self.sent_ER.sum(0)
        return totals

    @cached_property
    def received(self) -> Ints:
        """[R] what each rank announces here, a header before it included."""
        totals: Ints = self.received_RE.sum(1) + 1
        return totals

    @cached_property
    def real_S(self) -> Ints:
        """[S] rows of each slot."""
        totals: Ints = self.received_RE[:, self.slots].sum(0)
        return totals

    @cached_property
    def rows_S(self) -> Ints:
        """[S] the same, padding included."""
        return -(-self.real_S // self.row_step) * self.row_step

    def order_runs(self) -> Runs:
        """Return the runs that turn selections sorted by expert into announcements, by rank, then expert."""
        return _regroup(self.sent_ER)

    def arrival_runs(self) -> Runs:
        """Return the runs that turn rows, slot by slot and by source, into places among what was received."""
        return _regroup(self.received_RE, self.slots, np.cumsum(self.received) - self.received + 1)


class Outgoing(NamedTuple):
    """What a rank announces, and which of the copies it sends belong to whom."""

    selection_N: Tensor  # which selection is the n-th announced (by rank, then expert)
    announcement_N: Tensor  # where its announcement stands
    announcements: Tensor  # int32 [N + R, 2]: for every rank how many copies, -; then which copy, a weight's bits each


class Incoming(NamedTuple):
    """What arrived, as rows of the slots here."""

    arrived_A: Tensor  # where the announcement of each real row stands among those received; rows slot by slot
    row_A: Tensor  # and where the row stands among the M
    pool_M: Tensor  # which entry of the pool each row reads
    bag_M: Tensor  # which entry of the pool each row is summed for; one that is not there for padding
    weight_M: Tensor  # fp32
    copies: Tensor  # [2, R] copies that leave for each rank, and that arrive from each


class IndexTables(Protocol):
    """Makes the index tables of one rank; call the methods in their order."""

    def announce(self, token_N: Tensor, expert_N: Tensor, weight_N: Tensor) -> Outgoing:
        """Return what to announce of these selections."""

    def read(self, announcements: Tensor) -> Incoming:
        """Return the rows here; `announcements` [received, 2]: those that arrived."""

    def list_copies(self, num_copies: int, most: int) -> tuple[Tensor, Bags]:
        """Return [C] the tokens whose copies leave, by rank, and the copies of each token, at most `most`."""


class TorchTables:
    """With operations of torch; on a GPU all that is known before is one copy from the host."""

    def __init__(self, travel: Travel, device: torch.device) -> None:
        """Bring what the plan says to the device."""
        self._travel, self._device = travel, device
        num_ranks, num_slots = len(travel.to_rank), len(travel.slots)
        ranks, once = np.arange(num_ranks), np.ones(num_ranks, np.int64)
        announced, received, real_S, rows_S = travel.to_rank + 1, travel.received, travel.real_S, travel.rows_S
        (self._order_N, self._announcement_N, self._arrived_A, self._row_A), level = _expand(
            device,
            rising=[
                travel.order_runs(),
                (ranks + 1, travel.to_rank),
                travel.arrival_runs(),
                (np.cumsum(rows_S - real_S) - (rows_S - real_S), real_S),
            ],
            level=[
                (np.cumsum(announced) - announced, once),
                (np.cumsum(received) - received, once),
                (ranks * travel.num_tokens, travel.to_rank),
                (np.tile(ranks, num_slots), travel.received_RE[:, travel.slots].T.ravel()),
            ],
        )
        self._header_R, self._received_R, self._first_N, self._source_A = level

    def announce(self, token_N: Tensor, expert_N: Tensor, weight_N: Tensor) -> Outgoing:
        """As `IndexTables.announce`."""
        me, num_ranks, num_tokens = self._travel.rank, len(self._header_R), self._travel.num_tokens
        selection_N = sort_stably(expert_N).index_select(0, self._order_N)
        cell_N = self._first_N + token_N.index_select(0, selection_N)  # of [R, T]
        goes = torch.zeros(num_ranks * num_tokens, dtype=torch.bool, device=self._device)
        goes.index_fill_(0, cell_N, True)  # an assignment would wait for the device, here and below
        self._goes_RT = goes.view(num_ranks, num_tokens)
        self._goes_RT[me].fill_(False)
        place_RT = self._goes_RT.cumsum(1, dtype=torch.int32)  # from one
        self._copies_R = place_RT[:, -1].clone() if num_tokens else place_RT.new_zeros(num_ranks)
        torch.arange(1, num_tokens + 1, out=place_RT[me])
        place_N = place_RT.view(-1).index_select(0, cell_N)
        announcements = torch.empty(len(cell_N) + num_ranks, 2, dtype=torch.int32, device=self._device)
        announcements[self._header_R, 0] = self._copies_R
        announcements[self._announcement_N] = torch.stack(
            [place_N, weight_N.index_select(0, selection_N).view(torch.int32)], 1
        )
        return Outgoing(selection_N, self._announcement_N, announcements)

    def read(self, announcements: Tensor) -> Incoming:
        """As `IndexTables.read`."""
        me, num_tokens = self._travel.rank, self._travel.num_tokens
        real_S, rows_S = self._travel.real_S, self._travel.rows_S
        arriving_R = announcements[self._received_R, 0]
        arriving_R[me].fill_(0)
        base_R = arriving_R.cumsum(0) - arriving_R + (num_tokens - 1)  # places count from one
        base_R[me].fill_(-1)
        announcement_A2 = announcements.index_select(0, self._arrived_A)
        pool_A = announcement_A2[:, 0] + base_R.index_select(0, self._source_A)
        weight_A = announcement_A2[:, 1].contiguous().view(torch.float32)
        pool_M = bag_M = pool_A
        weight_M, row_A = weight_A, self._row_A
        num_rows = int(rows_S.sum())
        if num_rows > len(pool_A):  # padding reads the first row of its slot
            _, (reads_M,) = _expand(self._device, rising=[], level=[(np.cumsum(real_S) - real_S, rows_S)])
            pool_M = pool_A.index_select(0, reads_M)
            pool_M[row_A] = pool_A
            bag_M = (arriving_R.sum() + num_tokens).expand(num_rows).clone()
            bag_M[row_A] = pool_A
            weight_M = torch.zeros(num_rows, device=self._device)
            weight_M[row_A] = weight_A
        copies = torch.stack([self._copies_R, arriving_R])
        return Incoming(self._arrived_A, row_A, pool_M, bag_M, weight_M, copies)

    def list_copies(self, num_copies: int, most: int) -> tuple[Tensor, Bags]:
        """As `IndexTables.list_copies`."""
        num_tokens = self._travel.num_tokens
        token_C = find_true(self._goes_RT.view(-1), num_copies) % max(num_tokens, 1)
        return token_C, Bags.group(token_C, num_tokens, most)


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
