"""The `Trainer` of transformers, and those that are made from it, for a model whose experts are spread over ranks.

    class SpreadTrainer(ExpertParallelMixin, Trainer):  # or TRL's SFTTrainer
        pass

    trainer = SpreadTrainer(model=model, args=arguments, train_dataset=data, handle=handle)
    trainer.train(resume_from_checkpoint=True)

The mixin saves all experts and their optimizer states, and goes on from them, on any number of ranks. A Trainer that
is not a subclass takes `callbacks=[ExpertParallelCallback(handle)]`, and does not go on from its checkpoints.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from moetrain.common.errors import ConfigError
from moetrain.hf.parallel import HFExpertParallel

OPTIMIZER, SCHEDULER = "optimizer.pt", "scheduler.pt"  # as a Trainer calls them


class StepCallback(TrainerCallback):
    """Steps and clipping for a `Trainer`.

    DDP leaves experts alone by itself. The Trainer would clip by another norm on every rank, since each has other
    experts: the callback takes `max_grad_norm` over, with the norm of all parameters, each counted once.
    """

    def __init__(self, handle: HFExpertParallel) -> None:
        """`handle`: what `moetrain.hf.expert_parallel` returned for the Trainer's model."""
        self._handle = handle
        self._max_norm: float | None = None
        self.norms: list[float] = []  # of every step, before it was clipped

    def on_init_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Take the Trainer's clipping over. Raises `ConfigError` for what shards the experts once more."""
        for name in ("fsdp", "deepspeed"):
            if getattr(args, name, None):
                raise ConfigError(
                    f"{name}={getattr(args, name)}: would shard experts that are spread over ranks already"
                )
        self._max_norm, args.max_grad_norm = args.max_grad_norm or None, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Begin an optimizer step. Every backward ends its loans: an epoch's last step may have fewer of them."""
        self._handle.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Sum the experts' gradients over replicas, and clip."""
        self._handle.end_step()
        self.norms.append(self._handle.clip_grad_norm_(self._max_norm or float("inf")))


class ExpertParallelCallback(StepCallback):
    """Steps, clipping and saving for a `Trainer`; `Trainer(..., callbacks=[ExpertParallelCallback(handle)])`.

    A checkpoint's model has all experts. Its optimizer has those of rank 0 alone, so going on from it is refused.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Raise `ConfigError` where training goes on from a checkpoint, or is to end with an earlier one."""
        if state.global_step:
            raise ConfigError(
                "resume_from_checkpoint: a checkpoint by ExpertParallelCallback has the optimizer's state of rank 0's "
                "experts alone; those of a Trainer with ExpertParallelMixin have all"
            )
        if args.load_best_model_at_end:
            raise ConfigError("load_best_model_at_end: needs a Trainer with ExpertParallelMixin")

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Write the model again, with the experts of all ranks."""
        self._handle.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class ExpertParallelMixin:
    """What a subclass of `Trainer` needs to train, save and resume a model whose experts are spread."""

    def __init__(self, *args: Any, handle: HFExpertParallel, callbacks: Any = None, **options: Any) -> None:
        """`handle`: what `moetrain.hf.expert_parallel` returned for the model; the rest is the Trainer's."""
        self._handle, self._steps = handle, StepCallback(handle)
        begin: Any = super().__init__
        begin(*args, callbacks=[*(callbacks or ()), self._steps], **options)

    @property
    def norms(self) -> list[float]:
        """The gradient norms of all steps, before they were clipped."""
        return self._steps.norms

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Log the gradient norm beside the loss, as a Trainer that clips does."""
        if "loss" in logs and self.norms:
            logs.setdefault("grad_norm", self.norms[-1])
        super().log(logs, *args, **options)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save the model with the experts of all ranks, each of which comes by here."""
        whole = self._handle.full_state_dict() if state_dict is None else state_dict
        super()._save(output_dir, state_dict=whole)  # type: ignore[misc]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the states of all experts, in place of those of rank 0's."""
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        state, trainer = self._handle.full_optimizer_state(self._find_optimizer()), self._trainer
        if trainer.args.should_save:
            path = Path(output_dir) / OPTIMIZER
            aside = path.with_suffix(".tmp")
            torch.save(state, aside)
            os.replace(aside, path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._handle.load_pretrained(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._handle.load_pretrained(self._trainer.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load what was saved, as far as a rank needs it. Raises `ConfigError` where a file is missing."""
        if checkpoint is None:
            return
        for name in (OPTIMIZER, SCHEDULER):
            if not (Path(checkpoint) / name).is_file():
                raise ConfigError(f"resume_from_checkpoint={checkpoint}: has no {name}")
        state = torch.load(Path(checkpoint) / OPTIMIZER, map_location="cpu", mmap=True, weights_only=True)
        self._handle.load_full_optimizer_state(self._find_optimizer(), state)
        self._trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    @property
    def _trainer(self) -> Any:
        return self

    def _find_optimizer(self) -> Any:
        """The optimizer itself, in accelerate's wrapping or not."""
        optimizer = self._trainer.optimizer
        return getattr(optimizer, "optimizer", optimizer)
