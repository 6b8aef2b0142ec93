"""Checkpoints: safetensors and JSON only, so that loading one can run no code.

`checkpoints/step_N/` holds a safetensors file of every rank that saved it, `entries.json` (where each entry lies), the
planner's `costs.json`, and `manifest.json`. The folder appears whole or not at all.
"""

from moetrain.checkpoint.loading import load
from moetrain.checkpoint.manifest import newest, progress
from moetrain.checkpoint.resume import (
    Start,
    agree,
    check_data,
    check_fits,
    dtype_of,
    first_whole,
    given,
    goes_on,
    to_resume,
)
from moetrain.checkpoint.saving import Saver

__all__ = [
    "Saver",
    "Start",
    "agree",
    "check_data",
    "check_fits",
    "dtype_of",
    "first_whole",
    "given",
    "goes_on",
    "load",
    "newest",
    "progress",
    "to_resume",
]
