"""DeepSpeed's configuration, made from ours. It imports nothing of DeepSpeed: mistakes show before any rank starts.

What `fixed_settings` returns is decided by moetrain, and `engine.extra` may not change it; it may change `DEFAULTS`.
"""

from importlib.util import find_spec
from typing import Any

from moetrain.common.errors import ConfigError, short
from moetrain.config.schema import Config, DeepSpeed

Tree = dict[str, Any]

DEFAULTS: Tree = {
    "zero_optimization": {  # elements of a bucket that is reduced or gathered at a time; DeepSpeed's own are for GPUs
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
        "overlap_comm": False,
    }
}
RESERVED = {  # what moetrain does in place of DeepSpeed, or what its MoE layers cannot work with: -> our fields
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


def check(config: Config, options: DeepSpeed, world: int, ep: int, r: int) -> None:
    """Raises `ConfigError` for what the deepspeed engine cannot do with `ep` ranks a group and `r` slices an expert."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "engine=deepspeed: needs DeepSpeed, which is not installed: pip install 'moetrain[deepspeed]'"
        )
    if options.zero_stage == 3:
        raise ConfigError("engine.zero_stage=3: must be 0, 1 or 2; DeepSpeed's MoE layers do not work under ZeRO-3")
    if options.offload == "nvme":
        rule = "must be none or cpu; DeepSpeed offloads to NVMe under ZeRO-3 only, which its MoE layers refuse"
        raise ConfigError(f"engine.offload=nvme: {rule}")
    if options.offload != "none" and options.zero_stage == 0:
        raise ConfigError(f"engine.offload={options.offload}: needs engine.zero_stage=1 or 2")
    if r > 1:
        raise ConfigError(f"parallel.r={r}: must be 1 under engine=deepspeed, which has no part in cutting experts")
    if any(experts % ep for experts in config.model.experts_of_layers):
        raise ConfigError(f"parallel.ep={ep}: must divide the number of experts of every layer under engine=deepspeed")
    if config.optim.state_dtype != "fp32":
        raise ConfigError(f"optim.state_dtype={config.optim.state_dtype}: must be fp32 under engine=deepspeed")
    if config.parallel.dp_replicate > 1:
        rule = "must be 1 under engine=deepspeed, which shards over all ranks"
        raise ConfigError(f"parallel.dp_replicate={config.parallel.dp_replicate}: {rule}")
    make_settings(config, world)  # refuses what engine.extra must not contain


def fixed_settings(config: Config, world: int) -> Tree:
    """What `world` ranks run with, whatever `engine.extra` says. `train.dtype=auto` counts as bf16."""
    options = config.engine
    assert isinstance(options, DeepSpeed)
    bf16 = config.train.dtype != "fp32"
    zero: Tree = {"stage": options.zero_stage, "contiguous_gradients": True, "reduce_scatter": True}
    if options.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    micro_batch, micro_steps = config.train.split_batch(world)
    tree: Tree = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_steps,
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


def make_settings(config: Config, world: int) -> Tree:
    """DeepSpeed's configuration of a run. Raises `ConfigError` where `engine.extra` contradicts what moetrain sets."""
    assert isinstance(config.engine, DeepSpeed)
    _refuse(config.engine.extra or {}, fixed_settings(config, world), "")
    return _merged(_merged(DEFAULTS, config.engine.extra or {}), fixed_settings(config, world))


def _refuse(extra: Tree, fixed: Tree, path: str) -> None:
    for key, value in extra.items():
        name = f"{path}{key}"
        if name in RESERVED:
            raise ConfigError(
                f"engine.extra.{name}: must be left to moetrain ({RESERVED[name]})"
            )  # without its value, which may be an API key
        if key in fixed and isinstance(value, dict) and isinstance(fixed[key], dict):
            _refuse(value, fixed[key], f"{name}.")
        elif key in fixed:
            raise ConfigError(f"engine.extra.{name}={short(value)}: must be left out, moetrain sets it to {fixed[key]}")
        elif isinstance(value, dict):
            _refuse(value, {}, f"{name}.")


def _merged(under: Tree, over: Tree) -> Tree:
    both = {key: _merged(under[key], over[key]) for key in under.keys() & over.keys() if isinstance(over[key], dict)}
    return {**under, **over, **both}
