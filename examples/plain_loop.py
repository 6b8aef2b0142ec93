"""A mixture of experts in a plain training loop: two ranks, a router that sends nearly everything to two experts.

torchrun --nproc-per-node 2 examples/plain_loop.py
"""

import torch
import torch.distributed as dist
from torch import nn

import moetrain

dist.init_process_group("gloo")
rank, num_ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
torch.set_num_threads(1)

layer = moetrain.MoE(dim=128, hidden=256, experts=8, top_k=2, router_options={"skew": 6.0})  # lopsided on purpose
model = nn.Sequential(nn.Linear(32, 128), layer, nn.Linear(128, 32))
handle = moetrain.expert_parallel(model, dist.group.WORLD, reduction="mean")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after the experts are spread

generator = torch.Generator().manual_seed(rank)  # every rank has data of its own
for step in range(1, 6):
    x = torch.randn(1024, 32, generator=generator)
    with handle.step():
        loss = nn.functional.mse_loss(model(x), x.roll(1, dims=1))
        (loss + handle.balance_loss()).backward()
    handle.reduce_dense_gradients()  # the experts' gradients are complete
    norm = handle.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        found = handle.statistics()[0]
        before, after = found.imbalance_before, found.imbalance_after
        print(f"step {step}: loss {loss:.4f}, norm {norm:.3f}, max/mean rows of a rank {before:.2f} -> {after:.2f}")

dist.barrier()
dist.destroy_process_group()
