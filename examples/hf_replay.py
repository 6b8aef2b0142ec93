"""Update a policy on the experts that its rollout chose (R3), with rollouts as vLLM or SGLang return them.

torchrun --nproc-per-node 2 examples/hf_replay.py OUTPUT_FOLDER

The rollouts are made here, by the model of a step before in place of a server, so that the example needs none.
"""

import base64
import os
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moetrain import hf
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.recorded import RoutedExperts, read_routed_experts

folder, ranks, rank = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
if ranks > 1:
    torch.distributed.init_process_group("gloo")
sizes = {"hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32, "vocab_size": 128, "head_dim": 16}
heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8}
config = Qwen3MoeConfig(**sizes, **heads, num_experts_per_tok=2)


def build(seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(config)


def roll_out(number: int) -> tuple[list[int], str, float]:
    """Tokens of prompt and completion, their experts as SGLang sends them, and a reward."""
    tokens = torch.randint(3, 128, (1, 16), generator=torch.Generator().manual_seed(number))
    with torch.no_grad(), hf.record_choices(server) as made:
        server(input_ids=tokens[:, :-1])  # no forward has seen the token that was sampled last
    sent = base64.b64encode(made.experts.int().numpy().tobytes()).decode()
    return tokens[0].tolist(), sent, (-1.0) ** number


server = build(seed=1)  # not the weights that are trained: its routers choose otherwise
rollouts = [roll_out(number) for number in range(4)]

model = build(seed=0)
handle = hf.expert_parallel(model, torch.distributed.group.WORLD if ranks > 1 else ExpertGroup.alone(), reduction="sum")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
mine = rollouts[rank * 4 // ranks : (rank + 1) * 4 // ranks]
tokens = torch.tensor([each for each, _, _ in mine])
experts = torch.stack([hf.read_rollout(model, each, sent) for each, sent, _ in mine])
rewards = torch.tensor([reward for _, _, reward in mine])
for step in range(4):
    handle.begin_step()
    with hf.replay_choices(model, experts[:, :-1]), hf.record_choices(model) as made:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    share = (made.experts == experts[:, :-1].flatten(0, 1)).float().mean()
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    loss = (rewards[:, None] * nats).sum() / 60  # targets of all rollouts
    loss.backward()
    handle.end_step()
    handle.reduce_dense_gradients()
    norm = handle.clip_grad_norm_(0.5)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        print(f"step {step}: {float(share):.0%} of the choices are the rollouts'")
        print(f"norms {norm:.6f}")
if rank == 0:  # the same choices in a file, which `moetrain train router.replay=FILE` reads
    samples = [(np.array(each), hf.read_rollout(model, each, sent).numpy()) for each, sent, _ in rollouts]
    RoutedExperts.collect(hf.describe_choices(model), samples).write(folder / "choices.safetensors")
    print(f"{len(read_routed_experts(folder / 'choices.safetensors').tokens)} tokens in the file")
handle.save_pretrained(folder / "last")
