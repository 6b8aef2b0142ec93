"""DeepSpeed's configuration, made from ours; imports nothing of DeepSpeed: mistakes show before any rank starts.

`ours` is what moetrain decides: `engine.extra` may not touch it. `DEFAULTS` may be overridden there.
"""

from typing import Any

import torch

from moetrain.config import Config, ConfigError, DeepSpeed
from moetrain.engine import precision

Tree = dict[str, Any]

DEFAULTS: Tree = {
    "zero_optimization": {  # elements of a bucket that is reduced or gathered at a time; DeepSpeed's own are for GPUs
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
        "overlap_comm": False,
    }
}
TAKEN = {  # what moetrain does in DeepSpeed's place, or what its MoE layers cannot live with: -> our fields
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "fp16": "train.dtype",
    "amp": "train.dtype",
    "torch_autocast": "train.dtype",
    "train_batch_size": "train.global_batch",
    "prescale_gradients": "no field: gradients are summed",
    "gradient_predivide_factor": "no field: gradients are summed",
    "managed_gradient_accumulation": "train.micro_batch",
    "expert_parallel": "parallel.ep",
    "tensor_parallel": "no field: not supported",
    "sequence_parallel_size": "no field: not supported",
    "activation_checkpointing": "train.recompute",
    "bf16": "train.dtype",
    "data_types": "no field: gradients add up in fp32",
    "comet": "track; keys would lie in checkpoints",
    "wandb": "track",
    "tensorboard": "track",
    "csv_monitor": "track",
    "zero_optimization.cpu_offload": "engine.offload",
    "zero_optimization.offload_optimizer": "engine.offload",
    "zero_optimization.offload_param": "no field: for ZeRO-3 only",
    "zero_optimization.zenflow": "no field: not supported",
}


def ours(config: Config, world: int) -> Tree:
    """What `world` ranks run with, whatever `engine.extra` says."""
    options = config.engine
    assert isinstance(options, DeepSpeed)
    bf16 = precision.of(config) == torch.bfloat16
    zero: Tree = {"stage": options.zero_stage, "contiguous_gradients": True, "reduce_scatter": True}
    if options.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    tree: Tree = {
        "train_micro_batch_size_per_gpu": config.micro_batch(world),
        "gradient_accumulation_steps": config.micro_steps(world),
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "bf16": {"enabled": bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if bf16 and options.zero_stage > 0:
        tree["data_types"] = {"grad_accum_dtype": "fp32"}
    return tree


def ds_config(config: Config, world: int) -> Tree:
    """DeepSpeed's configuration of a run. Raises `ConfigError` where `engine.extra` contradicts what moetrain sets."""
    assert isinstance(config.engine, DeepSpeed)
    _refuse(config.engine.extra or {}, ours(config, world), "")
    return _merged(_merged(DEFAULTS, config.engine.extra or {}), ours(config, world))


def _refuse(extra: Tree, fixed: Tree, path: str) -> None:
    for key, value in extra.items():
        name = f"{path}{key}"
        if name in TAKEN:
            raise ConfigError(f"engine.extra.{name}: is moetrain's to set ({TAKEN[name]})")
        if key in fixed and isinstance(value, dict) and isinstance(fixed[key], dict):
            _refuse(value, fixed[key], f"{name}.")
        elif key in fixed:
            raise ConfigError(f"engine.extra.{name}={value}: is set by moetrain, to {fixed[key]}")
        elif isinstance(value, dict):
            _refuse(value, {}, f"{name}.")


def _merged(under: Tree, over: Tree) -> Tree:
    both = {key: _merged(under[key], over[key]) for key in under.keys() & over.keys() if isinstance(over[key], dict)}
    return {**under, **over, **both}
