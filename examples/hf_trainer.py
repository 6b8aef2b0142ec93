"""Train a Mixture-of-Experts model of transformers with its own Trainer, the experts spread over all ranks.

torchrun --nproc-per-node 2 examples/hf_trainer.py OUTPUT_FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

from moetrain import hf
from moetrain.distributed.mesh import ExpertGroup
from moetrain.hf.trainer import ExpertParallelCallback


class Counting(Dataset):
    """Sequences that count upwards."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) * (1 + number % 3) + number) % 128
        return {"input_ids": tokens, "labels": tokens}


folder, ranks = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
arguments = TrainingArguments(  # makes the process group
    output_dir=str(folder),
    per_device_train_batch_size=4 // ranks,
    gradient_accumulation_steps=2,
    max_steps=4,
    save_steps=4,
    learning_rate=0.1,
    optim="sgd",
    max_grad_norm=0.5,
    train_sampling_strategy="sequential",
    logging_steps=1,
    report_to="none",
    use_cpu=True,
    ddp_backend="gloo",
    disable_tqdm=True,
)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32, "vocab_size": 128, "head_dim": 16}
heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8}
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts_per_tok=2))
group = torch.distributed.group.WORLD if ranks > 1 else ExpertGroup.alone()
handle = hf.expert_parallel(model, group)
callback = ExpertParallelCallback(handle)
trainer = Trainer(model=model, args=arguments, train_dataset=Counting(), callbacks=[callback])
trainer.train()
handle.save_pretrained(folder / "last")
if trainer.is_world_process_zero():
    print("norms " + " ".join(f"{norm:.6f}" for norm in callback.norms))
