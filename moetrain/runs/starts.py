"""`starts.jsonl` of a run: every time it was started, from which step, by which command, on what, for how long."""

import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moetrain import __version__
from moetrain.common import disk, versions
from moetrain.common.redact import redacted_text
from moetrain.distributed.mesh import Mesh

NAME = "starts.jsonl"


class Start:
    """This start of the run in `folder`; rank 0 of `mesh` writes it. A failing disk is no reason to end a run."""

    def __init__(self, folder: Path, step: int, mesh: Mesh) -> None:
        self._folder, self._began = folder, time.monotonic()
        self._earlier = disk.rows(folder / NAME)
        self._own: dict[str, Any] = {"step": step, "time": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}"}
        self._own |= {"command": command(sys.argv[1:]), "hardware": _hardware(mesh), "versions": _versions()}
        self._write()

    def end(self) -> None:
        """Note how long it took until now."""
        self._own["seconds"] = round(time.monotonic() - self._began, 3)
        self._write()

    def _write(self) -> None:
        with suppress(OSError):
            text = "".join(json.dumps(row) + "\n" for row in [*self._earlier, self._own])
            disk.write(self._folder / NAME, text)


def command(arguments: Sequence[str]) -> str:
    """Return the command as one would type it; what stands behind a name that may be a secret's is left out."""
    shown = [redacted_text(argument) for argument in arguments]
    return shlex.join(["moetrain", *shown])


def _hardware(mesh: Mesh) -> str:
    ranks = f"{mesh.world} rank{'s' * (mesh.world > 1)}"
    if mesh.device.type == "cuda":
        return f"{ranks}, {torch.cuda.get_device_name(mesh.device)}"
    cores = versions.count_cores()
    return f"{ranks}, {_processor()}, {cores} cores"


def _processor() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.machine()


def _versions() -> str:
    known = {"moetrain": __version__, "Python": platform.python_version(), "torch": torch.__version__}
    known |= {name: metadata.version(name) for name in ("numpy", "numba")}
    known |= {"CUDA": torch.version.cuda} if torch.version.cuda else {}
    return ", ".join(f"{name} {version}" for name, version in known.items())
