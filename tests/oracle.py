"""The slow loop: the specification that every fast path equals."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.moe.routing.base import Routing


def moe(x_TD: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """[T, D]: for every selection, one expert on one token, weighted. gate_up [E, 2H, D], down [E, D, H]."""
    rows = [torch.zeros_like(x) for x in x_TD]
    for token, expert, weight in zip(
        routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N, strict=True
    ):
        gate, up = (gate_up[expert] @ x_TD[token]).chunk(2)
        rows[token] = rows[token] + weight.to(x_TD.dtype) * (down[expert] @ (F.silu(gate) * up))
    return torch.stack(rows) if rows else torch.zeros_like(x_TD)
