"""Index tables of a dispatch in Triton: four launches and one copy from the host, where torch takes fifty launches.

All tables are integers, or weights that are copied: equal to those of `tables.TorchTables`, bit for bit. Importing this
imports Triton.

T tokens here, N selections made here, C copies sent, M rows computed here, A of them announced, S slots here, R ranks,
E experts.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.moe.compiled import njit
from moetrain.moe.kernels.bags import Bags, upload
from moetrain.moe.kernels.tables import Incoming, Outgoing, Travel
from moetrain.moe.kernels.triton_fused import launch

BLOCK, WARPS = 256, 4  # elements of a program, and its warps


@triton.jit
def _find_run(begin, num_runs, steps, at_B):  # type: ignore[no-untyped-def]
    """Return the last of the runs that begins at or before each element, in so many steps of a binary search."""
    low_B, high_B = at_B * 0, at_B * 0 + num_runs
    for _ in range(steps):
        middle_B = (low_B + high_B) // 2
        is_before_B = tl.load(begin + middle_B) <= at_B
        low_B = tl.where(is_before_B, middle_B, low_B)
        high_B = tl.where(is_before_B, high_B, middle_B)
    return low_B


@triton.jit(do_not_specialize=["me", "num_tokens", "num_ranks", "num_runs", "steps", "num"])
def _order_selections(  # type: ignore[no-untyped-def]
    # runs: [R] first announcement for each rank, [E R] begin and [E R] value of each run
    runs, sorted_, token, selection, announcement, cell, goes,
    me, num_tokens, num_ranks, num_runs, steps, num, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put selections, sorted by expert, in the order of their announcements; note which tokens go to which rank."""
    n_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_B = n_B < num
    at_B = tl.where(inside_B, n_B, 0)
    begin = runs + num_ranks
    run_B = _find_run(begin, num_runs, steps, at_B)
    order_B = tl.load(begin + num_runs + run_B) + at_B
    selection_B = tl.load(sorted_ + order_B)
    rank_B = at_B * 0
    for r in range(1, num_ranks):
        rank_B += (tl.load(runs + r) <= at_B).to(tl.int32)
    cell_B = rank_B * num_tokens + tl.load(token + selection_B).to(tl.int32)
    tl.store(selection + n_B, selection_B, mask=inside_B)
    tl.store(announcement + n_B, (at_B + rank_B + 1).to(tl.int64), mask=inside_B)
    tl.store(cell + n_B, cell_B, mask=inside_B)
    tl.store(goes + cell_B, 1, mask=inside_B & (rank_B != me))


