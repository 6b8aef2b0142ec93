"""The estimate of memory: what it says of the head is what forward and backward of the cross entropy hold."""

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain import config
from moetrain.models import cross_entropy
from moetrain.models.cross_entropy import linear_cross_entropy, peak_bytes
from moetrain.moe.kernels.api import DEFAULT_KERNELS
from moetrain.observe import estimate


class Allocations(TorchDispatchMode):
    """Adds up the memory of all tensors that operations return, as long as they live; `peak` is the most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._users: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                self._now += 0 if self._users.get(place) else size
                self._users[place] = self._users.get(place, 0) + 1
                self.peak = max(self.peak, self._now)
                weakref.finalize(tensor, self._free, place, size)
        return out

    def _free(self, place: int, size: int) -> None:
        self._users[place] -= 1
        self._now -= 0 if self._users[place] else size


@pytest.mark.parametrize(("tokens", "kept"), [(1024, True), (4096, False)])
def test_the_head_holds_what_is_said(tokens: int, kept: bool) -> None:
    """All logits where they are few, else those of a chunk; never the 4 to 12 bytes of every logit."""
    dim, vocabulary = 64, 8192
    assert (tokens * vocabulary * 4 <= cross_entropy.KEPT_BYTES) == kept
    x_TD, weight_VD = torch.randn(tokens, dim), torch.randn(vocabulary, dim)
    target = torch.randint(0, vocabulary, (tokens,))
    for tensor in (x_TD, weight_VD):
        tensor.requires_grad_()
    with Allocations() as found:
        linear_cross_entropy(x_TD, weight_VD, target).sum().backward()
    is_fused = DEFAULT_KERNELS.choose(x_TD.device, x_TD.dtype).has_fused_cross_entropy
    said = peak_bytes(tokens, dim, vocabulary, 4, is_fused, 0)
    assert 0.7 * said < found.peak < 1.15 * said
    assert kept or said < tokens * vocabulary * 4


def test_a_gpu_holds_its_logits_once_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """OLMoE at 16 sequences of 4,096 tokens on 80 GiB: 2.5 GiB of logits, not 10 bytes for each of 3.3 billion."""
    settings = config.load(["model=olmoe_1b7b", "train.dtype=bf16", "train.seq_len=4096", "train.micro_batch=16"])
    monkeypatch.setattr(estimate, "memory_of", lambda device: 80 << 30)
    tokens, vocabulary = 16 * 4096, settings.model.vocab_size or 0
    found = estimate._head_bytes(settings, tokens)
    is_fused = DEFAULT_KERNELS.choose(torch.device("cpu"), torch.bfloat16).has_fused_cross_entropy
    logits = min(80 << 30 >> 5, tokens * vocabulary * (2 if is_fused else cross_entropy.WIDE_BYTES))
    weight = 4 * vocabulary * settings.model.dim
    assert found == pytest.approx(logits + weight + tokens * (8 + 2 * settings.model.dim), rel=0.05)
    assert found < 0.2 * 10 * tokens * vocabulary
