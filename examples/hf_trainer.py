"""Train a Mixture-of-Experts model of transformers with its own Trainer, the experts spread over all ranks.

torchrun --nproc-per-node 2 examples/hf_trainer.py OUTPUT_FOLDER [CHECKPOINT_TO_GO_ON_FROM]
"""

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainingArguments

from moetrain import hf
from moetrain.distributed.mesh import ExpertGroup
from moetrain.hf.trainer import ExpertParallelMixin


class Counting(Dataset):
    """Sequences that count upwards."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        tokens = (torch.arange(16) * (1 + number % 3) + number) % 128
        return {"input_ids": tokens, "labels": tokens}


class SpreadTrainer(ExpertParallelMixin, Trainer):
    """Saves and resumes all experts; takes `handle=`."""


folder, ranks = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
arguments = TrainingArguments(  # makes the process group
    output_dir=str(folder),
    per_device_train_batch_size=4 // ranks,
    gradient_accumulation_steps=2,
    max_steps=4,
    save_steps=2,
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
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # after the experts are spread
data, optimizers = Counting(), (optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 4))
trainer = SpreadTrainer(model=model, args=arguments, train_dataset=data, optimizers=optimizers, handle=handle)
trainer.train(resume_from_checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
trainer.save_model(str(folder / "last"))
if trainer.is_world_process_zero():
    print("norms " + " ".join(f"{norm:.6f}" for norm in trainer.norms))
