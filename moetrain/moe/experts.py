"""The experts of one MoE layer: SwiGLU by grouped GEMM over home slots and guest slots, with their own backward.

In the autograd graph a layer is two nodes. `_Leave` sends tokens off, `_Work` waits for them, computes and combines;
what is computed between the two (shared experts) runs while rows are under way. Backward, `_Work` has the rows'
gradients on their way home before it computes the weights' gradients (unless rows come in pieces), and `_Leave` waits
for them at the end.

T tokens here, D width, H expert hidden width, N selections here, M rows computed here, S slots here, W parameters of
an expert.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from moetrain.distributed.comm import Pending
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.clock import Clock
from moetrain.moe.exchange import guests
from moetrain.moe.exchange.dispatch import Route
from moetrain.moe.exchange.guests import Lending, Packed, Returning, Store
from moetrain.moe.kernels import api as kernels
from moetrain.moe.kernels.api import Matrices
from moetrain.moe.planning import default_home
from moetrain.moe.planning.cost import Limits
from moetrain.moe.planning.cost_model import RELAY_FROM
from moetrain.moe.planning.plan import Ints, Plan
from moetrain.moe.routing.base import INIT_STD, Routing

Weights = tuple[Matrices, Matrices]  # gate_up and down of some slots
GRADIENT_BYTES = 8 << 20  # of guests' gradients that are computed, and sent home, together


class Experts(nn.Module):
    """All experts of a layer; after `shard`, those whose home is this rank.

    Parameters, as Hugging Face fuses them: `gate_up` [E, 2H, D], gate above up, and `down` [E, D, H].
    """

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.reset_parameters()
        self.ep = ExpertGroup.alone()
        self.store = Store.empty(0, 1, num_experts)
        self.max_rows: int | None = None
        self.keep_hidden = True

    @torch.no_grad()
    def reset_parameters(self, std: float = INIT_STD) -> None:
        """Draw the weights from a normal distribution; on the meta device, draw nothing."""
        for parameter in self.parameters():
            if not parameter.is_meta:
                parameter.normal_(0.0, std)

    def shard(
        self, ep: ExpertGroup, guest_slots: int = 0, max_rows: int | None = None, keep_hidden: bool = True
    ) -> None:
        """Keep the experts whose home is `ep.rank`.

        `guest_slots`: guests that stay here until the last backward of an optimizer step; `max_rows`: rows computed at
        a time; `keep_hidden`: whether rows and hidden activations stay for the backward, or just the tokens that came.
        """
        self.ep, self.max_rows, self.keep_hidden = ep, max_rows, keep_hidden
        self.store = Store.empty(guest_slots, ep.size, self.num_experts)
        if ep.size > 1:
            self.gate_up = nn.Parameter(self.gate_up.detach()[self.own_experts()].clone())
            self.down = nn.Parameter(self.down.detach()[self.own_experts()].clone())

    @property
    def home(self) -> Ints:
        """[E] the rank that owns each expert."""
        return default_home(self.num_experts, self.ep.size)

    @property
    def limits(self) -> Limits:
        """What a planner is to keep within; one guest may always pass."""
        return Limits(rows=self.max_rows, guests=max(self.store.slots, 1))

    def own_experts(self) -> list[int]:
        """Global numbers of the experts kept here, in the order of their slots."""
        return (self.home == self.ep.rank).nonzero()[0].tolist()

    def forward(
        self,
        x_TD: Tensor,
        routing: Routing,
        plan: Plan,
        most_per_token: int,
        clock: Clock,
        meanwhile: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """[T, D] -> [T, D]: the weighted sum of every token's experts, wherever the plan has them computed.

        `most_per_token`: selections of any token on any rank. `meanwhile(x_TD)` is added; it runs while rows travel.
        """
        trip = Trip(self, plan, clock)
        with clock.phase("lend"):
            trip.start_lending((self.gate_up, self.down))
        with clock.phase("dispatch"):
            trip.route = Route.of(routing, plan, self.ep, len(x_TD), most_per_token, x_TD.dtype)
            clock.sent_bytes = sum(trip.route.copies_out) * x_TD.shape[1] * x_TD.element_size()
            ticket = _Leave.apply(x_TD, routing.weight_N, trip)
        shared_TD = None if meanwhile is None else meanwhile(x_TD)
        y_TD = _Work.apply(ticket, self.gate_up, self.down, trip)
        return y_TD if shared_TD is None else y_TD + shared_TD


class Trip:
    """One micro-step's rows and guests of one layer on this rank, forward and backward."""

    route: Route
    pool: tuple[Tensor, Pending] | None
    sums: tuple[Tensor, Pending]
    grad_weights: Pending

    def __init__(self, experts: Experts, plan: Plan, clock: Clock) -> None:
        self.ep, self.store, self.home, self.max_rows = experts.ep, experts.store, experts.home, experts.max_rows
        self.keep_hidden = experts.keep_hidden
        self.plan, self.clock = plan, clock
        self.first = int(np.searchsorted(self.home, self.ep.rank))  # the expert in slot 0
        self.guests_here = [e for e, _, guest in plan.guests() if guest == self.ep.rank]
        self.guest_bytes = guests.size_of(tuple(experts.parameters())) * experts.gate_up.element_size()
        self._lending: Lending | None = None

    @property
    def awaits_guests(self) -> bool:
        return self._lending is not None

    def start_lending(self, weights: Sequence[Tensor]) -> None:
        missing = self.store.missing(self.plan)
        if missing:  # the same on every rank
            self._lending = Lending(weights, self.first, missing, self.ep)

    def relay(self) -> None:
        if self._lending is not None:
            self._lending.relay()

    def guest_weights(self, like: Sequence[Tensor]) -> Weights:
        """gate_up and down of each guest here; waits for those that are lent just now."""
        came: dict[int, Tensor] = {}
        if self._lending is not None:
            came, self._lending = self._lending.finish(), None
            stay = [e for e in came if self.store.keeps_RE[self.ep.rank, e]]
            for expert in stay:  # of its own, where others of the same message will go
                self.store.weights[expert] = came[expert] if len(stay) == len(came) else came[expert].clone()
            for expert, _, guest in self.store.missing(self.plan):
                self.store.has_RE[guest, expert] = self.store.keeps_RE[guest, expert]
        packed = [came[e] if e in came else self.store.weights[e] for e in self.guests_here]
        split = [guests.split(p, like) for p in packed]
        return [gate_up for gate_up, _ in split], [down for _, down in split]

    @property
    def at_once(self) -> bool:
        """Whether all rows are computed together; else piece by piece."""
        return self.max_rows is None or sum(self.route.slot_rows) <= self.max_rows

    def forget_weights(self) -> None:
        """No product with the guests' weights is left: they go, unless they stay for the next micro-step."""
        if self.store.final:
            self.store.weights.clear()

    def batches(self) -> list[list[int]]:
        """Experts whose guests' gradients are computed and go home together, the same on every rank: of a batch no
        rank has more than `GRADIENT_BYTES`, or one expert."""
        at_a_time = max(1, GRADIENT_BYTES // self.guest_bytes)
        ranks_of: dict[int, set[int]] = {}
        for expert, _, guest in [*self.plan.guests(), *self.store.leaving(self.plan, self.home)]:
            ranks_of.setdefault(expert, set()).add(guest)
        out: list[list[int]] = []
        held: Counter[int] = Counter()
        for expert, ranks in sorted(ranks_of.items()):
            if not out or any(held[rank] == at_a_time for rank in ranks):
                out.append([])
                held.clear()
            out[-1].append(expert)
            held.update(ranks)
        return out

    def lent_whole(self) -> set[int]:
        """Own slots without rows whose gradients come home with this backward: all there is of them."""
        home = ((e, r) for e, r, _ in self.store.leaving(self.plan, self.home))
        return {e - self.first for e, r in home if r == self.ep.rank and not self.route.slot_rows[e - self.first]}

    def guest_slots(self, batch: Sequence[int]) -> slice:
        """Which of the guests here are of the batch."""
        return slice(*np.searchsorted(self.guests_here, [batch[0], batch[-1] + 1]).tolist())

    def send_home(self, grads_GW: Tensor, batch: Sequence[int]) -> Returning | None:
        """Gradients of the batch's guests here, in their order: they add up or leave. None where no rank's leave."""
        store = self.store
        leaving = [copy for copy in store.leaving(self.plan, self.home) if copy[0] in batch]
        own = dict(zip(self.guests_here[self.guest_slots(batch)], grads_GW, strict=True))
        going = {expert for expert, _, guest in leaving if guest == self.ep.rank}
        for expert in store.grads.keys() & set(batch):
            own[expert] = own[expert] + store.grads[expert] if expert in own else store.grads[expert]
        for expert in own.keys() - going:  # of its own: the others' memory is to go
            store.grads[expert] = own[expert].to(torch.float32, copy=True)
        summed = store.grown or max(Counter(expert for expert, *_ in leaving).values(), default=0) >= RELAY_FROM
        like = grads_GW.new_empty(0, dtype=torch.float32) if summed else grads_GW
        ready = None if summed or len(going) < len(own) else grads_GW.view(-1)
        return Returning(own, leaving, like, grads_GW.shape[1], self.ep, ready) if leaving else None

    def pieces(self, away: bool) -> list["Piece"]:
        """The rows of the home slots, or of the guests, cut at `max_rows`; one at least, if without rows."""
        ends = np.cumsum([0, *self.route.slot_rows])
        num_home = len(self.route.slot_rows) - len(self.guests_here)
        ends = ends[num_home:] if away else ends[: num_home + 1]
        first, last = int(ends[0]), int(ends[-1])
        step = self.max_rows or max(last - first, 1)
        out = []
        for begin in range(first, max(last, first + 1), step):
            end = min(begin + step, last)
            out.append(Piece(slice(begin, end), np.diff(np.clip(ends, begin, end)).tolist()))
        return out


class Piece(NamedTuple):
    """Rows that are computed at a time."""

    rows: slice
    sizes: list[int]  # rows of each home slot, or of each guest slot


class Products(NamedTuple):
    """What a piece's weight gradients are made of: Σ leftᵀ · right over the rows of each slot, for each matrix."""

    pairs: Sequence[tuple[Tensor, Tensor]]
    sizes: list[int]

    def of(self, slots: slice) -> "Products":
        """Those of some of the slots."""
        ends = np.cumsum([0, *self.sizes])
        rows = slice(ends[slots.start], ends[slots.stop])
        return Products([(left[rows], right[rows]) for left, right in self.pairs], self.sizes[slots])

    def write(self, totals: Sequence[Matrices], add: bool = False, without: Collection[int] = ()) -> None:
        """`without`: slots that have no rows, and whose totals are left as they are."""
        there = [s for s in range(len(self.sizes)) if s not in without]
        sizes = [self.sizes[s] for s in there]
        for (left_MA, right_MB), total in zip(self.pairs, totals, strict=True):
            out = total if add and not without else [total[s] for s in there]  # not one that might be replaced
            kernels.segment_outer(left_MA, right_MB, sizes, out, add)

    def fill(self, totals: Sequence[Tensor], without: Collection[int] = ()) -> list[Tensor]:
        """`totals` written to, or what stands in their place."""
        if without:
            self.write(totals, without=without)
            return list(totals)
        found = (kernels.segment_outer(*pair, self.sizes, t, False) for pair, t in zip(self.pairs, totals, strict=True))
        return [cast(Tensor, one) for one in found]


class _Leave(torch.autograd.Function):
    """Tokens set off; backward, their gradients and those of their weights have come back."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_N: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        trip.pool = trip.route.start_spread(x_TD)
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> Any:
        trip: Trip = ctx.trip
        ctx.trip = None  # whoever holds a statistic of the layer holds this node, but nothing big with it
        with trip.clock.backward("combine"):
            with trip.clock.backward("wait_combine"):
                trip.sums[1].wait()
            grad_TD = trip.route.finish_gather(*trip.sums)
            return grad_TD, trip.route.finish_return(trip.grad_weights), None


class _Work(torch.autograd.Function):
    """The rows' way through the experts, and home again."""

    @staticmethod
    def forward(ctx: Any, ticket: Tensor, gate_up: Tensor, down: Tensor, trip: Trip) -> Tensor:
        route, clock = trip.route, trip.clock
        with clock.phase("dispatch"):
            assert trip.pool is not None
            pool_PD, pending = trip.pool
            with clock.phase("wait_dispatch"):
                pending.wait()
            rows_MD = pool_PD.index_select(0, route.pool_M)
            kept = rows_MD if trip.keep_hidden else pool_PD.detach()
            trip.pool = None
            del pool_PD, pending
        with clock.phase("lend"):
            trip.relay()
        width = gate_up.shape[1]
        keep = trip.keep_hidden and trip.at_once
        gate_up_MH2 = rows_MD.new_empty(len(rows_MD) if keep else 0, width)
        out_MD = torch.empty_like(rows_MD)
        for away in (False, True):
            with clock.phase("lend"):
                weights: Weights = trip.guest_weights((gate_up, down)) if away else (gate_up, down)
            with clock.phase("experts"):
                for rows, sizes in trip.pieces(away):
                    part = gate_up_MH2[rows] if keep else rows_MD.new_empty(sum(sizes), width)
                    kernels.segment_mm(rows_MD[rows], weights[0], sizes, part, transpose=True)
                    hidden_MH = kernels.swiglu(part)
                    kernels.segment_mm(hidden_MH, weights[1], sizes, out_MD[rows], transpose=True)
        ctx.trip = trip
        ctx.save_for_backward(kept, gate_up_MH2, gate_up, down)
        with clock.phase("combine"):
            own_TD, pending = route.start_gather(out_MD, route.weight_M)
            with clock.phase("wait_combine"):
                pending.wait()
            return route.finish_gather(own_TD, pending)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> Any:
        kept, gate_up_MH2, gate_up, down = ctx.saved_tensors
        trip: Trip = ctx.trip
        ctx.trip = None
        route, clock = trip.route, trip.clock
        with clock.backward("lend"):
            trip.start_lending((gate_up, down))  # those that did not stay
        with clock.backward("dispatch"):
            pool_PD, pending = route.start_spread(grad_TD)
            with clock.backward("wait_dispatch"):
                pending.wait()
            grad_MD = pool_PD.index_select(0, route.pool_M)
            del pool_PD
        with clock.backward("lend"):
            trip.relay()

        rows_MD = kept if trip.keep_hidden else kept.index_select(0, route.pool_M)
        keep, at_once = trip.keep_hidden and trip.at_once, trip.at_once
        grads = [torch.empty_like(w) if at_once else torch.zeros_like(w) for w in (gate_up, down)]
        guest_grads = None if at_once else Packed(len(trip.guests_here), grads, trip.ep).zero()
        back_MD, grad_weight_M = torch.empty_like(rows_MD), route.weight_M.new_empty(len(rows_MD))
        waiting: dict[bool, Products] = {}  # for weight gradients, until the rows' gradients are on their way
        for away in (False, True) if trip.awaits_guests else (True, False):
            with clock.backward("lend"):
                weights: Weights = trip.guest_weights((gate_up, down)) if away else (gate_up, down)
            with clock.backward("experts"):
                for rows, sizes in trip.pieces(away):
                    part_MH2 = gate_up_MH2[rows] if keep else rows_MD.new_empty(sum(sizes), gate_up.shape[1])
                    if not keep:
                        kernels.segment_mm(rows_MD[rows], weights[0], sizes, part_MH2, transpose=True)
                    hidden_MH = rows_MD.new_empty(sum(sizes), down.shape[2])  # its gradient first
                    kernels.segment_mm(grad_MD[rows], weights[1], sizes, hidden_MH, transpose=False)
                    grad_weight_M[rows] = kernels.swiglu_backward(part_MH2, hidden_MH, route.weight_M[rows])
                    kernels.segment_mm(part_MH2, weights[0], sizes, back_MD[rows], transpose=False)
                    products = Products([(part_MH2, rows_MD[rows]), (grad_MD[rows], hidden_MH)], sizes)
                    if guest_grads is None:
                        waiting[away] = products
                    else:
                        products.write(guest_grads.matrices if away else grads, add=True)
            if away:
                del weights
                trip.forget_weights()
        torch.autograd.graph.increment_version(gate_up_MH2)  # a second backward has to fail
        with clock.backward("combine"):
            trip.grad_weights = route.start_return(grad_weight_M)
            trip.sums = route.start_gather(back_MD, None)
        del back_MD

        returning: Returning | None = None
        lent_whole = trip.lent_whole() if at_once else set()
        for batch in trip.batches():
            slots = trip.guest_slots(batch)
            with clock.backward("experts"):
                if guest_grads is None:
                    packed = Packed(slots.stop - slots.start, grads, trip.ep)
                    waiting[True].of(slots).write(packed.matrices)
                    grads_GW = packed.packed_GW
                else:
                    grads_GW = guest_grads.packed_GW[slots]
            with clock.backward("lend"):
                if returning is not None:
                    returning.finish(grads, trip.first, lent_whole)
                returning = trip.send_home(grads_GW, batch)
            if False in waiting:  # while the first are under way
                with clock.backward("experts"):
                    grads = waiting.pop(False).fill(grads, without=lent_whole)
        if False in waiting:
            with clock.backward("experts"):
                grads = waiting.pop(False).fill(grads)
        if returning is not None:
            with clock.backward("lend"):
                returning.finish(grads, trip.first, lent_whole)
        trip.store.close()
        return None, *grads, None
