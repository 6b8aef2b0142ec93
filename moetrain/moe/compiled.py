"""numba, with a cache that belongs to this very source.

numba notices when the file of a compiled function changes, not when a function that it calls does, in another file.
So the cache of a changed package is another folder.
"""

import hashlib
import os
from functools import partial
from pathlib import Path

import numba

_SOURCES = sorted(Path(__file__).parent.rglob("*.py"))
DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:16]
_HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")

if not os.environ.get("NUMBA_CACHE_DIR"):  # numba's own variable goes before
    vars(numba.config)["CACHE_DIR"] = str(_HOME / "moetrain" / "numba" / DIGEST)

njit = partial(numba.njit, cache=True)
