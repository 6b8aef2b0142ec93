"""Where what outlives a process is kept for the next one: compiled kernels, measured costs.

The first place that can be written: `$XDG_CACHE_HOME/moetrain` or `~/.cache/moetrain`, else `moetrain-UID` in the
folder for temporary files. There another user could have put something in our place, and compiled kernels are run: that
folder counts only if it is ours, no link, and closed to all others.
"""

import os
import tempfile
from pathlib import Path

from moetrain.common import disk


def folder(name: str) -> Path | None:
    """A folder that can be written, made if need be; None where there is none, and nothing can be kept."""
    for base in (_of_home, _temporary):
        try:
            place = base() / name
            place.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # `Path.home` raises the latter for a user that has no home
            continue
        if os.access(place, os.W_OK | os.X_OK):
            return place
    return None


def _of_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moetrain"


def _temporary() -> Path:
    place = Path(tempfile.gettempdir()) / f"moetrain-{os.getuid()}"
    disk.make_private(place)
    return place
