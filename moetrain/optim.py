"""The learning rate of a step. Warm-up is linear from zero."""

import math

from moetrain.config import Optim


def learning_rate(optim: Optim, step: int, steps: int) -> float:
    """Of `step` (0-based) of `steps`: cosine to min_lr, or WSD: stable, then linear to min_lr at the end."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    if optim.schedule == "cosine":
        done = (step - optim.warmup) / max(1, steps - optim.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        share = min(1.0, (steps - step) / max(1.0, optim.decay_fraction * steps))
    return optim.min_lr + (optim.lr - optim.min_lr) * share
