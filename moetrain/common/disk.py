"""Small files that outlive a process: written whole or not at all, and read as far as they are sound.

What is read may be torn, damaged or somebody else's: only regular files up to a size are read, and what does not parse
counts as missing. Whoever needs more than JSON of some shape checks that too.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml

MOST_BYTES = 1 << 26  # of a file that is read as a whole
MOST_FIELDS = 100_000  # of a YAML file
PART = re.compile(r"\..+\.[0-9a-f]{16}\.part")  # the name of an unfinished file
BROKEN = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError)


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block is through and its last byte is on the disk.

    Links are replaced, not followed. Where the block or the disk fails, what was there stays. Raises `OSError`.
    """
    part = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.part")
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with suppress(OSError):  # where the file system has locks: `remove_parts` leaves alone what is being written
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        with open(handle, "wb") as out:
            yield out
            out.flush()
            os.fsync(handle)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
    sync(path.parent)


def write(path: Path, data: str | bytes, mode: int = 0o666) -> None:
    """`data` in place of what `path` held; text as UTF-8; `mode` less the umask. Raises `OSError`."""
    with replacing(path, mode) as out:
        out.write(data.encode() if isinstance(data, str) else data)


def remove_parts(folder: Path) -> None:
    """Remove the unfinished files that a process killed in the middle of `replacing` left in a folder."""
    for part in folder.glob(".*.part"):
        if PART.fullmatch(part.name) is None:
            continue
        with suppress(OSError):
            handle = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()
            finally:
                os.close(handle)


def append(path: Path) -> IO[str]:
    """Open a text file at its end, made if need be. A link is replaced, not followed. Raises `OSError`."""
    if path.is_symlink():
        path.unlink()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return open(handle, "a", encoding="utf-8", errors="backslashreplace")


def make_own(folder: Path) -> Path:
    """Make a folder; a link in its place is removed, not followed. Raises `OSError`."""
    if folder.is_symlink():
        folder.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sync(folder: Path) -> None:
    """The names in it are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Wait until the bytes of a file are on the disk. Raises `OSError`."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path, most: int = MOST_BYTES) -> bytes:
    """A regular file. Raises `OSError`; `ValueError` where it is something else or has more than `most` bytes."""
    with opened(path, most) as file:
        return file.read(most)


@contextmanager
def opened(path: Path, most: int) -> Iterator[IO[bytes]]:
    """A regular file, to be read. Raises as `read` does."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer must not be waited for
    with open(handle, "rb") as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no regular file")
        if about.st_size > most:
            raise ValueError(f"it has {about.st_size:,} bytes, more than {most:,}")
        yield file


def read_json(path: Path) -> Any:
    """What a JSON file holds; None where it is missing or damaged."""
    with suppress(*BROKEN):
        return json.loads(read(path))
    return None


def read_yaml(path: Path) -> dict[str, Any] | None:
    """The mapping in a YAML file; None where it is missing, damaged or something else."""
    with suppress(*BROKEN):
        found = parsed_yaml(read(path, 1 << 20))
        return found if isinstance(found, dict) else None
    return None


def parsed_yaml(text: bytes) -> Any:
    """Raises `yaml.YAMLError` or `ValueError`, the latter also where a few aliases stand for a giant."""
    tree = yaml.safe_load(text)
    left, count = [tree], 0
    while left:
        part = left.pop()
        left += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        count += 1
        if count > MOST_FIELDS:
            raise ValueError(f"it has more than {MOST_FIELDS:,} fields")
    return tree


def row_of(line: bytes) -> dict[str, Any] | None:
    """A line of `metrics.jsonl` or `alerts.jsonl`: an object with a `step`; None for a torn or damaged one."""
    with suppress(*BROKEN):
        row = json.loads(line)
        step = row["step"]
        return row if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None
    return None


def rows(path: Path) -> list[dict[str, Any]]:
    """The sound lines of such a file; none where there is no file."""
    with suppress(OSError, ValueError):
        return [row for line in read(path, 1 << 34).split(b"\n") if (row := row_of(line)) is not None]
    return []


def make_private(folder: Path) -> None:
    """Make a folder that is this user's alone, or see that it is. Raises `OSError`; `PermissionError` where it is not.

    One that only could be read by others is closed.
    """
    with suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    if said := not_private(folder):
        raise PermissionError(errno.EPERM, said)
    if stat.S_IMODE(folder.lstat().st_mode) & 0o077:
        os.chmod(folder, 0o700)


def not_private(folder: Path) -> str:
    """Why others could have put something into a folder, in words; empty where none could. Raises `OSError`."""
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode):
        return f"{folder} is no folder, or a link to one"
    if about.st_uid != os.getuid():
        return f"{folder} belongs to another user ({about.st_uid})"
    return f"{folder} can be written by others" if about.st_mode & 0o022 else ""
