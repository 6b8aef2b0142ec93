"""Files of a checkpoint: safetensors, written straight from memory, with a stamp that tells a file from a damaged one.

The stamp is the size and the CRC-32 of all bytes: it finds every damage by accident, at several times the speed of a
cryptographic digest. It is no protection against somebody who means harm; that safetensors and JSON run no code is.
"""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

WIDTH = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}  # bytes
CHUNK = 1 << 24  # bytes at a time


class FileStamp(NamedTuple):
    bytes: int
    crc32: str


class TensorBlock(NamedTuple):
    """A tensor in a safetensors file."""

    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    bytes: int


def header(blocks: Sequence[TensorBlock]) -> bytes:
    """Return what stands before the data of a safetensors file; the blocks follow without gaps, in this order."""
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for block in blocks:
        offsets = [begin, begin := begin + block.bytes]
        table[block.name] = {"dtype": block.dtype, "shape": block.shape, "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(path: Path, *parts: bytes | memoryview) -> FileStamp:
    """Write a new file of these parts, safe on the disk when this returns. Raises `OSError`."""
    size, crc = 0, 0
    with path.open("xb", buffering=0) as out:
        for part in parts:
            left = memoryview(part)
            while left:
                done = out.write(left[:CHUNK])
                crc, size, left = zlib.crc32(left[:done], crc), size + done, left[done:]
        os.fsync(out.fileno())
    return FileStamp(size, f"{crc:08x}")


def stamp(path: Path) -> FileStamp:
    """Return the stamp of the file as it is now. Raises `OSError`."""
    size, crc = 0, 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    return FileStamp(size, f"{crc:08x}")
