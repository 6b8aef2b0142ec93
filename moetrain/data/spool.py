"""The documents of a corpus on the disk while it is prepared: read once, shard by shard, then chosen.

A shard has a file of names and texts and a table with a row for each document. Of a document, memory holds five bytes
and, to find copies, a digest (about 90 bytes with its place in the set), never its text.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moetrain.config import ConfigError, Data
from moetrain.data.corpus import (
    COPIES,
    FINGERPRINTS,
    MIN_CHARACTERS,
    Document,
    Shard,
    cut,
    domain_name,
    hash_text,
    split_source,
)
from moetrain.data.files import LeftOut
from moetrain.data.parallel import choose_workers, map_in_order

NEITHER, TRAIN, HELD_OUT = 0, 1, 2  # what a document is in
SPLIT = {"train": TRAIN, "held_out": HELD_OUT}
ROW = np.dtype([("begin", "u8"), ("size", "u8"), ("length", "u8"), ("print", "u8", 2), ("hash", "u4"), ("label", "u4")])
BUFFER = 4096  # rows that are handled together


class Texts(NamedTuple):
    """A shard on the disk: its file of names and texts, its table, the labels that the rows number."""

    path: Path  # UTF-8; a name, a line end, the text
    rows: NDArray[np.void]  # [documents] ROW: first byte and bytes of the text, its characters, digest, hash
    labels: list[str]
    left_out: LeftOut

    def read(self, row: int) -> Document:
        """The document of a row. Its domain is as the source names it."""
        with self.path.open("rb") as file:
            begin, size = int(self.rows["begin"][row]), int(self.rows["size"][row])
            before = int(self.rows["begin"][row - 1] + self.rows["size"][row - 1]) if row else 0
            file.seek(before)
            name = file.read(begin - before - 1).decode()
            file.seek(begin)
            return Document(self.labels[int(self.rows["label"][row])], file.read(size).decode(), name)


@dataclass
class Spool:
    """All documents, and which are taken: in the order of the source, some at the end of their split."""

    shards: list[Texts] = field(default_factory=list)
    splits: list[NDArray[np.uint8]] = field(default_factory=list)  # per shard: what its documents are in
    domains: list[NDArray[np.uint32]] = field(default_factory=list)  # likewise: their domains, as numbers in `names`
    names: list[str] = field(default_factory=list)
    last: dict[str, list[Document]] = field(default_factory=lambda: {"train": [], "held_out": []})

    def count(self, split: str) -> int:
        """The documents of a split."""
        return sum(int((found == SPLIT[split]).sum()) for found in self.splits) + len(self.last[split])

    def sum(self, split: str, what: str) -> int:
        """The bytes (`size`) or characters (`length`) of all texts of a split."""
        found = sum(int(t.rows[what][s == SPLIT[split]].sum()) for t, s in zip(self.shards, self.splits, strict=True))
        sizes = (len(d.text.encode() if what == "size" else d.text) for d in self.last[split])
        return found + sum(sizes)

    def texts(self, split: str) -> Iterator[str]:
        """The texts of a split, in order."""
        for shard, found in zip(self.shards, self.splits, strict=True):
            rows = np.flatnonzero(found == SPLIT[split])
            yield from read_texts(shard.path, shard.rows["begin"][rows], shard.rows["size"][rows])
        yield from (document.text for document in self.last[split])


def read_texts(path: Path, begins: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> Iterator[str]:
    """The texts at these places of a shard's file."""
    if len(begins):
        with path.open("rb") as file:
            for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True):
                file.seek(begin)
                yield file.read(size).decode()


def collect(options: Data, work: Path, left_out: LeftOut, tick: Callable[[int], None]) -> Spool:
    """Read all documents of the source into the folder `work`, in parallel, and choose at most `max_bytes_per_domain`
    of each domain, without copies; what is not taken is counted. `tick` is told of documents.

    Raises `ConfigError` for what is bad, and where there is nothing.
    """
    shards = split_source(options, left_out)
    workers = 1 if len(shards) < 2 else choose_workers(getattr(options, "workers", None), sum(s.size for s in shards))
    read = partial(_read_shard, options.dedup, tick if workers == 1 else None)
    jobs = ((shard, work / f"{number:06d}") for number, shard in enumerate(shards))
    spool, choose = Spool(), _Chooser(options, left_out)
    for texts in map_in_order(read, jobs, workers):
        left_out.merge(texts.left_out)
        choose.take(spool, texts)
        if workers > 1:
            tick(len(texts.rows))
    return spool


def _read_shard(dedup: str, tick: Callable[[int], None] | None, job: tuple[Shard, Path]) -> Texts:
    (shard, path), left_out = job, LeftOut()
    digest, labels, end = FINGERPRINTS[dedup], dict[str, int](), 0
    rows = np.empty(BUFFER, ROW)
    count = total = 0
    table = path.with_suffix(".rows")
    with path.open("wb") as out, table.open("wb") as rows_out:
        for label, text, name in shard.read(left_out):
            raw, head = text.encode(), f"{name}\n".encode("utf-8", "backslashreplace")
            print_ = np.frombuffer(digest(text)[:16], np.uint64)
            number = labels.setdefault(label, len(labels))
            rows[count] = (end + len(head), len(raw), len(text), print_, hash_text(raw), number)
            out.write(head + raw)
            end += len(head) + len(raw)
            count, total = count + 1, total + 1
            if count == BUFFER:
                rows_out.write(rows.tobytes())
                count = 0
            if tick is not None:
                tick(1)
        rows_out.write(rows[:count].tobytes())
    found = np.memmap(table, ROW, "r", shape=(total,)) if total else np.empty(0, ROW)
    return Texts(path, found, list(labels), left_out)


