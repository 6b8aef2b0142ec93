"""Activation recompute replays the choices and the plans of the first forward pass.

A checkpointed region is a `Region`: its first pass records the choices that routers make and what is decided for each
experts module; its recompute takes them again. `checkpoint_with_replay` is what transformers is given as its
checkpoint function.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from moetrain.hf.pinning import PinnedChoices

_here = threading.local()  # a backward on a GPU has a thread of its own


class Region:
    """The choices and decisions of one checkpointed region."""

    def __init__(self) -> None:
        self._pins = PinnedChoices()
        self._decisions: list[Any] = []
        self._again: Iterator[Any] | None = None

    @contextmanager
    def record(self) -> Iterator[None]:
        with _entered(self), self._pins.record():
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        self._again = iter(self._decisions)
        try:
            with _entered(self), self._pins.replay():
                yield
        finally:
            self._again = None

    def decide(self, make: Callable[[], Any]) -> Any:
        """What `make()` returns, kept; in the recompute what it returned."""
        if self._again is not None:
            return next(self._again)
        self._decisions.append(make())
        return self._decisions[-1]


def decide_once(make: Callable[[], Any]) -> Any:
    """`make()`, unless the region that is recomputed here has made it before."""
    region: Region | None = getattr(_here, "region", None)
    return make() if region is None else region.decide(make)


@contextmanager
def _entered(region: Region) -> Iterator[None]:
    before = getattr(_here, "region", None)
    _here.region = region
    try:
        yield
    finally:
        _here.region = before


class _Reusable:
    """A context manager that can be entered again: a region may be recomputed more than once."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._entered: list[Any] = []

    def __enter__(self) -> None:
        self._entered.append(self._make())
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._entered.pop().__exit__(*error)


def _contexts() -> tuple[Any, Any]:
    region = Region()
    return _Reusable(region.record), _Reusable(region.replay)


def checkpoint_with_replay(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`torch.utils.checkpoint.checkpoint`, not reentrant, whose recompute replays choices and plans."""
    return checkpoint(function, *args, use_reentrant=False, context_fn=_contexts, **options)


def replay_in_recompute(model: Any) -> None:
    """Have `model.gradient_checkpointing_enable` use `checkpoint_with_replay`, whether it was called or will be."""
    inner = model._set_gradient_checkpointing

    def enable(enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **options: Any) -> Any:
        keywords = dict(getattr(gradient_checkpointing_func, "keywords", {}))
        keywords.pop("use_reentrant", None)
        return inner(enable=enable, gradient_checkpointing_func=partial(checkpoint_with_replay, **keywords), **options)

    model._set_gradient_checkpointing = enable
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            module._gradient_checkpointing_func = checkpoint_with_replay
