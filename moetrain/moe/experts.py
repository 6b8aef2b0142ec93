"""The experts of one MoE layer: SwiGLU by grouped GEMM over home slots and guest slots.

A *home* slot holds an expert that this rank owns, a *guest* slot a temporary replica of one that another rank owns.
Where experts are cut (`slices`), a slot holds a slice, which is an expert of its own to plans and slots. Autograd's
part of it is in `passes`.

T tokens here, D width, H expert hidden width, E experts, r slices of an expert, N selections here.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from moetrain.common.errors import ConfigError
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.adapters import TRAIN_ALL, ExpertAdapters
from moetrain.moe.clock import Clock
from moetrain.moe.context import LayerContext, StepContext
from moetrain.moe.exchange.dispatch import DispatchTables
from moetrain.moe.exchange.residents import GuestLoan, ResidentGuests
from moetrain.moe.kernels.api import Backend, KernelUser
from moetrain.moe.options import Chunks
from moetrain.moe.passes import combine_experts, dispatch_tokens
from moetrain.moe.planning import default_home
from moetrain.moe.planning.cost import Limits
from moetrain.moe.planning.plan import Ints, Plan
from moetrain.moe.routing.base import INIT_STD, Routing
from moetrain.moe.slices import cut_matrices, select_slices


class Experts(nn.Module, KernelUser):
    """All experts of a layer; after `shard`, those whose home is this rank.

    Parameters, as Hugging Face fuses them: `gate_up` [E, 2H, D], gate above up, and `down` [E, D, H]; after `cut`,
    those of slices: [r · E, 2H / r, D] and [r · E, D, H / r].
    """

    def __init__(self, dim: int, hidden: int, num_experts: int, num_passes: int = 1) -> None:
        """`num_passes`: times that a micro-batch passes through the layer."""
        super().__init__()
        self.num_experts, self.slices = num_experts, 1
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.reset_parameters()
        self.ep = ExpertGroup.alone()
        self.step = StepContext(num_passes)
        self.residents = ResidentGuests.empty(0, 1, num_experts)
        self.max_rows: int | None = None
        self.keep_hidden = True
        self.chunks: Chunks = 1  # in which rows travel and are computed; auto: as costs have it
        self.adapters: ExpertAdapters | None = None  # of frozen experts

    @torch.no_grad()
    def reset_parameters(self, std: float = INIT_STD) -> None:
        """Draw the weights from a normal distribution; on the meta device, draw nothing."""
        for parameter in self.parameters():
            if not parameter.is_meta:
                parameter.normal_(0.0, std)

    def cut(self, slices: int) -> None:
        """Cut every expert into `slices` of equal hidden width, before `shard`. Raises `ConfigError`."""
        hidden = self.down.shape[2]
        if self.slices > 1 or slices < 1 or hidden % (8 * slices):
            raise ConfigError(f"r={slices}: must cut the hidden width {hidden} of an expert into multiples of 8, once")
        if slices > 1:
            self.slices = slices
            self.residents = ResidentGuests.empty(0, 1, self.num_experts * slices)
            self.gate_up = nn.Parameter(cut_matrices("gate_up", self.gate_up.detach(), slices).contiguous())
            self.down = nn.Parameter(cut_matrices("down", self.down.detach(), slices).contiguous())

    def shard(
        self, ep: ExpertGroup, guest_slots: int = 0, max_rows: int | None = None, keep_hidden: bool = True
    ) -> None:
        """Keep the experts, or slices, whose home is `ep.rank`.

        `guest_slots`: guests that stay here until the last backward of an optimizer step; `max_rows`: rows computed at
        a time; `keep_hidden`: whether rows and hidden activations stay for the backward, or just the tokens that came.
        """
        self.ep, self.max_rows, self.keep_hidden = ep, max_rows, keep_hidden
        self.residents = ResidentGuests.empty(guest_slots, ep.size, self.num_experts * self.slices)
        for name, whole in list(self.named_parameters(recurse=False)) if ep.size > 1 else ():
            own = nn.Parameter(whole.detach()[self.own_experts()].clone(), requires_grad=whole.requires_grad)
            setattr(self, name, own)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The parameters that hold one entry an expert, but for adapters."""
        return ("gate_up", "down")

    @property
    def is_transposed(self) -> bool:
        """Whether matrices are [E, in, out]."""
        return False

    @property
    def home(self) -> Ints:
        """[r · E] the rank that owns each slice; [E] where experts are whole."""
        return default_home(self.num_experts * self.slices, self.ep.size)

    @property
    def limits(self) -> Limits:
        """What a planner is to keep within; one guest may always pass."""
        return Limits(rows=self.max_rows, guests=max(self.residents.slots, 1))

    def own_experts(self) -> list[int]:
        """Return the global numbers of the experts kept here, or of the slices, in the order of their slots."""
        return np.flatnonzero(self.home == self.ep.rank).tolist()

    def forward(
        self,
        x_TD: Tensor,
        routing: Routing,
        plan: Plan,
        most_per_token: int,
        clock: Clock,
        meanwhile: Callable[[Tensor], Tensor] | None = None,
        num_chunks: int = 1,
    ) -> Tensor:
        """Return [T, D], the weighted sum of every token's experts, wherever the plan has them computed.

        All ranks of the group call it. `most_per_token`: selections of any token on any rank. `meanwhile(x_TD)` is
        added; it runs while rows travel. `num_chunks`: the parts in which they do, the same on every rank.

        Raises `TypeError` where tokens and parameters differ in dtype.
        """
        weights: list[Tensor] = [self.gate_up, self.down]
        if self.adapters is not None:
            weights += self.adapters.list_tensors(len(self.gate_up), x_TD.dtype)
        routing, most_per_token = select_slices(routing, self.slices, self.num_experts), most_per_token * self.slices
        home, kernels = self.home, self.choose_kernels(x_TD)
        first = int(np.searchsorted(home, self.ep.rank))
        with clock.phase("lend"):
            loan = GuestLoan(weights, first, plan, self.residents, self.ep)
        with clock.phase("dispatch"):
            tables = DispatchTables.build(routing, plan, self.ep, kernels, len(x_TD), most_per_token, num_chunks)
            clock.sent_bytes = sum(tables.copies_out) * x_TD.shape[1] * x_TD.element_size()
            context = LayerContext(
                ep=self.ep,
                home=home,
                first_expert=first,
                plan=plan,
                tables=tables,
                kernels=kernels,
                residents=self.residents,
                step=self.step,
                clock=clock,
                max_rows=self.max_rows,
                keep_hidden=self.keep_hidden,
                update=TRAIN_ALL if self.adapters is None else self.adapters.update,
            )
            context.loan.put(loan)
            ticket = dispatch_tokens(x_TD, routing.weight_N, context)
        shared_TD = None if meanwhile is None else meanwhile(x_TD)
        y_TD: Tensor = combine_experts(ticket, context, *weights)
        return y_TD if shared_TD is None else y_TD + shared_TD

    def choose_kernels(self, x_TD: Tensor) -> Backend:
        """Return the kernels for these tokens. Raises `TypeError` where the parameters have another dtype."""
        if x_TD.dtype != self.gate_up.dtype:
            raise TypeError(f"experts in {self.gate_up.dtype} take no tokens in {x_TD.dtype}")
        return self.kernel_choice.choose(x_TD.device, x_TD.dtype, (self.gate_up, self.down))
