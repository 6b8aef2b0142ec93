"""Documents that are tokens already, memory-mapped: a split of a folder that `moetrain data` prepared, and Megatron's
`.bin` and `.idx`.

Megatron's index, little-endian: the nine bytes `MMIDIDX\\0\\0`, the version 1 (uint64), the code of the tokens' dtype
(uint8), the number of sequences N (uint64), in all but the earliest files the number M of borders of documents
(uint64), then the length in tokens of every sequence (int32 [N]), its place in the `.bin` in bytes (int64 [N]), the
borders of documents as numbers of sequences from 0 to N (int64 [M]), and of multimodal files a mode per sequence (int8
[N]). Without borders each sequence is a document.
"""

import struct
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.data.files import BadText

MAGIC = b"MMIDIDX\x00\x00"
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16}
CHUNK = 1 << 22  # entries of an index that are looked at together


class Begins:
    """The first token of every document, and behind them the number of all tokens: read from the disk when asked."""

    def __init__(self, starts: NDArray[np.int64], num_tokens: int, borders: NDArray[np.int64], unit: int) -> None:
        """`starts`: of every sequence, in units of 1 / `unit` tokens; `borders`: [documents + 1] numbers of sequences,
        or empty where every sequence is a document."""
        self.starts, self.num_tokens, self.borders, self.unit = starts, num_tokens, borders, unit

    def __len__(self) -> int:
        return len(self.borders) if len(self.borders) else len(self.starts) + 1

    def __getitem__(self, document: int) -> int:
        sequence = int(self.borders[document]) if len(self.borders) else document
        return self.num_tokens if sequence == len(self.starts) else int(self.starts[sequence]) // self.unit

    def read(self, first: int, last: int) -> NDArray[np.int64]:
        """Those of the documents `first` to `last` - 1."""
        sequences = np.asarray(self.borders[first:last]) if len(self.borders) else np.arange(first, last)
        inside = sequences < len(self.starts)
        out = np.full(len(sequences), self.num_tokens, np.int64)
        out[inside] = np.asarray(self.starts)[sequences[inside]] // self.unit
        return out


@dataclass(frozen=True, eq=False)
class TokenFile:
    """Documents back to back. `begins` has one entry more than there are documents."""

    path: Path  # of the tokens
    index: Path
    tokens: NDArray[Any]  # memory-mapped integers
    begins: Begins
    domains: NDArray[np.int64] | None = None  # [documents] the folder's own number of the domain; None: there are none

    @property
    def num_documents(self) -> int:
        return len(self.begins) - 1

    def find_document(self, token: int) -> int:
        """The number of the document that holds the token."""
        return bisect_right(self.begins, token) - 1


def find_indexes(path: Path) -> list[Path]:
    """What a place of `data.sources` stands for: the `manifest.json` of a prepared folder, or Megatron's `.idx` files,
    in their order; nothing where it is neither."""
    if (path / "manifest.json").is_file():
        return [path / "manifest.json"]
    if path.is_dir():
        return sorted(path.glob("*.idx"))
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    index = path.with_name(f"{path.name}.idx")
    return [index] if index.is_file() or index.with_suffix(".bin").is_file() else []


def find_files(path: Path) -> list[Path]:
    """All files of such a place."""
    found: list[Path] = []
    for index in find_indexes(path):
        folder = index.parent
        prepared = [index, folder / "tokenizer.json", *sorted([*folder.glob("*.bin"), *folder.glob("*.docs.npy")])]
        found += prepared if index.name == "manifest.json" else [index, index.with_suffix(".bin")]
    return found


def open_split(folder: Path, split: str, vocab_size: int) -> TokenFile:
    """A split of a prepared folder."""
    path, index = folder / f"{split}.bin", folder / f"{split}.docs.npy"
    tokens = _map(path, np.uint16 if vocab_size <= 1 << 16 else np.uint32, path.stat().st_size)
    table = np.load(index, mmap_mode="r")
    return TokenFile(path, index, tokens, Begins(table[:, 0], len(tokens), np.empty(0, np.int64), 1), table[:, 2])


