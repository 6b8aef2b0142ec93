"""Steps whose loss or gradient norm is not finite: left out, counted, and after so many in a row the run goes back.

Nothing is saved between the first of them and the next good step, so that what a run goes back to is older than the
trouble. It goes back once: where the same comes again before the run has got beyond it, it stops.
"""

import math
from contextlib import suppress
from pathlib import Path

from moetrain.common import disk
from moetrain.distributed.comm import broadcast_text
from moetrain.distributed.mesh import Mesh
from moetrain.launch.exits import GAVE_UP, Diverged


class Guard:
    """All ranks make one and tell it every step; the norm is the same on all of them."""

    def __init__(self, folder: Path, mesh: Mesh, skips: int, saved: bool) -> None:
        """`saved`: whether there is something to go back to."""
        self._file, self._mesh, self._skips, self.saved = folder / "went_back", mesh, skips, saved
        step = disk.read_json(self._file) if mesh.is_main else None
        self._went_back_from = int(broadcast_text(str(step) if type(step) is int else "0", mesh.device))
        self.in_a_row = 0
        self.skipped = 0  # by this process

    def judge(self, step: int, norm: float) -> str | None:
        """Count the step and return what to say of it, if anything. Raises `Diverged` on all ranks after too many in a
        row."""
        if math.isfinite(norm):
            self.in_a_row = 0
            if self._went_back_from and step > self._went_back_from:
                self._went_back_from = 0
                if self._mesh.is_main:
                    with suppress(OSError):  # a read-only disk does not stop a run
                        self._file.unlink(missing_ok=True)
            return None
        self.in_a_row += 1
        self.skipped += 1
        if self.in_a_row < self._skips:
            return f"step {step} is skipped: its loss or gradient norm is not finite ({self.in_a_row} in a row)"
        said = f"step {step}: the loss or the gradient norm was not finite {self.in_a_row} times in a row"
        if not self.saved or self._went_back_from:
            again = ", again after the run went back" if self._went_back_from else ", and nothing was saved before"
            advice = "they changed no weight; a lower optim.lr or other data may help"
            raise Diverged(f"{said}{again}; {advice}", GAVE_UP)
        if self._mesh.is_main:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            disk.write(self._file, str(step))
        raise Diverged(f"{said}; when it is started again, the run goes back to its last checkpoint")
