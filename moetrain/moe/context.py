"""What a layer's forward and backward share: the optimizer step that they are in, and this micro-step's rows.

T tokens here, N selections here, M rows computed here, S slots here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from torch import Tensor

from moetrain.distributed.comm import Pending
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.adapters import TRAIN_ALL, LowRankUpdate
from moetrain.moe.clock import Clock, Observer, ignore_phase
from moetrain.moe.exchange.dispatch import DispatchTables
from moetrain.moe.exchange.residents import GuestLoan, ResidentGuests
from moetrain.moe.exchange.transfers import SumCombine, TokenDispatch
from moetrain.moe.kernels.api import Backend
from moetrain.moe.planning.plan import Ints, Plan

T = TypeVar("T")


class StepContext:
    """What a layer knows of the optimizer step that it is in. The layer owns it; the training loop calls its methods.

    Guests stay on a rank until the last backward of a step, so the layer has to know which one that is. A layer with
    several passes (a chain) has as many backwards in each micro-batch.
    """

    def __init__(self, num_passes: int = 1) -> None:
        self.observer: Observer = ignore_phase
        self._num_passes = num_passes
        self._is_last_micro_batch = True
        self._num_later = 0

    def begin_step(self, num_micro_batches: int) -> None:
        """Call before an optimizer step of so many backwards of micro-batches, instead of `begin_backward` before each:
        where backwards are not the training loop's to announce."""
        self._is_last_micro_batch, self._num_later = True, num_micro_batches * self._num_passes - 1

    def begin_backward(self, is_last_micro_batch: bool) -> None:
        """Call before the backward of every micro-batch; `is_last_micro_batch`: of the optimizer step."""
        self._is_last_micro_batch, self._num_later = is_last_micro_batch, self._num_passes - 1

    def end_pass(self) -> None:
        """The layer calls this when one of its passes has run backward."""
        self._num_later = max(self._num_later - 1, 0)

    def observe(self, observer: Observer) -> None:
        """Have `observer(phase)` called whenever the layer begins a phase (`clock.PHASES`)."""
        self.observer = observer

    @property
    def is_final(self) -> bool:
        """Whether the layer's next backward is its last one of the optimizer step."""
        return self._is_last_micro_batch and not self._num_later


class Handover(Generic[T]):
    """A value that one autograd node leaves for another. It can be taken once: nothing large stays behind."""

    def __init__(self) -> None:
        self._value: T | None = None

    def put(self, value: T) -> None:
        """Leave a value."""
        self._value = value

    def take(self) -> T:
        """Return the value and forget it. Raises `RuntimeError` where none was left."""
        value, self._value = self._value, None
        if value is None:
            raise RuntimeError("the nodes of an MoE layer ran out of order")
        return value


class Gradients(NamedTuple):
    """Gradients on their way home."""

    tokens: SumCombine
    weights: Pending  # of the selections


class Piece(NamedTuple):
    """Rows that are computed at a time."""

    rows: slice
    sizes: list[int]  # rows of each home slot, or of each guest slot


@dataclass(frozen=True)
class LayerContext:
    """One pass of one micro-step through a layer on this rank: what its forward found and its backward needs.

    The phases: `DispatchTokens` puts `tokens`, `ExpertsCombine` takes them and the `loan`; backward, `ExpertsCombine`
    puts `gradients`, and `DispatchTokens` takes them.
    """

    ep: ExpertGroup
    home: Ints  # [E] the rank that owns each expert
    first_expert: int  # in slot 0
    plan: Plan
    tables: DispatchTables
    kernels: Backend
    residents: ResidentGuests
    step: StepContext
    clock: Clock
    max_rows: int | None  # computed at a time
    keep_hidden: bool  # whether rows and hidden activations stay for the backward, or just the tokens that came
    update: LowRankUpdate = TRAIN_ALL  # what adapters add, and which tensors of an expert have a gradient
    tokens: Handover[TokenDispatch] = field(default_factory=Handover)
    loan: Handover[GuestLoan] = field(default_factory=Handover)
    gradients: Handover[Gradients] = field(default_factory=Handover)

    @cached_property
    def guests_here(self) -> list[int]:
        """The experts that are guests on this rank, ascending."""
        return self.plan.guests_on(self.ep.rank)

    @property
    def is_one_piece(self) -> bool:
        """Whether all rows are computed together; else piece by piece."""
        return self.max_rows is None or sum(self.tables.slot_rows) <= self.max_rows

    @property
    def keeps_hidden(self) -> bool:
        """Whether hidden activations stay for the backward."""
        return self.keep_hidden and self.is_one_piece

    def start_loan(self, weights: Sequence[Tensor]) -> GuestLoan:
        """Begin to bring the weights of the guests here that did not stay."""
        return GuestLoan(weights, self.first_expert, self.plan, self.residents, self.ep)

    @property
    def chunks(self) -> range:
        """The chunks in which rows come, are computed and go."""
        return range(self.tables.num_chunks)

    def find_slots(self, of_guests: bool) -> slice:
        """Return which slots are those of the guests, or of the experts whose home is here."""
        num_home = len(self.tables.slot_rows) - len(self.guests_here)
        return slice(num_home, None) if of_guests else slice(num_home)

    def cut_pieces(self, of_guests: bool, chunk: int = 0) -> list[Piece]:
        """Cut the rows of a chunk of the home slots, or of the guests, at `max_rows`; returns one piece at least, if
        empty."""
        slots, begin = self.find_slots(of_guests), self.tables.find_rows(chunk).start
        ends = begin + np.cumsum([0, *self.tables.chunk_rows[chunk]])
        ends = ends[slots.start or 0 : None if slots.stop is None else slots.stop + 1]
        first, last = int(ends[0]), int(ends[-1])
        step = self.max_rows or max(last - first, 1)
        pieces = []
        for begin in range(first, max(last, first + 1), step):
            end = min(begin + step, last)
            pieces.append(Piece(slice(begin, end), np.diff(np.clip(ends, begin, end)).tolist()))
        return pieces