def open_megatron(index: Path) -> TokenFile:
    """A `.bin` by its `.idx`; only the header is read. Raises `BadText` for a file that is not what it should be."""
    path = index.with_suffix(".bin")
    for needed in (index, path):
        if not needed.is_file():
            raise BadText(str(needed), "there is no such file; Megatron's tokens are a .bin and an .idx")
    size = index.stat().st_size
    with index.open("rb") as file:
        head = file.read(34)
    if head[:9] != MAGIC:
        raise BadText(str(index), "must be Megatron's index, which begins with MMIDIDX")
    if len(head) < 26:
        raise BadText(str(index), f"is cut: has {size} bytes, no whole header")
    version, code, count = struct.unpack_from("<QBQ", head, 9)
    if version != 1:
        raise BadText(str(index), f"must be of version 1, not {version}")
    dtype = np.dtype(DTYPES.get(code, np.void))
    if dtype.kind not in "iu":
        raise BadText(str(index), f"its dtype has the code {code}; tokens are integers, the codes 1 to 5 and 8")
    borders = struct.unpack_from("<Q", head, 26)[0] if len(head) == 34 else 0
    if size == 26 + 12 * count:
        begin, borders = 26, 0
    elif borders and size in (34 + 12 * count + 8 * borders, 34 + 13 * count + 8 * borders):
        begin = 34
    else:
        raise BadText(str(index), f"is cut or damaged: has {size:,} bytes, which {count:,} sequences do not take")
    starts = _map(index, np.int64, 8 * count, begin + 4 * count)
    table = _map(index, np.int64, 8 * borders, begin + 12 * count)
    num_tokens = int(starts[-1]) // dtype.itemsize + int(_map(index, np.int32, 4 * count, begin)[-1]) if count else 0
    if path.stat().st_size != num_tokens * dtype.itemsize:
        wanted = f"{num_tokens:,} tokens of {dtype} take {num_tokens * dtype.itemsize:,}"
        raise BadText(str(path), f"has {path.stat().st_size:,} bytes, but by its .idx {wanted}")
    tokens = _map(path, dtype, path.stat().st_size)
    return TokenFile(path, index, tokens, Begins(starts, num_tokens, table, dtype.itemsize))


def check_megatron(file: TokenFile) -> None:
    """Raises `BadText` where the index does not name documents that lie back to back; reads the whole index."""
    begins, count = file.begins, len(file.begins.starts)
    lengths = _map(file.index, np.int32, 4 * count, (26 if not len(begins.borders) else 34))
    for first in range(0, count, CHUNK):
        starts = np.asarray(begins.starts[first : first + CHUNK + 1])
        if first == 0 and count and starts[0] != 0:
            raise BadText(str(file.index), "its first sequence must begin at byte 0")
        sizes = lengths[first : first + len(starts) - 1].astype(np.int64) * begins.unit
        if (np.diff(starts) != sizes).any():
            number = first + int(np.flatnonzero(np.diff(starts) != sizes)[0])
            raise BadText(str(file.index), f"the sequences {number} and {number + 1} must lie back to back")
    if len(borders := begins.borders):
        rising = all((np.diff(borders[n : n + CHUNK + 1]) >= 0).all() for n in range(0, len(borders), CHUNK))
        if not rising or borders[0] != 0 or borders[-1] != count:
            raise BadText(str(file.index), f"the borders of its documents must rise from 0 to {count:,}")


def _map(path: Path, dtype: Any, size: int, offset: int = 0) -> NDArray[Any]:
    """`size` bytes of a file from `offset` on, at whatever alignment."""
    if not size:
        return np.empty(0, dtype)
    return np.memmap(path, np.uint8, "r", offset, size).view(np.ndarray).view(dtype)


class Stream:
    """Documents in their own order, back to back, cut into windows of L + 1 tokens: every token is predicted once a
    pass. Nothing is held in memory."""

    def __init__(self, file: TokenFile, first: int, last: int, labels: list[int], seq_len: int) -> None:
        """The documents `first` to `last` - 1 of a file; `labels`: the number of each of the file's domains, or of its
        only one."""
        self.file, self.labels, self.seq_len = file, np.array(labels, np.int64), seq_len
        self.begin, self.end = file.begins[first], file.begins[last]
        self.num_tokens = self.end - self.begin
        self.num_windows = max(0, (self.num_tokens - 1) // seq_len)

    def window(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Tokens, domains and document numbers [L + 1] of the stream from `number` · L on."""
        begin = self.begin + number * self.seq_len
        end = begin + self.seq_len + 1
        documents, counts = [self.file.find_document(begin)], []
        while (border := self.file.begins[documents[-1] + 1]) < end:
            counts.append(border - begin)
            documents.append(documents[-1] + 1)
            begin = border
        counts.append(end - begin)
        domains = self.labels[[0] * len(documents)]
        if self.file.domains is not None and len(self.labels) > 1:
            domains = self.labels[self.file.domains[documents]]
        tokens = self.file.tokens[end - self.seq_len - 1 : end].astype(np.int64)
        return tokens, np.repeat(domains, counts), np.repeat(documents, counts)
