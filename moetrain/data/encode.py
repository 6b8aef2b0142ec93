"""From the texts of a corpus to its token files, in parallel, in the order of the texts."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moetrain.data import tokenizer
from moetrain.data.manifest import SPLITS
from moetrain.data.parallel import map_in_order
from moetrain.data.spool import SPLIT, Spool, read_texts

JOB_BYTES = 1 << 22  # of text that a process is given at a time


class EncodeJob(NamedTuple):
    """Documents of one shard and split, one after the other."""

    tokenizer: Path
    texts: Path
    begins: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    shard: int
    split: str
    domains: NDArray[np.uint32]
    characters: int


class EncodedTexts(NamedTuple):
    """Their tokens, each document's end-of-text token included, and the length of each."""

    tokens: NDArray[np.integer]
    lengths: NDArray[np.int64]


class _Writer:
    """A split's `.bin` and its table of documents."""

    def __init__(self, folder: Path, split: str, documents: int, domains: Sequence[str]) -> None:
        self.file = (folder / f"{split}.bin").open("wb")
        self.table = (folder / f"{split}.docs.npy").open("wb")
        header = {"descr": "<i8", "fortran_order": False, "shape": (documents, 3)}
        np.lib.format.write_array_header_1_0(self.table, header)
        self.digest, self.documents, self.tokens = hashlib.sha256(), 0, 0
        self.domains, self.per_domain = domains, np.zeros(len(domains), np.int64)

    def add(self, encoded: EncodedTexts, domains: NDArray[np.integer]) -> None:
        raw = encoded.tokens.tobytes()
        self.file.write(raw)
        self.digest.update(raw)
        begins = self.tokens + np.cumsum(encoded.lengths) - encoded.lengths
        self.table.write(np.stack([begins, encoded.lengths, domains], axis=1).astype("<i8").tobytes())
        self.per_domain += np.bincount(domains, encoded.lengths, len(self.domains)).astype(np.int64)
        self.documents += len(domains)
        self.tokens += int(encoded.lengths.sum())

    def close(self) -> dict[str, Any]:
        """Returns what the manifest says of the split."""
        self.file.close()
        self.table.close()
        per_domain = dict(zip(self.domains, self.per_domain.tolist(), strict=True))
        facts = {"documents": self.documents, "tokens": self.tokens, "tokens_per_domain": per_domain}
        return {**facts, "sha256": self.digest.hexdigest()}


def write_tokens(
    spool: Spool, folder: Path, domains: Sequence[str], workers: int, tick: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Write `train.bin`, `held_out.bin` and their tables with `folder`/tokenizer.json; texts go as they are done.

    `tick` is told of characters. Returns what the manifest says of each split.
    """
    path = folder / "tokenizer.json"
    numbers = np.array([domains.index(name) for name in spool.names], np.int64)
    writers = {split: _Writer(folder, split, spool.count(split), domains) for split in SPLITS}
    bytes_ = {split: spool.sum(split, "size") for split in SPLITS}
    jobs, again = itertools.tee(_jobs(spool, path))
    shard = 0
    for job, encoded in zip(jobs, map_in_order(_encode_job, again, workers), strict=True):
        for done in range(shard, job.shard):
            spool.shards[done].path.unlink()
        shard = job.shard
        writers[job.split].add(encoded, numbers[job.domains])
        tick(job.characters)
    for split, documents in spool.last.items():
        for document in documents:
            place = np.array([domains.index(document.domain)])
            writers[split].add(_encode(path, [document.text]), place)
    return {split: {**writer.close(), "bytes": bytes_[split]} for split, writer in writers.items()}


def _jobs(spool: Spool, path: Path) -> Iterator[EncodeJob]:
    for number, (shard, splits) in enumerate(zip(spool.shards, spool.splits, strict=True)):
        for split in SPLITS:
            rows = np.flatnonzero(splits == SPLIT[split])
            sizes = shard.rows["size"][rows]
            groups = np.cumsum(sizes) // JOB_BYTES
            for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(groups)) + 1):
                if len(part):
                    own = rows[part]
                    begins, characters = shard.rows["begin"][own], int(shard.rows["length"][own].sum())
                    where = spool.domains[number][own]
                    yield EncodeJob(path, shard.path, begins, sizes[part], number, split, where, characters)


def _encode_job(job: EncodeJob) -> EncodedTexts:
    return _encode(job.tokenizer, read_texts(job.texts, job.begins, job.sizes))


def _encode(path: Path, texts: Any) -> EncodedTexts:
    chosen, end, dtype = _load(path)
    found = [np.concatenate([ids, end]) for ids in tokenizer.encode(chosen, texts)]
    return EncodedTexts(np.concatenate(found).astype(dtype), np.array([len(ids) for ids in found], np.int64))


@lru_cache(maxsize=1)
def _load(path: Path) -> tuple[Tokenizer, NDArray[np.uint32], type[np.integer]]:
    """A tokenizer, its end-of-text token and the dtype of its files."""
    chosen = Tokenizer.from_file(str(path))
    dtype = np.uint16 if tokenizer.vocabulary_size(chosen) <= 1 << 16 else np.uint32
    return chosen, np.array([tokenizer.end_of_text(chosen)], np.uint32), dtype
