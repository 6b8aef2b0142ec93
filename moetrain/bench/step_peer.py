"""What people would use in our place, in the same processes: Qwen3-MoE of transformers under DDP, AdamW and clipping.

It has the shape of our model, its own random weights, the same tokens, a balance loss and the same optimizer settings.
bf16 is autocast over fp32 weights. Every rank holds all experts; gradients are averaged over gloo or NCCL.
"""

import contextlib
import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moetrain.bench.timing import read_clock
from moetrain.config import Config, Model
from moetrain.data.loader import Sequences
from moetrain.distributed.comm import all_gather, barrier
from moetrain.distributed.mesh import Mesh
from moetrain.training.step import Batch

EXPERTS = ("grouped_mm", "eager")  # `batched_mm` copies an expert's weights for every row: gigabytes a layer
TRIES = 2  # steps of each, the second of which is timed


class Peer:
    """A transformers model in training whose steps are measured."""

    def __init__(self, settings: Config, mesh: Mesh, shares: Sequence[Sequences]) -> None:
        """All ranks call it; the faster implementation of the experts on the micro-batches of `shares` is taken."""
        transformers = importlib.import_module("transformers")
        self._config, self._mesh = settings, mesh
        torch.manual_seed(settings.train.seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.device(mesh.device):
                self.model: Any = transformers.Qwen3MoeForCausalLM(_describe_model(settings, transformers))
            self._ddp: nn.Module = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            betas=settings.optim.betas,
            eps=settings.optim.eps,
            weight_decay=settings.optim.weight_decay,
            fused=True,
        )
        seconds = {}
        for name in EXPERTS:
            self.model.set_experts_implementation(name)
            for _ in range(TRIES):
                barrier()
                began = read_clock(mesh.device)
                self.step(shares, lr=0.0)
                own = torch.tensor([read_clock(mesh.device) - began], dtype=torch.float64, device=mesh.device)
                seconds[name] = float(all_gather(own, mesh.ep.rows).max())
        self.experts = min(seconds, key=lambda name: seconds[name])
        self.model.set_experts_implementation(self.experts)
        self.name = f"transformers {transformers.__version__}, DDP"

    def step(self, shares: Sequence[Sequences], lr: float) -> float:
        """Take one optimizer step; return this rank's mean loss."""
        optim, device = self._config.optim, self._mesh.device
        total = 0.0
        for number, share in enumerate(shares):
            batch = Batch.from_sequences(share, self._config, device)
            last = number == len(shares) - 1
            with contextlib.nullcontext() if last else self._ddp.no_sync():  # type: ignore[operator]
                with torch.autocast(device.type, torch.bfloat16, enabled=self._config.train.dtype == "bf16"):
                    out = self._ddp(
                        input_ids=batch.tokens,
                        labels=batch.targets,
                        shift_labels=batch.targets.contiguous(),
                        output_router_logits=True,
                        use_cache=False,
                    )
                loss = out.loss / len(shares)
                loss.backward()
            total += float(loss.detach())
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if optim.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), optim.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return total


def _describe_model(settings: Config, transformers: Any) -> Any:
    """Return the transformers config of our model; `protocol.check_peer` has let it through."""
    m, r = settings.model, settings.router
    assert isinstance(m, Model)
    return transformers.Qwen3MoeConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.dim,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads,
        num_key_value_heads=m.num_kv_heads,
        head_dim=m.head_dim,
        num_experts=m.num_experts,
        num_experts_per_tok=r.top_k,
        norm_topk_prob=r.top_k > 1 if r.normalise is None else r.normalise,
        moe_intermediate_size=m.expert_hidden,
        intermediate_size=m.dense_hidden,
        mlp_only_layers=list(range(m.num_dense_layers)),
        tie_word_embeddings=m.tied_embeddings,
        rms_norm_eps=m.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
        initializer_range=m.init_std,
        router_aux_loss_coef=settings.balance.coefficient,
        max_position_embeddings=settings.train.seq_len,
        attn_implementation="sdpa",
        pad_token_id=None,
        eos_token_id=None,
    )
