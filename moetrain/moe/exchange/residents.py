"""Guests of one layer over an optimizer step: which of them stay, their weights, and how their gradients add up.

Weights do not change between the micro-steps of an optimizer step: within a limit a guest (a temporary replica of an
expert) stays until the last backward of the step, its gradient adding up here in fp32. Beyond the limit its weights go
after the forward and are lent again in the backward, and its gradient goes home at once. What every rank lends and
keeps follows from the plans alone, so all ranks agree.

E experts, R ranks, G guests here, W parameters of an expert, its matrices one after another.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.exchange.guests import Copy, Lending, Returning, split_packed
from moetrain.moe.kernels.reference import Matrices
from moetrain.moe.planning.cost_model import RELAY_FROM
from moetrain.moe.planning.plan import Ints, Plan

Weights = tuple[Matrices, ...]  # the matrices of some slots: gate_up and down


@dataclass
class ResidentGuests:
    """The guests of one layer that stay: here, and by number on all ranks of the group."""

    slots: int  # guests that a rank keeps at most
    keeps_RE: Ints
    has_RE: Ints  # those whose weights have come
    weights: dict[int, Tensor] = field(default_factory=dict)  # expert -> [W]
    grads: dict[int, Tensor] = field(default_factory=dict)  # expert -> [W] fp32, the sum so far
    has_sums: bool = False  # gradients of earlier micro-steps wait here or on another rank

    @classmethod
    def empty(cls, slots: int, num_ranks: int, num_experts: int) -> "ResidentGuests":
        """Make room for `slots` guests on each rank."""
        nobody = np.zeros((num_ranks, num_experts), np.int64)
        return cls(slots, nobody, nobody.copy())

    def admit(self, plan: Plan) -> None:
        """Keep the guests of `plan`, as far as there is room."""
        for expert, _, guest in plan.guests():
            if not self.keeps_RE[guest, expert] and self.keeps_RE[guest].sum() < self.slots:
                self.keeps_RE[guest, expert] = 1

    def list_missing(self, plan: Plan) -> list[Copy]:
        """Return the guests of `plan` whose weights have to come."""
        return [copy for copy in plan.guests() if not self.has_RE[copy[2], copy[0]]]

    def list_leaving(self, plan: Plan, home: Ints, is_final: bool) -> list[Copy]:
        """Return the guests whose gradients go home with this backward: those that do not stay, and finally all."""
        copies = {copy for copy in plan.guests() if is_final or not self.has_RE[copy[2], copy[0]]}
        if is_final:
            copies |= {(e, int(home[e]), r) for r, e in np.argwhere(self.has_RE).tolist()}
        return sorted(copies)

    def end_backward(self, is_final: bool) -> None:
        """Note that a backward is over; after the final one of the optimizer step nobody stays."""
        self.has_sums = not is_final
        if is_final:
            self.reset()

    def reset(self) -> None:
        """Forget all guests, and what has added up."""
        self.has_sums = False
        self.keeps_RE[:] = 0
        self.has_RE[:] = 0
        self.weights.clear()
        self.grads.clear()


class GuestLoan:
    """The weights of the guests here that one forward or backward needs: resident, or on their way."""

    def __init__(
        self, weights: Sequence[Tensor], first_expert: int, plan: Plan, residents: ResidentGuests, ep: ExpertGroup
    ) -> None:
        """Begin to send what is missing. `weights` [S, ...] each: of the experts here, from `first_expert` on."""
        self._plan, self._residents, self._ep = plan, residents, ep
        missing = residents.list_missing(plan)
        self._lending = Lending(weights, first_expert, missing, ep) if missing else None  # the same on every rank

    @property
    def is_under_way(self) -> bool:
        """Whether any rank waits for weights."""
        return self._lending is not None

    def relay(self) -> None:
        """Pass on what owners sent in slices."""
        if self._lending is not None:
            self._lending.relay()

    def finish(self, like: Sequence[Tensor]) -> Weights:
        """Wait; return the matrices of each guest here. `like` [S, ...] each gives their shapes."""
        rank, residents = self._ep.rank, self._residents
        arrived: dict[int, Tensor] = {}
        if self._lending is not None:
            arrived, self._lending = self._lending.finish(), None
            staying = [e for e in arrived if residents.keeps_RE[rank, e]]
            for expert in staying:  # in memory of its own, where others of the same message will go
                whole = len(staying) == len(arrived)
                residents.weights[expert] = arrived[expert] if whole else arrived[expert].clone()
            for expert, _, guest in residents.list_missing(self._plan):
                residents.has_RE[guest, expert] = residents.keeps_RE[guest, expert]
        here = self._plan.guests_on(rank)
        packed = [arrived[e] if e in arrived else residents.weights[e] for e in here]
        matrices = [split_packed(packed_W, like) for packed_W in packed]
        return tuple([of_guest[n] for of_guest in matrices] for n in range(len(like)))


def batch_guests(plan: Plan, leaving: Sequence[Copy], at_a_time: int) -> list[list[int]]:
    """Return experts whose guests' gradients are computed and go home together, the same batches on every rank.

    In a batch no rank has more than `at_a_time` guests, or it is one expert.
    """
    ranks_of: dict[int, set[int]] = {}
    for expert, _, guest in [*plan.guests(), *leaving]:
        ranks_of.setdefault(expert, set()).add(guest)
    batches: list[list[int]] = []
    held: Counter[int] = Counter()
    for expert, ranks in sorted(ranks_of.items()):
        if not batches or any(held[rank] == at_a_time for rank in ranks):
            batches.append([])
            held.clear()
        batches[-1].append(expert)
        held.update(ranks)
    return batches


def start_returning(
    grads: dict[int, Tensor],
    packed_GW: Tensor,
    batch: Sequence[int],
    leaving: Sequence[Copy],
    residents: ResidentGuests,
    ep: ExpertGroup,
) -> Returning | None:
    """Have the gradients of the batch's guests here add up, or begin to send them home.

    `grads`: expert -> its row of `packed_GW`. Returns None where no rank's gradients leave.
    """
    leaving = [copy for copy in leaving if copy[0] in batch]
    going = {expert for expert, _, guest in leaving if guest == ep.rank}
    own = dict(grads)
    for expert in residents.grads.keys() & set(batch):
        own[expert] = own[expert] + residents.grads[expert] if expert in own else residents.grads[expert]
    for expert in own.keys() - going:  # in memory of its own: the others' is to go
        residents.grads[expert] = own[expert].to(torch.float32, copy=True)
    if not leaving:
        return None
    is_summed = residents.has_sums or max(Counter(expert for expert, *_ in leaving).values()) >= RELAY_FROM
    like = packed_GW.new_empty(0, dtype=torch.float32) if is_summed else packed_GW
    ready = None if is_summed or len(going) < len(own) else packed_GW.view(-1)
    return Returning(own, leaving, like, packed_GW.shape[1], ep, ready)
