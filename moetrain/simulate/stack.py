"""What software adds to the hardware: how much of a transfer hides behind computation, and what the host costs.

Few numbers, each physical. Those of `moetrain` are fit to the layers of gpt-oss-120b and DeepSeek-V3 and to the step of
OLMoE that were measured on one H100 (docs/results/NVIDIA-H100-80GB-HBM3), those of others to stated rows of
docs/results/published.csv; docs/results/simulate.md has the errors on these and on all other rows.
"""

from dataclasses import dataclass

from moetrain.common.errors import ConfigError


@dataclass(frozen=True)
class Stack:
    """A training program, as far as a step's time depends on it."""

    name: str
    exchange_hidden: float  # share of dispatch and combine that passes behind computation, 0 to 1
    gather_hidden: float  # the same of parameter gathers and gradient reductions
    layer_launches: int  # operations that the host launches for a layer without experts, forward and backward
    moe_launches: int  # and for the experts' part, with what the host does between them
    host_ahead: float  # seconds of the host that pass behind a second of the device's work on experts
    syncs: int  # times that the host waits for the device in a layer with experts
    collectives: int  # of a layer with experts, forward and backward: counts, exchanges, gathers, reductions
    weight_gradient_bytes: float  # moved for a parameter of an expert in each backward, besides its product
    logit_bytes: float  # moved for a logit, forward and backward, besides the head's products
    optimizer_bytes: float  # moved for a parameter in the update
    gather_bytes: float  # copied on the device for a parameter that FSDP gathers, besides its travel
    reduce_bytes: float  # and for its gradient; the same measured step shows both together, 33 bytes
    router_dtype: str
    has_chunked_logits: bool  # of the cross entropy: never all of a micro-step
    two_level: bool  # a token crosses between NVLink domains once, and is forwarded inside


STACKS = {
    "moetrain": Stack("moetrain", 0.0, 0.8, 120, 600, 0.1, 2, 12, 8.0, 40.0, 46.0, 10.0, 23.0, "fp32", True, False),
    "automodel": Stack("automodel", 0.0, 0.8, 120, 200, 0.1, 1, 12, 8.0, 16.0, 30.0, 10.0, 23.0, "bf16", False, True),
    "megatron": Stack("megatron", 0.0, 0.8, 60, 1150, 0.1, 1, 12, 8.0, 16.0, 30.0, 10.0, 23.0, "bf16", False, True),
}


def find_stack(name: str) -> Stack:
    """Raises `ConfigError`."""
    if name not in STACKS:
        raise ConfigError(f"stack={name}: must be one of {', '.join(STACKS)}")
    return STACKS[name]