class _Chooser:
    """Which documents are taken, in their order."""

    def __init__(self, options: Data, left_out: LeftOut) -> None:
        self.options, self.left_out = options, left_out
        self.seen: set[bytes] = set()
        self.sizes: dict[str, int] = {}
        self.labels: dict[str, str] = {}

    def take(self, spool: Spool, texts: Texts) -> None:
        """Add a shard with what of it is taken."""
        names = [self._name(label) for label in texts.labels]
        spool.names += [name for name in dict.fromkeys(names) if name not in spool.names]
        numbers = np.array([spool.names.index(name) for name in names], np.uint32)
        splits = np.zeros(len(texts.rows), np.uint8)
        spool.shards.append(texts)
        spool.splits.append(splits)
        spool.domains.append(numbers[texts.rows["label"]] if names else np.empty(0, np.uint32))
        border = self.options.held_out * 2**32
        for first in range(0, len(texts.rows), BUFFER):
            part = texts.rows[first : first + BUFFER]
            prints = np.ascontiguousarray(part["print"]).tobytes()
            fields = zip(part["label"].tolist(), part["size"].tolist(), part["hash"].tolist(), strict=True)
            for row, (label, size, hash_) in enumerate(fields):
                print_ = prints[16 * row : 16 * row + 16]
                if self._is_taken(names[label], size, print_, spool, first + row):
                    splits[first + row] = HELD_OUT if hash_ < border else TRAIN

    def _is_taken(self, name: str, size: int, print_: bytes, spool: Spool, row: int) -> bool:
        limit, taken = self.options.max_bytes_per_domain, self.sizes.get(name, 0)
        if limit is not None and taken + size > limit:
            self.left_out.add("beyond data.max_bytes_per_domain", lambda: spool.shards[-1].read(row).name)
            return False
        if print_ in self.seen:
            earlier = partial(_find_taken, spool, print_)
            name_both = lambda: f"{spool.shards[-1].read(row).name}, as {earlier()}"  # noqa: E731
            self.left_out.add(COPIES[self.options.dedup], name_both)
            return False
        if self.options.dedup != "none":
            self.seen.add(print_)
        self.sizes[name] = taken + size
        return True

    def _name(self, label: str) -> str:
        name = domain_name(label)
        if self.labels.setdefault(name, label) != label:
            both = f"{self.labels[name]!r} and {label!r} would both be named {name}"
            raise ConfigError(f"data.path={self.options.path}: two domains, {both}; give one another name")
        return name


def _find_taken(spool: Spool, print_: bytes) -> str:
    """The name of the document with that digest that was taken."""
    for texts, splits in zip(spool.shards, spool.splits, strict=True):
        same = (texts.rows["print"] == np.frombuffer(print_, np.uint64)).all(axis=1) & (splits != NEITHER)
        if same.any():
            return texts.read(int(np.flatnonzero(same)[0])).name
    raise LookupError(print_)


def fill_empty_splits(spool: Spool, share: float) -> list[str]:
    """Give every domain a document in each split, at its end: a small corpus may have none there by its hashes.

    Returns the domains whose only document was cut for it. Raises `ConfigError` where it is too short for that.
    """
    cut_ones = []
    for name in sorted(spool.names):
        number = spool.names.index(name)
        for empty, full in (("train", "held_out"), ("held_out", "train")):
            if _rows_of(spool, number, SPLIT[empty]) or not (found := _rows_of(spool, number, SPLIT[full])):
                continue
            shard, row = found[-1]
            document = spool.shards[shard].read(row)._replace(domain=name)
            spool.splits[shard][row] = NEITHER
            if len(found) > 1:
                spool.last[empty].append(document)
            elif (parts := cut(document, share)) is None:
                rule = f"must have at least two documents, or one of {MIN_CHARACTERS} characters that can be cut"
                raise ConfigError(f"data: the domain {name!r} {rule}; one is held out")
            else:
                cut_ones.append(name)
                for split, part in zip(SPLIT, parts, strict=True):
                    spool.last[split].append(part)
            break
    return cut_ones


def _rows_of(spool: Spool, domain: int, split: int) -> list[tuple[int, int]]:
    """(shard, row) of the first and the last documents of a domain in a split; at most two."""
    first, last = None, None
    for shard, (splits, domains) in enumerate(zip(spool.splits, spool.domains, strict=True)):
        rows = np.flatnonzero((splits == split) & (domains == domain))
        if len(rows):
            first = first or (shard, int(rows[0]))
            last = (shard, int(rows[-1]))
    return list(dict.fromkeys(place for place in (first, last) if place is not None))
