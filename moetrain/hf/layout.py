"""How an experts module of transformers lays out its weights, and what it computes between its two products.

E experts, S slots, D width, H hidden width, M rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.common.errors import ConfigError
from moetrain.hf.gate import ClampedGate, find_clamped_gate

SOMETIMES = "vision_moe.experts"  # of ERNIE 4.5 VL: entered where there are images, so perhaps not on all ranks


@dataclass(frozen=True)
class ExpertsLayout:
    """What the decorator `@use_experts_implementation` says about a module."""

    names: tuple[str, ...]  # the parameters that hold one entry an expert: the two matrices, then their biases
    transposed: bool  # matrices are [in, out]; else [out, in], as in `nn.Linear`
    has_bias: bool
    activate: Callable[[Tensor], Tensor]  # the family's own, rows of the first product [M, 2H or H] -> [M, H]
    gate: ClampedGate | None  # the same as numbers, where we have a kernel for it
    norm: nn.Module | None  # after the second product, one for all experts
    is_swiglu: bool  # whether the kernels for silu(gate) * up over [out, in] compute it all

    @property
    def num_norms(self) -> int:
        """The parameters of `norm`."""
        return 0 if self.norm is None else len(list(self.norm.parameters()))

    @classmethod
    def read(cls, name: str, module: Any) -> "ExpertsLayout":
        """Read the layout of a module called `name`. Raises `ConfigError` where it is none that is known."""
        first = "gate_up_proj" if module.has_gate else "up_proj"
        names = (first, "down_proj") + ((f"{first}_bias", "down_proj_bias") if module.has_bias else ())
        own = dict(module.named_parameters(recurse=False))
        if set(own) != set(names):
            raise ConfigError(f"{name}: {type(module).__name__} has {sorted(own)}; expected {sorted(names)}")
        wrong = {key: tuple(value.shape) for key, value in own.items() if value.shape[:1] != (module.num_experts,)}
        if wrong:
            raise ConfigError(f"{name}: shapes {wrong} do not begin with num_experts={module.num_experts}")
        norm = module.post_expert_norm if module.has_post_expert_norm else None
        activate = module._apply_gate if module.has_gate else module.act_fn
        plain = not (module.is_transposed or module.has_bias or norm) and module.is_concatenated
        return cls(
            names=names,
            transposed=module.is_transposed,
            has_bias=module.has_bias,
            activate=activate,
            gate=find_clamped_gate(module),
            norm=norm,
            is_swiglu=bool(plain and module.has_gate and has_default_gate(module) and _is_silu(module.act_fn)),
        )


def is_experts(module: nn.Module) -> bool:
    """Whether the class carries `@use_experts_implementation`."""
    return hasattr(module, "_is_expert_parallel") and hasattr(module, "is_transposed")


def has_default_gate(module: Any) -> bool:
    """Whether its gate is that of transformers, act_fn(gate) * up, and not the family's own."""
    from transformers.integrations.moe import _default_apply_gate

    return type(module)._apply_gate is _default_apply_gate


def _is_silu(activation: Any) -> bool:
    from transformers.activations import SiLUActivation

    return activation is F.silu or isinstance(activation, nn.SiLU | SiLUActivation)
