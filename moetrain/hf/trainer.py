"""A callback that lets the `Trainer` of transformers train a model whose experts are spread over ranks."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from moetrain.common.errors import ConfigError
from moetrain.hf.parallel import HFExpertParallel


class ExpertParallelCallback(TrainerCallback):
    """Steps, clipping and saving for a `Trainer`; `Trainer(..., callbacks=[ExpertParallelCallback(handle)])`.

    DDP leaves experts alone by itself. The Trainer would clip by another norm on every rank, since each has other
    experts: the callback takes `max_grad_norm` over, with the norm of all parameters, each counted once. A checkpoint's
    model has all experts. Its optimizer has those of rank 0 alone, so going on from it is refused.
    """

    def __init__(self, handle: HFExpertParallel) -> None:
        """`handle`: what `moetrain.hf.expert_parallel` returned for the Trainer's model."""
        self._handle = handle
        self._max_norm: float | None = None
        self.norms: list[float] = []  # of every step, before it was clipped

    def on_init_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Take the Trainer's clipping over."""
        self._max_norm, args.max_grad_norm = args.max_grad_norm or None, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Raise `ConfigError` where training goes on from a checkpoint."""
        if state.global_step:
            raise ConfigError(
                "resume_from_checkpoint: a Trainer's checkpoint has the optimizer's state of rank 0's experts alone; "
                "start from its model instead"
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Begin an optimizer step. Every backward ends its loans: an epoch's last step may have fewer of them."""
        self._handle.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Sum the experts' gradients over replicas, and clip."""
        self._handle.end_step()
        self.norms.append(self._handle.clip_grad_norm_(self._max_norm or float("inf")))

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Write the model again, with the experts of all ranks."""
        self._handle.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")
