"""The kernels of clamped gates: what the family's own code computes, and its gradient."""

from typing import Any

import pytest
import torch

from moetrain.hf import gate
from moetrain.hf.layout import ExpertsLayout, is_experts
from tests.hf.families import build


def layout_of(name: str) -> ExpertsLayout:
    return next(ExpertsLayout.read(key, module) for key, module in build(name).named_modules() if is_experts(module))


@pytest.mark.parametrize("name", gate.CLAMPED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_gradient_equal_the_family_s(name: str, dtype: torch.dtype) -> None:
    """Beyond the limits too, and at them; in bf16 within a rounding of the family's code in fp32."""
    layout: Any = layout_of(name)
    generator = torch.Generator().manual_seed(0)
    first = (torch.randn(37, 64, generator=generator) * layout.gate.limit).to(dtype)
    first[0, :4] = torch.tensor([1.0, 1.0, -1.0, -1.0]) * layout.gate.limit
    grad = torch.randn(37, 32, generator=generator).to(dtype)
    exact = first.float().requires_grad_()
    expected = layout.activate(exact)
    expected.backward(grad.float())
    assert (first.abs() > layout.gate.limit).any()
    hidden, backward = gate.run_gate_for_backward(layout.gate, layout.activate, first)
    assert torch.equal(hidden, gate.run_gate(layout.gate, layout.activate, first))
    close = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(hidden.float(), expected.detach(), **close)
    torch.testing.assert_close(backward(grad).float(), exact.grad, **close)


def test_other_gates_are_the_family_s_own() -> None:
    for name in ("qwen3_moe", "nemotron_h", "aria", "deepseek_v4"):
        assert layout_of(name).gate is None
