"""What it costs to have the balance frequencies of the global batch: their all-reduces, and the arithmetic on them."""

from collections.abc import Sequence

import torch

from moetrain.bench.cell import now
from moetrain.distributed.comm import all_reduce_sum, barrier
from moetrain.distributed.mesh import Mesh
from moetrain.moe.options import BalanceOptions
from moetrain.moe.routing import Router
from moetrain.moe.routing.balance import BalanceLoss
from moetrain.observe.collect.meter import Part

REPEATS = 101


def sync_ms(mesh: Mesh, options: BalanceOptions, routers: Sequence[Router], parts: Sequence[Part]) -> float:
    """Median milliseconds of the slowest rank, for all micro-steps of a step whose `parts` are given.

    Every repetition begins right after a barrier: what a rank waits in a step for slower ones is imbalance, not this.
    """
    seconds = torch.zeros(mesh.world, REPEATS, dtype=torch.float64, device=mesh.device)
    for repeat in range(REPEATS):
        balance = BalanceLoss(options, routers, tokens_in_batch=1, length=1)
        barrier()
        began = now(mesh.device)
        for part in parts[1:] if balance.looks_ahead else []:
            balance.foresee(part.stats)
        for part in parts:
            balance.synchronise(part.stats)
        seconds[mesh.rank, repeat] = now(mesh.device) - began
    return 1e3 * float(all_reduce_sum(seconds).amax(0).median())
