"""Checkpoints: safetensors and JSON only, so that loading one can run no code.

`checkpoints/step_N/` holds a safetensors file of every rank that saved it, `entries.json` (where each entry lies), the
planner's `costs.json`, and `manifest.json`. The folder appears whole or not at all.
What needs torch is imported when it is asked for: a launcher only looks at the JSON.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moetrain.checkpoint.manifest import newest, progress
from moetrain.checkpoint.remote import check_stores
from moetrain.checkpoint.resume import check_data, check_fits, continues_own, find_named, find_to_resume, known_dtype

if TYPE_CHECKING:
    from moetrain.checkpoint.agreeing import StartingPoint, agree_on_start, check_start, first_whole
    from moetrain.checkpoint.loading import load
    from moetrain.checkpoint.saving import Saver

__all__ = [
    "Saver",
    "StartingPoint",
    "agree_on_start",
    "check_data",
    "check_fits",
    "check_start",
    "check_stores",
    "continues_own",
    "find_named",
    "find_to_resume",
    "first_whole",
    "known_dtype",
    "load",
    "newest",
    "progress",
]
_PLACES = {
    "Saver": "saving",
    "load": "loading",
    "StartingPoint": "agreeing",
    "agree_on_start": "agreeing",
    "check_start": "agreeing",
    "first_whole": "agreeing",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
