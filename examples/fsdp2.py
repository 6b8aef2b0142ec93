"""Experts spread over two ranks, everything else sharded by FSDP2; the whole weights at the end.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import moetrain

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.set_num_threads(1)
mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))

model = nn.Sequential(nn.Linear(32, 64), moetrain.MoE(dim=64, hidden=128, experts=8, top_k=2), nn.Linear(64, 32))
handle = moetrain.expert_parallel(model, mesh["ep"])
fully_shard(model, mesh=mesh, ignored_params=handle.expert_parameters())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

generator = torch.Generator().manual_seed(rank)
for step in range(1, 9):
    x = torch.randn(512, 32, generator=generator)
    with handle.step():
        loss = nn.functional.mse_loss(model(x), x.roll(1, dims=1))
        (loss + handle.balance_loss()).backward()
    norm = handle.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}: loss {loss.item():.4f}, norm {norm:.3f}")

weights = handle.full_state_dict()  # as on one device: all experts, nothing sharded
if rank == 0:
    print(f"{len(weights)} whole tensors, the experts' {tuple(weights['1.experts.gate_up'].shape)}")
dist.barrier()
dist.destroy_process_group()
