"""A window of `torch.profiler` on request: what rank 0 does in a few steps, operation by operation."""

from pathlib import Path
from typing import Any

import torch

from moetrain.config import Track


class Profiler:
    """`track.profile_steps` steps from `track.profile_from` on, as a Chrome trace in the run's `profile/`."""

    def __init__(self, folder: Path | None, options: Track) -> None:
        """No `folder`: records nothing."""
        self._folder = folder
        self._first = options.profile_from if folder is not None else None
        self._steps = options.profile_steps
        self._profile: Any = None
        self._last = 0

    def before(self, step: int) -> None:
        if step == self._first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities)
            self._profile.start()

    def after(self, step: int) -> None:
        self._last = step
        if self._first is not None and step == self._first + self._steps - 1:
            self.close()

    def close(self) -> None:
        """Write what there is."""
        if self._profile is None or self._folder is None:
            return
        profile, self._profile = self._profile, None
        profile.stop()
        self._folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(self._folder / f"rank_0_steps_{self._first}_{self._last}.json.gz"))