@triton.jit(do_not_specialize=["me", "num_tokens", "num_ranks", "num"])
def _write_announcements(  # type: ignore[no-untyped-def]
    runs, place, weight, selection, announcement, cell, out,
    me, num_tokens, num_ranks, num, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write which copy each selection reads, and its weight; the first programs write a rank's header each."""
    n_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_B = n_B < num
    cell_B = tl.load(cell + n_B, mask=inside_B, other=0)
    at_B = tl.load(announcement + n_B, mask=inside_B, other=0)
    weight_B = tl.load(weight + tl.load(selection + n_B, mask=inside_B, other=0), mask=inside_B, other=0.0)
    own_B = cell_B // num_tokens == me
    place_B = tl.where(own_B, cell_B % num_tokens + 1, tl.load(place + cell_B, mask=inside_B, other=0))
    tl.store(out + 2 * at_B, place_B, mask=inside_B)
    tl.store(out + 2 * at_B + 1, weight_B.to(tl.int32, bitcast=True), mask=inside_B)
    rank = tl.program_id(0)
    if rank < num_ranks:
        header = out + 2 * (tl.load(runs + rank) + rank)
        tl.store(header, tl.load(place + (rank + 1) * num_tokens - 1))
        tl.store(header + 1, 0)


@triton.jit(do_not_specialize=["num_tokens", "num_ranks"])
def _list_copies(  # type: ignore[no-untyped-def]
    place, token, copy, begin, num_tokens, num_ranks, BLOCK: tl.constexpr
):
    """Write which tokens' copies leave, and the copies of each token; `begin` [T + 1]."""
    t_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_B = t_B < num_tokens
    has_before_B = (t_B > 0) & (t_B <= num_tokens)
    at_B = t_B * 0
    for r in range(num_ranks):
        at_B += tl.load(place + r * num_tokens + t_B - 1, mask=has_before_B, other=0)
    tl.store(begin + t_B, at_B.to(tl.int64), mask=t_B <= num_tokens)
    first = 0
    for r in range(num_ranks):
        here_B = tl.load(place + r * num_tokens + t_B, mask=inside_B, other=0)
        goes_B = here_B > tl.load(place + r * num_tokens + t_B - 1, mask=inside_B & has_before_B, other=0)
        copy_B = first + here_B - 1
        tl.store(token + copy_B, t_B.to(tl.int64), mask=goes_B)
        tl.store(copy + at_B, copy_B.to(tl.int64), mask=goes_B)
        at_B += goes_B.to(tl.int32)
        first += tl.load(place + (r + 1) * num_tokens - 1)


@triton.jit(do_not_specialize=["me", "num_tokens", "num_ranks", "num_slots", "steps", "slot_steps", "num"])
def _read_announcements(  # type: ignore[no-untyped-def]
    # runs: [R] header of each rank; of each slot [S] its first row, [S] its first real one, [S] how many are real;
    # of each run of rows of one slot and source [S R] its begin and [S R] its value
    runs, place, received, arrived, row, pool, bag, weight, copies,
    me, num_tokens, num_ranks, num_slots, steps, slot_steps, num, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what each row reads; the first program writes how many copies leave and arrive."""
    m_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_B = m_B < num
    row_B = tl.where(inside_B, m_B, 0)
    first_row, first_real, num_real = runs + num_ranks, runs + num_ranks + num_slots, runs + num_ranks + 2 * num_slots
    slot_B = _find_run(first_row, num_slots, slot_steps, row_B)
    in_slot_B = row_B - tl.load(first_row + slot_B, mask=inside_B, other=0)
    is_real_B = inside_B & (in_slot_B < tl.load(num_real + slot_B, mask=inside_B, other=0))
    real_B = tl.load(first_real + slot_B, mask=inside_B, other=0) + tl.where(is_real_B, in_slot_B, 0)
    begin, num_runs = num_real + num_slots, num_slots * num_ranks
    run_B = _find_run(begin, num_runs, steps, real_B)
    source_B = run_B % num_ranks
    arrived_B = tl.load(begin + num_runs + run_B, mask=inside_B, other=0) + real_B
    base_B, arriving = row_B * 0 - 1, 0
    for r in range(num_ranks):
        header = tl.load(received + 2 * tl.load(runs + r))
        if r == me:
            header = 0
        base_B += tl.where((r < source_B) & (source_B != me), header, 0)
        arriving += header
        if tl.program_id(0) == 0:
            tl.store(copies + num_ranks + r, header)
            leaving = 0
            if num_tokens > 0:
                leaving = tl.load(place + (r + 1) * num_tokens - 1)
            tl.store(copies + r, leaving)
    pool_B = tl.load(received + 2 * arrived_B, mask=inside_B, other=0) + base_B
    pool_B += tl.where(source_B != me, num_tokens, 0)
    weight_B = tl.load(received + 2 * arrived_B + 1, mask=inside_B, other=0).to(tl.float32, bitcast=True)
    tl.store(pool + m_B, pool_B.to(tl.int64), mask=inside_B)
    tl.store(bag + m_B, tl.where(is_real_B, pool_B, num_tokens + arriving), mask=inside_B)
    tl.store(weight + m_B, tl.where(is_real_B, weight_B, 0.0), mask=inside_B)
    tl.store(arrived + real_B, arrived_B.to(tl.int64), mask=is_real_B)
    tl.store(row + real_B, row_B.to(tl.int64), mask=is_real_B)


class TritonTables:
    """With Triton, on a GPU: see `tables.IndexTables` for what its methods return."""

    def __init__(self, travel: Travel, device: torch.device) -> None:
        """Bring what the plan says to the device."""
        self._travel, self._device = travel, device
        num_ranks, num_slots, num_out = (
            len(travel.to_rank),
            len(travel.slots),
            len(travel.to_rank) + 2 * travel.sent_ER.size,
        )
        self._num_order, self._num_arrival = travel.sent_ER.size, num_slots * num_ranks
        runs = np.empty(num_out + num_ranks + 3 * num_slots + 2 * self._num_arrival, np.int32)
        _list_order_runs(travel.sent_ER, runs[:num_out])
        _list_arrival_runs(travel.received_RE, np.array(travel.slots, np.int64), travel.rows_S, runs[num_out:])
        on_device = upload(runs, device)
        self._runs_out, self._runs_back = on_device[:num_out], on_device[num_out:]

    def announce(self, token_N: Tensor, expert_N: Tensor, weight_N: Tensor) -> Outgoing:
        """As `IndexTables.announce`."""
        travel, num, num_ranks = self._travel, len(expert_N), len(self._travel.to_rank)
        num_experts, num_tokens = len(travel.sent_ER), travel.num_tokens
        narrow = torch.uint8 if num_experts <= 256 else torch.int16 if num_experts <= 1 << 15 else torch.int32
        sorted_N = expert_N.to(narrow).argsort(stable=True)  # a pass over the keys for every byte of them
        new = expert_N.new_empty
        selection_N, announcement_N, cell_N = new(num), new(num), new(num, dtype=torch.int32)
        announcements = new(num + num_ranks, 2, dtype=torch.int32)
        goes_RT = expert_N.new_zeros(num_ranks, num_tokens, dtype=torch.int32)
        programs = triton.cdiv(num, BLOCK)
        launch(
            _order_selections,
            programs,
            *(self._runs_out, sorted_N, token_N, selection_N, announcement_N, cell_N, goes_RT),
            *(travel.rank, num_tokens, num_ranks, self._num_order, self._num_order.bit_length(), num),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        self._place_RT = goes_RT.cumsum(1, dtype=torch.int32)
        if num_tokens:
            launch(
                _write_announcements,
                max(programs, num_ranks),
                *(self._runs_out, self._place_RT, weight_N, selection_N, announcement_N, cell_N, announcements),
                *(travel.rank, num_tokens, num_ranks, num),
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
        else:
            announcements.zero_()
        return Outgoing(selection_N, announcement_N, announcements)

    def read(self, announcements: Tensor) -> Incoming:
        """As `IndexTables.read`."""
        travel, num_ranks, num_slots = self._travel, len(self._travel.to_rank), len(self._travel.slots)
        num, real = int(travel.rows_S.sum()), int(travel.real_S.sum())
        new = self._place_RT.new_empty
        arrived_A, row_A, pool_M = (new(size, dtype=torch.int64) for size in (real, real, num))
        bag_M, weight_M, copies = new(num), new(num, dtype=torch.float32), new(2, num_ranks)
        launch(
            _read_announcements,
            max(1, triton.cdiv(num, BLOCK)),
            *(self._runs_back, self._place_RT, announcements, arrived_A, row_A, pool_M, bag_M, weight_M, copies),
            *(travel.rank, travel.num_tokens, num_ranks, num_slots),
            *(self._num_arrival.bit_length(), num_slots.bit_length(), num),
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
        return Incoming(arrived_A, row_A, pool_M, bag_M, weight_M, copies)

    def list_copies(self, num_copies: int, most: int) -> tuple[Tensor, Bags]:
        """As `IndexTables.list_copies`."""
        num_ranks, num_tokens = self._place_RT.shape
        new = self._place_RT.new_empty
        token_C, copy_C, begin = (new(size, dtype=torch.int64) for size in (num_copies, num_copies, num_tokens + 1))
        if num_tokens:
            launch(
                _list_copies,
                triton.cdiv(num_tokens + 1, BLOCK),
                *(self._place_RT, token_C, copy_C, begin, num_tokens, num_ranks),
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
        else:
            begin.zero_()
        return token_C, Bags(copy_C, begin, most)


@njit()
def _list_order_runs(sent_ER, out):  # type: ignore[no-untyped-def]
    """Write [R] where each rank's announcements begin; of each run [R E] its begin and value: `Travel.order_runs`."""
    num_experts, num_ranks = sent_ER.shape
    start_E = np.zeros(num_experts, np.int64)
    for e in range(1, num_experts):
        start_E[e] = start_E[e - 1] + sent_ER[e - 1].sum()
    begin, at = 0, num_ranks
    for r in range(num_ranks):
        out[r] = begin
        for e in range(num_experts):
            out[at], out[at + num_experts * num_ranks] = begin, start_E[e] - begin
            start_E[e] += sent_ER[e, r]
            begin += sent_ER[e, r]
            at += 1


@njit()
def _list_arrival_runs(received_RE, slots, rows_S, out):  # type: ignore[no-untyped-def]
    """Write what `_read_announcements` takes as its runs: `Travel.arrival_runs` among it."""
    num_ranks, num_experts = received_RE.shape
    num_slots = len(slots)
    start_RE = np.empty((num_ranks, num_experts), np.int64)
    place = 0
    for r in range(num_ranks):
        out[r] = place
        place += 1
        for e in range(num_experts):
            start_RE[r, e] = place
            place += received_RE[r, e]
    row, real, at = 0, 0, num_ranks + 3 * num_slots
    for s in range(num_slots):
        out[num_ranks + s], out[num_ranks + num_slots + s] = row, real
        row += rows_S[s]
        for r in range(num_ranks):
            out[at], out[at + num_slots * num_ranks] = real, start_RE[r, slots[s]] - real
            real += received_RE[r, slots[s]]
            at += 1
        out[num_ranks + 2 * num_slots + s] = real - out[num_ranks + num_slots + s]
