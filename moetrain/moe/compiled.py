"""numba, with a cache that belongs to this very source.

numba notices when the file of a compiled function changes, not when a function that it calls does, in another file.
So the cache of a changed package is another folder. What cannot be read from it or written to it is compiled again, and
where no folder can be written there is no cache. Of several processes that need the same function one compiles it.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

from moetrain.common import cache

_SOURCES = sorted(Path(__file__).parent.rglob("*.py"))
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]


def _folder() -> Path | None:
    """numba's own variable goes before, if that folder can be written."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    try:
        if named:
            Path(named).mkdir(parents=True, exist_ok=True)
    except OSError:
        named = None
    return Path(named) if named and os.access(named, os.W_OK) else cache.folder(f"numba/{DIGEST}")


LONGEST_SECONDS = 60.0  # that another process is waited for
LOOK_SECONDS = 0.02
FOLDER = _folder()
if FOLDER is not None:
    vars(numba.config)["CACHE_DIR"] = str(FOLDER)


def is_cached() -> bool:
    """Tell whether an earlier process has compiled kernels of this source here."""
    return FOLDER is not None and next(FOLDER.rglob("*.nbi"), None) is not None


class _Cache(FunctionCache):
    """numba's, for which a damaged file is a missing one, and a full disk no reason to stop.

    numba compiles between a `load_overload` that finds nothing and a `save_overload`: meanwhile the function is locked.
    """

    _lock: int | None = None  # an open file

    def load_overload(self, signature: Any, target: Any) -> Any:
        found = self._load(signature, target)
        if found is None and self._lock is None and self._acquire():
            found = self._load(signature, target)  # another process has compiled it since
            if found is not None:
                self._release()
        return found

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError:
            self.disable()
        finally:
            self._release()

    def _load(self, signature: Any, target: Any) -> Any:
        try:
            return super().load_overload(signature, target)
        except Exception:  # whatever reading torn files raises
            Path(self._cache_file._index_path).unlink(missing_ok=True)
            return None

    def _acquire(self) -> bool:
        """Lock; returns False where files cannot be locked, or another process has held the lock for too long."""
        until = time.monotonic() + LONGEST_SECONDS
        try:
            self._impl.locator.ensure_cache_path()
            self._lock = os.open(f"{self._cache_file._index_path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            while time.monotonic() < until:
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except BlockingIOError:
                    time.sleep(LOOK_SECONDS)
        except OSError:
            pass
        self._release()
        return False

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile as `numba.njit` does, with the cache of this source."""

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(**options)(function)
        if FOLDER is not None:
            dispatcher._cache = _Cache(function)
        return dispatcher

    return compiled
