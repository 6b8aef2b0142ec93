"""Checkpoints: safetensors and JSON only, so that loading one can run no code.

`checkpoints/step_N/` holds a safetensors file of every rank that saved it, `entries.json` (where each entry lies), the
planner's `costs.json`, and `manifest.json`. The folder appears whole or not at all.
What needs torch is imported when it is asked for: a launcher only looks at the JSON.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moetrain.checkpoint.manifest import newest, progress
from moetrain.checkpoint.remote import check_stores
from moetrain.checkpoint.resume import (
    check_data,
    check_fits,
    continues_own,
    find_initial,
    find_named,
    find_to_resume,
    known_dtype,
)

if TYPE_CHECKING:
    from moetrain.checkpoint.agreeing import (
        StartingPoint,
        agree_on_start,
        agree_on_weights,
        check_start,
        check_weights,
        first_whole,
    )
    from moetrain.checkpoint.loading import load, load_base, load_weights
    from moetrain.checkpoint.saving import Saver

__all__ = [
    "Saver",
    "StartingPoint",
    "agree_on_start",
    "agree_on_weights",
    "check_data",
    "check_fits",
    "check_start",
    "check_stores",
    "check_weights",
    "continues_own",
    "find_initial",
    "find_named",
    "find_to_resume",
    "first_whole",
    "known_dtype",
    "load",
    "load_base",
    "load_weights",
    "newest",
    "progress",
]
_PLACES = {
    "Saver": "saving",
    "load": "loading",
    "load_base": "loading",
    "load_weights": "loading",
    "StartingPoint": "agreeing",
    "agree_on_start": "agreeing",
    "agree_on_weights": "agreeing",
    "check_start": "agreeing",
    "check_weights": "agreeing",
    "first_whole": "agreeing",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
