"""A folder in a store that fsspec reaches: `s3://bucket/folder`, `gs://`, `abfs://`, `file:///folder`, `memory://folder`.

Credentials and endpoints are fsspec's and the store's own business: environment variables and `~/.config/fsspec`.
"""

import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moetrain.common.errors import ConfigError
from moetrain.common.redact import redacted_text


class StoreError(Exception):
    """What went wrong in a store, in one line."""


def is_url(text: str) -> bool:
    """Tell whether `text` is the address of a store."""
    return "://" in text


def open_store(url: str, field: str) -> "Store":
    """Return the folder at `url`, which need not exist. The store is not asked for anything yet.

    Raises `ConfigError` that names `field` where fsspec does not know the protocol, or a package is missing.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise ConfigError(f"{field}={url}: needs the package fsspec: pip install 'moetrain[remote]'") from None
    try:
        system, root = url_to_fs(url, use_listings_cache=False)
    except Exception as error:  # a missing package, an unknown protocol, a URL that a store refuses
        raise ConfigError(f"{field}={redacted_text(url)}: {_one_line(error)}") from None
    return Store(redacted_text(url.rstrip("/")), system, root)


class Store:
    """Files below a folder of a store, by names relative to it. Every method raises `StoreError`, and nothing else.

    A file of an object store appears whole or not at all; in `file://` a file may be seen half written. No store
    replaces several files at once.
    """

    def __init__(self, url: str, system: Any, root: str) -> None:
        self.url, self._system, self._root = url, system, root

    def folder(self, name: str) -> "Store":
        """Return a folder in this one."""
        return Store(f"{self.url}/{name}", self._system, posixpath.join(self._root, name))

    def list_names(self) -> list[str]:
        """Return the names of files and folders in this one; none where it does not exist."""
        with self._telling():
            self._system.invalidate_cache()
            try:
                found = self._system.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
            return sorted({posixpath.basename(path.rstrip("/")) for path in found} - {""})

    def size(self, name: str) -> int | None:
        """Return the bytes of a file; None where it does not exist."""
        with self._telling():
            self._system.invalidate_cache()
            try:
                return int(self._system.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def upload(self, local: Path, name: str) -> None:
        """Write a local file there, in place of what has the name. Its size is compared with what arrived."""
        with self._telling():
            if not self._system.async_impl:  # which object stores are: they have no folders, but would make a bucket
                self._system.makedirs(posixpath.dirname(self._path(name)), exist_ok=True)
            self._system.put_file(str(local), self._path(name))
        if (found := self.size(name)) != (sent := local.stat().st_size):
            raise StoreError(f"{name} has {found} bytes in the store, {sent} were sent")

    def download(self, name: str, local: Path) -> None:
        """Write a file of the store to the disk."""
        with self._telling():
            self._system.get_file(self._path(name), str(local))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; what does not exist is no error."""
        with self._telling():
            self._system.invalidate_cache()
            if self._system.exists(self._path(name)):
                self._system.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of botocore, aiohttp, the disk: each store has its own
            raise StoreError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return redacted_text(said)[:240].rstrip(".")
