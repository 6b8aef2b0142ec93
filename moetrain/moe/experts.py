"""The experts of one MoE layer: SwiGLU by grouped GEMM, over home slots and guest slots.

T tokens here, D width, H expert hidden width, M rows here, S slots here.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.mesh import Expert
from moetrain.moe import guests
from moetrain.moe.clock import Clock
from moetrain.moe.dispatch import Route, combine, dispatch
from moetrain.moe.plan import Ints, Plan
from moetrain.moe.planners import default_home
from moetrain.moe.router import Routing


def swiglu(rows_MD: Tensor, gate_up: Tensor, down: Tensor, slot_rows: list[int]) -> Tensor:
    """[M, D] -> [M, D]: `down(silu(gate(x)) * up(x))`, slot by slot. gate_up [S, 2H, D], down [S, D, H]."""
    ends = torch.tensor(slot_rows, device=rows_MD.device).cumsum(0).to(torch.int32)
    gate_MH, up_MH = F.grouped_mm(rows_MD, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_MH) * up_MH, down.transpose(1, 2), offs=ends)


class Experts(nn.Module):
    """All experts of a layer; after `shard`, those whose home is this rank.

    Parameters, as Hugging Face fuses them: `gate_up` [E, 2H, D], gate above up, and `down` [E, D, H].
    """

    def __init__(self, dim: int, hidden: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.ep: Expert | None = None

    def shard(self, ep: Expert) -> None:
        """Keep the experts whose home is `ep.rank`."""
        self.ep = ep
        if ep.size > 1:
            self.gate_up = nn.Parameter(self.gate_up.detach()[self.own_experts()].clone())
            self.down = nn.Parameter(self.down.detach()[self.own_experts()].clone())

    @property
    def home(self) -> Ints:
        """[E] the rank that owns each expert."""
        return default_home(self.num_experts, self.ep.size if self.ep else 1)

    def own_experts(self) -> list[int]:
        """Global numbers of the experts kept here, in the order of their slots."""
        return (self.home == (self.ep.rank if self.ep else 0)).nonzero()[0].tolist()

    def forward(self, x_TD: Tensor, routing: Routing, plan: Plan, most_per_token: int, clock: Clock) -> Tensor:
        """[T, D] -> [T, D]: the weighted sum of every token's experts, wherever the plan has them computed."""
        assert self.ep is not None, "shard() comes first"
        gate_up: Tensor = self.gate_up
        down: Tensor = self.down
        lends = bool(plan.guests())  # the same on every rank
        with clock.phase("lend"):
            if lends:
                loan = guests.Loan.of(plan, self.ep.rank)
                pending = guests.start((gate_up, down), loan, self.ep)
        with clock.phase("dispatch"):
            route = Route.of(routing, plan, self.ep.rank, len(x_TD), most_per_token)
            rows_MD = dispatch(x_TD, route, self.ep)
        with clock.phase("lend"):
            if lends:
                gate_up, down = guests.finish((gate_up, down), pending, loan, self.ep)
        with clock.phase("experts"):
            out_MD = swiglu(rows_MD, gate_up, down, route.slot_rows)
        with clock.phase("combine"):
            return combine(out_MD, routing.weight_N, route, self.ep)
