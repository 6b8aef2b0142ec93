"""Post-train a Mixture-of-Experts model of transformers with TRL's SFTTrainer, the experts spread over all ranks.

torchrun --nproc-per-node 2 examples/hf_sft.py OUTPUT_FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import SFTConfig, SFTTrainer

from moetrain import hf
from moetrain.distributed.mesh import ExpertGroup
from moetrain.hf.trainer import ExpertParallelMixin


class SpreadSFTTrainer(ExpertParallelMixin, SFTTrainer):
    """Saves and resumes all experts; takes `handle=`."""


folder, ranks = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1"))
words = ["<pad>", "<eos>", "what", "comes", "after", "?", *(str(number) for number in range(100))]

inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="?"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")
pairs = [{"prompt": f"what comes after {n} ?", "completion": f" {n + 1}"} for n in range(32)]

arguments = SFTConfig(  # makes the process group
    output_dir=str(folder),
    per_device_train_batch_size=8 // ranks,
    max_steps=4,
    save_strategy="no",
    max_grad_norm=0.5,
    router_aux_loss_coef=0.0,  # else TRL adds the family's own loss, by the tokens of each rank alone
    gradient_checkpointing=True,  # choices and plans are replayed
    train_sampling_strategy="sequential",
    logging_steps=1,
    report_to="none",
    bf16=False,
    use_cpu=True,
    ddp_backend="gloo",
    disable_tqdm=True,
)
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32, "vocab_size": 128, "head_dim": 16}
heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8}
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1))
group = torch.distributed.group.WORLD if ranks > 1 else ExpertGroup.alone()
handle = hf.expert_parallel(model, group)
trainer = SpreadSFTTrainer(
    model=model,
    args=arguments,
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
    optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),  # after the experts are spread
    handle=handle,
)
trainer.train()
trainer.save_model(str(folder / "last"))
if trainer.is_world_process_zero():
    print("norms " + " ".join(f"{norm:.6f}" for norm in trainer.norms))
