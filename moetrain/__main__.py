"""`python -m moetrain`, and the command `moetrain`."""

import os
import sys

if sys.path[0] in ("", os.getcwd()):  # of `-m`: a queue.py in the user's folder is not the library's
    del sys.path[0]

import atexit
import io
import threading
from contextlib import suppress

from moetrain.cli.parser import main


def run() -> None:
    """Ends the process as Python does, but for the taking down of every module: once torch is loaded, over a second."""
    for stream in (sys.stdout, sys.stderr):  # no character ends a run because a terminal cannot show it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = main()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(BrokenPipeError):  # whoever reads the output has seen enough
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
