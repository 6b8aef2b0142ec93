"""A Mixture-of-Experts model of transformers under accelerate alone: it wraps the dense part, the experts are spread.

torchrun --nproc-per-node 2 examples/hf_accelerate.py OUTPUT_FOLDER
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader
from transformers import OlmoeConfig, OlmoeForCausalLM

from moetrain import hf
from moetrain.distributed.mesh import ExpertGroup

accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(split_batches=True))
torch.set_num_threads(1)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 48, "vocab_size": 128, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2}
model = OlmoeForCausalLM(OlmoeConfig(**sizes, **heads, max_position_embeddings=64, pad_token_id=0, eos_token_id=1))
group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else ExpertGroup.alone()
handle = hf.expert_parallel(model, group)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # after the experts are spread
rows = [(torch.arange(16) * (1 + n % 3) + n) % 128 for n in range(32)]
parallel, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch_size=8))

for tokens in loader:
    with handle.step():
        accelerator.backward(parallel(input_ids=tokens, labels=tokens).loss)
    norm = handle.clip_grad_norm_(0.5)  # in place of accelerator.clip_grad_norm_, which sees this rank's experts alone
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"norm {norm:.6f}")

folder = Path(sys.argv[1])
handle.save_pretrained(folder)  # in place of accelerator.save_state, which saves rank 0's experts alone
state = handle.full_optimizer_state(optimizer.optimizer)
if accelerator.is_main_process:
    torch.save(state, folder / "optimizer.pt")
accelerator.wait_for_everyone()

handle.load_pretrained(folder)  # and back, on any number of ranks
handle.load_full_optimizer_state(optimizer.optimizer, torch.load(folder / "optimizer.pt", mmap=True, weights_only=True))
accelerator.end_training()
