"""Checkpoints of a run in a store: `URL/RUN/step_N/`, with the files of the local folder, `manifest.json` last.

A checkpoint counts there once its manifest does, so one that is half uploaded, half removed or half overwritten never
does. Rank 0 uploads, behind the training loop; what goes wrong is tried again, counted and said, and ends nothing.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from moetrain.checkpoint import manifest
from moetrain.common.errors import ConfigError
from moetrain.common.store import Store, StoreError, is_url, open_store
from moetrain.config import Config

PAUSES = (1.0, 4.0, 16.0)  # seconds before a call of the store is tried again
AT_ONCE = 4  # files
T = TypeVar("T")


def open_remote(config: Config) -> "RemoteCheckpoints | None":
    """Return where the run's checkpoints go besides its folder, if anywhere. Raises `ConfigError`."""
    url = config.checkpoint.remote
    if url is None:
        return None
    store = open_store(url, "checkpoint.remote")
    return RemoteCheckpoints(store if config.run.name is None else store.folder(config.run.name))


def check_stores(config: Config) -> None:
    """Check the URLs in `checkpoint`. Raises `ConfigError` for one that cannot be a URL. No store is asked for
    anything."""
    open_remote(config)
    if is_url(config.checkpoint.resume):
        open_store(config.checkpoint.resume, "checkpoint.resume")


class RemoteCheckpoints:
    """The checkpoints of one run in a store. Every method raises `StoreError` where the store fails for good."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def url(self) -> str:
        return self.store.url

    def list_steps(self) -> list[int]:
        """Return the steps of the checkpoints that are whole, newest first."""
        found = [int(name[5:]) for name in retry(self.store.list_names) if manifest.STEP.fullmatch(name)]
        return [step for step in sorted(found, reverse=True) if self._has_manifest(step)]

    def upload(self, folder: Path) -> None:
        """Write a local checkpoint there, unless it is there already."""
        there, local = self.store.folder(folder.name), folder / manifest.MANIFEST
        if self._has_manifest(manifest.step_of(folder)):
            aside = folder.with_name(f".{folder.name}.remote")
            retry(partial(there.download, manifest.MANIFEST, aside))
            is_same = aside.read_bytes() == local.read_bytes()
            aside.unlink()
            if is_same:
                return
            retry(partial(there.remove, manifest.MANIFEST))
        names = manifest.read(folder)["files"]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in [pool.submit(retry, partial(there.upload, folder / name, name)) for name in names]:
                done.result()
        retry(partial(there.upload, local, manifest.MANIFEST))

    def prune(self, step: int, keep: int, keep_every: int) -> None:
        """Remove what is older than the `keep` newest up to `step`, but for multiples of `keep_every` steps, and what
        was left unfinished before it."""
        whole = [other for other in self.list_steps() if other <= step]
        kept = {other for place, other in enumerate(whole) if place < keep or (keep_every and other % keep_every == 0)}
        for name in retry(self.store.list_names):
            if manifest.STEP.fullmatch(name) and int(name[5:]) < step and int(name[5:]) not in kept:
                retry(partial(self.store.folder(name).remove, manifest.MANIFEST))
                retry(partial(self.store.remove, name))

    def download_manifest(self, step: int, place: Path) -> None:
        """Write the manifest of a checkpoint into a local folder."""
        there = self.store.folder(f"step_{step}")
        retry(partial(there.download, manifest.MANIFEST, place / manifest.MANIFEST))

    def download(self, step: int, name: str, place: Path) -> None:
        """Write a file of a checkpoint into a local folder that has its manifest, and compare every byte with it."""
        retry(partial(self.store.folder(f"step_{step}").download, name, place / name))
        if said := manifest.damaged(place, [name]):
            raise StoreError(said[0])

    def _has_manifest(self, step: int) -> bool:
        return retry(partial(self.store.folder(f"step_{step}").size, manifest.MANIFEST)) is not None


def retry(work: Callable[[], T]) -> T:
    """Return what `work` does, at the latest at the last of several tries. Raises the last `StoreError`."""
    for pause in PAUSES:
        try:
            return work()
        except StoreError:
            time.sleep(pause)
    return work()


class Uploader:
    """Uploads finished checkpoints in a thread of its own, one after the other. Rank 0 has one.

    At most `checkpoint.keep` wait: of more the oldest are left out, and said.
    """

    def __init__(self, remote: RemoteCheckpoints, config: Config) -> None:
        self._remote, self._keep = remote, config.checkpoint
        self._waiting: list[Path] = []
        self._current: Path | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._news: list[str] = []
        self._done = self._failed = 0

    def add(self, folder: Path) -> None:
        """Have a whole local checkpoint uploaded."""
        with self._changed:
            self._waiting.append(folder)
            while len(self._waiting) > self._keep.keep:
                self._fail(self._waiting.pop(0), "newer ones were saved faster than the store takes them")
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def needs(self, folder: Path) -> bool:
        """Tell whether a local checkpoint is still to be read."""
        with self._changed:
            return folder == self._current or folder in self._waiting

    def wait(self, seconds: float | None = None) -> None:
        """Wait until everything is uploaded or given up, for at most so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._current is None and not self._waiting, seconds)

    def news(self) -> list[str]:
        """Return what was not uploaded, and why, since this was last asked."""
        with self._changed:
            out, self._news = self._news, []
        return out

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                folder = self._current = self._waiting.pop(0)
            said = ""
            try:
                self._remote.upload(folder)
                self._remote.prune(manifest.step_of(folder), self._keep.keep, self._keep.keep_every)
            except (StoreError, ConfigError, OSError) as error:
                said = str(error)
            with self._changed:
                self._done += 1
                self._current = None
                if said:
                    self._fail(folder, said)
                self._changed.notify_all()

    def _fail(self, folder: Path, said: str) -> None:
        self._failed += 1
        text = f"{self._remote.url}: {folder.name} is not uploaded: {said}"
        self._news.append(f"{text} ({self._failed} of this start's uploads failed; it is whole in {folder})")
