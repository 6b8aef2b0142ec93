"""The same page for a run in progress, on this machine's loopback alone, up to date whenever the browser asks."""

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from moetrain.config import ConfigError
from moetrain.report import build
from moetrain.report.read import RunData

HOST = "127.0.0.1"


class LiveSource:
    """The runs' data as JSON, read again only when a file of theirs has changed."""

    def __init__(self, runs: Sequence[RunData]) -> None:
        self._runs = runs
        self._lock = threading.Lock()
        self._seen: object = None
        self._found: dict = {}

    def data(self) -> dict:
        with self._lock:
            if (now := self._state()) != self._seen:
                for run in self._runs:
                    run.refresh()
                self._found, self._seen = build.data(self._runs, live=True), now
            return self._found

    def _state(self) -> object:
        """Size and time of every file that a report reads."""
        patterns = ("*.json*", "config.yaml", "load_trace/part_*.npz", "specialisation/*.json")
        paths = [path for run in self._runs for pattern in patterns for path in sorted(run.folder.glob(pattern))]
        return [(path, (facts := path.stat()).st_size, facts.st_mtime_ns) for path in paths]


def server(runs: Sequence[RunData], port: int) -> ThreadingHTTPServer:
    """Return a server that answers `/` with the page and `/data.json` with its data; `port` 0 takes a free one. Raises
    `ConfigError`."""
    source = LiveSource(runs)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            if name not in (HOST, "localhost"):  # a page elsewhere that had its own name point here
                self.send_error(403)
            elif self.path == "/":
                self._answer("text/html; charset=utf-8", build.html)
            elif self.path == "/data.json":
                self._answer("application/json", build.as_json)
            else:
                self.send_error(404)

        def _answer(self, kind: str, form: Callable[[dict], str]) -> None:
            try:
                body = form(source.data()).encode()
            except Exception as error:  # whatever a run's folder holds, the next answer may be right again
                self.send_error(500, f"the run cannot be read: {type(error).__name__}")
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            with suppress(ConnectionError):  # the browser has gone
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port={port}: must be a free port ({error})") from None
