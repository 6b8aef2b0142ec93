"""A plain loop over a model of transformers: DDP for the dense part, the experts spread over the ranks.

torchrun --nproc-per-node 2 examples/hf_ddp.py OUTPUT_FOLDER
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import GptOssConfig, GptOssForCausalLM

from moetrain import hf

os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
dist.init_process_group("gloo")
rank, num_ranks = dist.get_rank(), dist.get_world_size()
torch.set_num_threads(1)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 48, "vocab_size": 128, "head_dim": 16, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
config = GptOssConfig(**sizes, **heads, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
model = GptOssForCausalLM(config)
model.activation_checkpointing_enable()  # recompute replays choices and plans
handle = hf.expert_parallel(model, dist.group.WORLD)
parallel = DistributedDataParallel(model)  # leaves the experts alone
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # after the experts are spread

for step in range(4):
    tokens = torch.stack([(torch.arange(16) * (1 + n % 3) + n) % 128 for n in range(8 * step, 8 * step + 8)])
    mine = tokens.chunk(num_ranks)[rank]
    with handle.step():
        parallel(input_ids=mine, labels=mine).loss.backward()
    norm = handle.clip_grad_norm_(0.5)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"norm {norm:.6f}")
handle.save_pretrained(sys.argv[1])
dist.destroy_process_group()
