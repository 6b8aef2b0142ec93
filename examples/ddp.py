"""Experts spread over two ranks, everything else under DistributedDataParallel, with two micro-steps a step.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import moetrain

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)

model = nn.Sequential(nn.Linear(32, 64), moetrain.MoE(dim=64, hidden=128, experts=8, top_k=2), nn.Linear(64, 32))
handle = moetrain.expert_parallel(model, dist.group.WORLD)  # before DDP, which then leaves the experts alone
ddp = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

generator, micro_steps = torch.Generator().manual_seed(rank), 2
for step in range(1, 9):
    total = 0.0
    with handle.step(micro_steps):
        for micro in range(micro_steps):
            x = torch.randn(256, 32, generator=generator)
            with ddp.no_sync() if micro < micro_steps - 1 else nullcontext():
                loss = nn.functional.mse_loss(ddp(x), x.roll(1, dims=1)) / micro_steps
                (loss + handle.balance_loss()).backward()
            total += loss.item()
    handle.clip_grad_norm_(1.0)  # dense and expert gradients are averaged by now
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}: loss {total:.4f}")

dist.barrier()
dist.destroy_process_group()
