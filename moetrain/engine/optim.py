"""AdamW whose moments may be bf16 or lie in memory-mapped files; the learning rate of a step."""

import inspect
import math
import os
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from moetrain.config import Optim
from moetrain.engine.entries import MOMENTS


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Of `step` (0-based) of `steps`: cosine to min_lr, or WSD: stable, then linear to min_lr at the end.

    Warm-up is linear from zero.
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "cosine":
        done = (step - optim.warmup) / max(1, steps - optim.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        share = min(1.0, (steps - step) / max(1.0, optim.decay_fraction * steps))
    return optim.min_lr + (optim.lr - optim.min_lr) * share


_step_without_hooks = inspect.unwrap(torch.optim.AdamW.step)  # torch wraps it when a plain AdamW is first made: our
# own `step` has called the user's hooks by then


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW; its moments in `dtype`, in memory or in files of `folder`.

    bf16 moments are rounded at random in proportion to the distance, so that they are right on average: rounded to
    nearest, a second moment would not take in what is less than 1/512 of it, which with β2 = 0.999 is nearly all. The
    random numbers depend on the step and the parameter alone: replicas stay equal, and a resumed run repeats itself.
    """

    names = MOMENTS  # of the state tensors of a parameter's shape

    def __init__(self, groups: Iterable[dict[str, Any]], options: Optim, folder: Path | None = None) -> None:
        super().__init__(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
        self._dtype = torch.bfloat16 if options.state_dtype == "bf16" else torch.float32
        self._folder = folder
        self._steps: dict[Tensor, int] = {}  # of each parameter, as in its state: to ask a GPU for it takes a while

    def state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """`step`, `exp_avg` and `exp_avg_sq`, the moments in the parameter's shape and placement; made at need."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {moment: self._zeros_like(parameter) for moment in MOMENTS}
        return state

    def _zeros_like(self, parameter: Tensor) -> Tensor:
        out = torch.zeros_like(parameter, dtype=self._dtype)
        if self._folder is None or local(out).device.type != "cpu":
            return out
        held = mapped(self._folder, local(out).shape, self._dtype)
        if not isinstance(out, DTensor):
            return held
        out._local_tensor = held  # `DTensor.from_local` would move it to where its mesh computes
        return out

    def restored(self, step: int) -> None:
        """The states hold those of a checkpoint of `step` steps now."""
        for parameter, state in self.state.items():
            state["step"].fill_(step)
            self._steps[parameter] = step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state_of(parameter)
        if self._dtype == torch.float32:
            _step_without_hooks(self)
            return
        for group in self.param_groups:
            kind = zlib.crc32(f"{group.get('kind')} {group['weight_decay']}".encode())  # ranks may lack whole groups
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    done = self._steps.get(parameter, 0)
                    self._step_narrow(group, parameter, done * 0x9E3779B1 + kind + 2 * number)
                    self._steps[parameter] = done + 1

    def _step_narrow(self, group: dict[str, Any], parameter: Tensor, seed: int) -> None:
        """The update in fp32, from moments that are widened for it and then narrowed."""
        state = self.state[parameter]
        moments = [local(state[moment]) for moment in MOMENTS]
        wide = [moment.float() for moment in moments]
        adamw(
            [local(parameter)],
            [local(parameter.grad)],  # type: ignore[arg-type]
            [wide[0]],
            [wide[1]],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for second, (moment, value) in enumerate(zip(moments, wide, strict=True)):
            moment.copy_(rounded_at_random(value, (seed + second) % (1 << 32)))


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mapped(folder: Path, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU in a file of `folder` that loses its name: it goes with the process, however that ends.

    Raises `OSError` where there is no room for it.
    """
    if not shape.numel():
        return torch.zeros(shape, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".moments-") as file:
        _allocate(file.fileno(), shape.numel() * dtype.itemsize)
        return torch.from_file(file.name, shared=True, size=shape.numel(), dtype=dtype).view(shape)


def _allocate(handle: int, size: int) -> None:
    """Fill an empty file: a full disk is to be noticed now, not when memory over a hole in it is written to."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    for begin in range(0, size, 1 << 24):  # macOS
        os.write(handle, bytes(min(1 << 24, size - begin)))


def rounded_at_random(value: Tensor, seed: int) -> Tensor:
    """bf16 of the fp32 `value`: one of its two neighbours, the nearer the likelier; the mean is `value`.

    Overwrites `value`. `seed` below 2**32. Random numbers are added to the 16 bits that are cut off.
    """
    generator = torch.Generator(value.device).manual_seed(seed)
    bits = value.view(torch.int32)
    bits += torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
    bits &= -(1 << 16)
    return value.to(torch.bfloat16)
