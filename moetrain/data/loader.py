"""Sequences of tokens as a pure function of (seed, global sample index).

The same global batch at any number of ranks; resumed by one integer; a domain label for every token.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moetrain.config import Config, ConfigError
from moetrain.data import manifest as prepared
from moetrain.data.mixture import Mixture, Source
from moetrain.data.token_files import Stream, TokenFile, open_megatron, open_split


@dataclass(frozen=True)
class Sequences:
    """`tokens[:, :-1]` go in, `tokens[:, 1:]` are predicted. All [B, L + 1], int64."""

    tokens: NDArray[np.int64]
    domain: NDArray[np.int64]
    document: NDArray[np.int64]  # equal numbers: the same document; below zero: padding
    sample: NDArray[np.int64] | None = None  # [B] global numbers, of training sequences
    target: NDArray[np.bool_] | None = None  # [B, L + 1] tokens that are to be predicted; None: all
    experts: NDArray[np.integer] | None = None  # [B, L, passes, K] recorded choices; -1: none; None: routers choose

    @property
    def num_tokens(self) -> int:
        """Tokens that go in, without padding."""
        return int((self.document[:, :-1] >= 0).sum())

    @property
    def num_targets(self) -> int:
        """Tokens that the loss is the mean over."""
        return int((self.document[:, 1:] >= 0).sum() if self.target is None else self.target[:, 1:].sum())

    def select(self, rows: slice) -> "Sequences":
        """Return some of the sequences."""
        parts = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: part[rows] for name, part in parts.items() if part is not None})

    @property
    def positions(self) -> NDArray[np.int64] | None:
        """[P] places in the flattened targets, `tokens[:, 1:]`, that are to be predicted; None: all."""
        return None if self.target is None else np.flatnonzero(self.target[:, 1:])

    def attended(self, within_documents: bool) -> NDArray[np.int64] | None:
        """Returns what the model takes as `document` [B, L]: None where attention and routing are over all tokens."""
        document = self.document[:, :-1]
        if within_documents:
            return document
        return None if (document >= 0).all() else np.minimum(document, 0)


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus (data/prepare.py), memory-mapped; of `data=tokens`, what describes its sources."""

    folder: Path

    @cached_property
    def manifest(self) -> dict:
        return json.loads((self.folder / "manifest.json").read_text())

    @property
    def domains(self) -> list[str]:
        return self.manifest["domains"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    @property
    def end_of_text(self) -> int:
        return self.manifest["end_of_text"]

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What a run remembers of its data."""
        return prepared.fingerprint(self.folder)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """[V] how many bytes of text a token stands for; special tokens none."""
        added = self.tokenizer.get_added_tokens_decoder()
        lengths = np.zeros(self.vocab_size, np.int64)
        for text, token in self.tokenizer.get_vocab().items():
            lengths[token] = len(text)  # byte-level BPE: one character a byte
        for token, entry in added.items():
            lengths[token] = 0 if entry.special else len(entry.content.encode())
        return lengths

    def tokens(self, split: str) -> NDArray[np.integer]:
        return self._splits[split][0]

    def documents(self, split: str) -> NDArray[np.int64]:
        """[documents, 3]: start, length, domain."""
        return self._splits[split][1]

    @cached_property
    def _splits(self) -> dict[str, tuple[NDArray[np.integer], NDArray[np.int64]]]:
        """Opened together and once, so that a corpus that is deleted under a run stays readable to its end."""
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        return {
            split: (np.memmap(self.folder / f"{split}.bin", dtype, "r"), np.load(self.folder / f"{split}.docs.npy"))
            for split in self.manifest["splits"]
        }

    @property
    def is_chat(self) -> bool:
        """Whether its documents are conversations, which have `targets` and `origins`."""
        return "chat" in self.manifest

    @property
    def has_pairs(self) -> bool:
        """Whether documents 2n and 2n + 1 are the chosen and the rejected conversation of a pair."""
        return bool(self.manifest.get("chat", {}).get("pairs", False))

    def targets(self, split: str) -> NDArray[np.bool_]:
        """[tokens] whether each is to be predicted."""
        return self._chat[split][0]

    def origins(self, split: str) -> NDArray[np.int64]:
        """[documents, 3]: source, file, line or row."""
        return self._chat[split][1]

    @cached_property
    def _chat(self) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.int64]]]:
        return {
            split: (
                np.memmap(self.folder / f"{split}.target.bin", bool, "r"),
                np.load(self.folder / f"{split}.rows.npy"),
            )
            for split in self.manifest["splits"]
        }

    @property
    def is_mixture(self) -> bool:
        """Whether it is a description of `data.sources`, which has `streams` in place of `tokens` and `documents`."""
        return "sources" in self.manifest

    def streams(self, source: int, split: str, seq_len: int) -> list[Stream]:
        """The documents of a source, file by file."""
        described = self.manifest["sources"][source]["files"][split]
        files = self._files[source][split]
        return [
            Stream(file, place["first"], place["last"], place["labels"], seq_len)
            for file, place in zip(files, described, strict=True)
        ]

    @cached_property
    def _files(self) -> list[dict[str, list[TokenFile]]]:
        """Opened together and once, as `_splits` are."""
        return [
            {split: [_open_tokens(place) for place in places] for split, places in source["files"].items()}
            for source in self.manifest["sources"]
        ]

    def hold(self) -> None:
        """Read or open all that a run will need."""
        _ = self._files if self.is_mixture else self._splits, self.token_bytes, self.fingerprint
        _ = self._chat if self.is_chat else None


def _open_tokens(place: dict) -> TokenFile:
    if "split" in place:
        return open_split(Path(place["folder"]), place["split"], place["vocab_size"])
    return open_megatron(Path(place["index"]))


class Packed:
    """Documents in a shuffled order, back to back, cut into windows of L + 1 tokens, every token predicted once."""

    def __init__(self, corpus: Corpus, split: str, seq_len: int, seed: int, domain: int | None = None) -> None:
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        self.tokens = corpus.tokens(split)
        table = corpus.documents(split)
        if domain is not None:
            table = table[table[:, 2] == domain]
        self.table = table[np.random.Generator(np.random.Philox([seed, 0])).permutation(len(table))]
        self.begins = np.cumsum(self.table[:, 1]) - self.table[:, 1]  # of each document in the packed stream
        self.num_tokens = int(self.table[:, 1].sum())
        self.num_windows = max(0, (self.num_tokens - 1) // seq_len)

    def window(self, number: int) -> tuple[NDArray, NDArray, NDArray]:
        """Tokens, domains and document numbers [L + 1] of the stream from `number` · L on."""
        begin, end = number * self.seq_len, number * self.seq_len + self.seq_len + 1
        first = int(np.searchsorted(self.begins, begin, side="right")) - 1
        last = int(np.searchsorted(self.begins, end, side="left"))
        tokens, domains, numbers = [], [], []
        for document in range(first, last):
            start, length, domain = self.table[document]
            low = max(0, begin - int(self.begins[document]))
            high = min(int(length), end - int(self.begins[document]))
            tokens.append(self.tokens[start + low : start + high])
            domains.append(np.full(high - low, domain))
            numbers.append(np.full(high - low, document))
        return np.concatenate(tokens).astype(np.int64), np.concatenate(domains), np.concatenate(numbers)

    def windows(self, numbers: list[int]) -> Sequences:
        """[B, L + 1] of each; B may be 0."""
        return stack_windows([self.window(number) for number in numbers], self.seq_len)


def stack_windows(windows: Sequence[tuple[NDArray, ...]], seq_len: int) -> Sequences:
    """[B, L + 1] of windows of tokens, domains and document numbers [L + 1] each; B may be 0."""
    if not windows:
        empty = np.zeros((0, seq_len + 1), np.int64)
        return Sequences(empty, empty, empty)
    return Sequences(*(np.stack(part) for part in zip(*windows, strict=True)))


class Samples(Protocol):
    """Training sequences by their global number: the same ones whoever asks."""

    def samples(self, begin: int, end: int) -> Sequences:
        """[B, L + 1] of each: the global samples `begin` to `end` - 1; B may be 0."""
        ...

    def count_tokens(self, end: int) -> int:
        """Returns the tokens that go in, without padding, of the global samples before `end`."""
        ...


class Loader(Packed):
    """Training sequences, of one domain if it is given: epoch after epoch, each in its own order of windows."""

    def __init__(self, corpus: Corpus, seq_len: int, seed: int, domain: int | None = None) -> None:
        super().__init__(corpus, "train", seq_len, seed, domain)
        if not self.num_windows:
            raise ConfigError(f"train.seq_len={seq_len}: must be below the {len(self.tokens)} tokens of the corpus")
        self._order = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        return np.random.Generator(np.random.Philox([self.seed, 1 + epoch])).permutation(self.num_windows)

    def samples(self, begin: int, end: int) -> Sequences:
        epochs = (divmod(index, self.num_windows) for index in range(begin, end))
        found = self.windows([int(self._order(epoch)[place]) for epoch, place in epochs])
        return replace(found, sample=np.arange(begin, end))

    def count_tokens(self, end: int) -> int:
        """Returns the tokens of the global samples before `end`."""
        return end * self.seq_len


class DomainBlocks:
    """Every `block` consecutive samples are of one domain: with micro-batches of that size, each holds a single one.

    An epoch is every domain's full blocks, in a random order: domains come in proportion to their tokens. Which windows
    make up a domain's blocks is drawn anew every epoch, so that no window is left over for good.
    """

    def __init__(self, corpus: Corpus, seq_len: int, seed: int, block: int) -> None:
        self.domains = [Packed(corpus, "train", seq_len, seed, domain) for domain in range(len(corpus.domains))]
        for name, packed in zip(corpus.domains, self.domains, strict=True):
            if packed.num_windows < block:
                rule = f"must be at most {packed.num_windows}, the sequences of {seq_len} tokens in the domain {name!r}"
                raise ConfigError(f"data.domain_block={block}: {rule}")
        self.seed, self.block = seed, block
        self.blocks = np.array(
            [(d, n) for d, packed in enumerate(self.domains) for n in range(packed.num_windows // block)]
        )
        self._epoch = lru_cache(maxsize=2)(self._orders)

    def _orders(self, epoch: int) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
        """(domain, block of it) in their order, and every domain's windows in theirs."""
        draw = np.random.Generator(np.random.Philox([self.seed, 1 + epoch]))
        return draw.permutation(self.blocks), [draw.permutation(packed.num_windows) for packed in self.domains]

    def samples(self, begin: int, end: int) -> Sequences:
        found = [self.domains[0].windows([]), *map(self._window, range(begin, end))]
        parts = zip(*((s.tokens, s.domain, s.document) for s in found), strict=True)
        tokens, domain, document = map(np.concatenate, parts)
        return Sequences(tokens, domain, document, np.arange(begin, end))

    def count_tokens(self, end: int) -> int:
        """Returns the tokens of the global samples before `end`."""
        return end * self.domains[0].seq_len

    def _window(self, index: int) -> Sequences:
        number, place = divmod(index, self.block)
        epoch, turn = divmod(number, len(self.blocks))
        order, windows = self._epoch(epoch)
        domain, block = order[turn]
        return self.domains[domain].windows([int(windows[domain][block * self.block + place])])


class MixtureLoader:
    """Training sequences of `data=tokens`, in the proportions of its sources; `data.domain_block` consecutive ones are
    of one source."""

    def __init__(self, corpus: Corpus, config: Config) -> None:
        """Raises `ConfigError` where a source is too small, or the run needs more passes over it than it allows."""
        self.seq_len, block = config.train.seq_len, config.data.domain_block
        sources = []
        for number, entry in enumerate(corpus.manifest["sources"]):
            streams = tuple(corpus.streams(number, "train", self.seq_len))
            sources.append(Source(entry["name"], entry["weight"], entry["epochs"], streams))
            _check_source(sources[-1], self.seq_len, block)
        self.mixture = Mixture(sources, config.train.seed, block or 1)
        samples = config.train.steps * config.train.global_batch
        for source, passes in zip(sources, self.mixture.passes(samples), strict=True):
            if source.weight is not None and source.epochs is not None and passes > source.epochs:
                rule = f"with its weight {config.train.steps:,} steps take {passes:.2f} epochs of it"
                raise ConfigError(f"data.sources.{source.name}.epochs={source.epochs:g}: {rule}")

    def samples(self, begin: int, end: int) -> Sequences:
        windows = [self.mixture.window(sample) for sample in range(begin, end)]
        return replace(stack_windows(windows, self.seq_len), sample=np.arange(begin, end))

    def count_tokens(self, end: int) -> int:
        """Returns the tokens of the global samples before `end`."""
        return end * self.seq_len


def _check_source(source: Source, seq_len: int, block: int | None) -> None:
    if not source.num_windows:
        rule = f"no file of data.sources.{source.name} has training documents of so many tokens together"
        raise ConfigError(f"train.seq_len={seq_len}: {rule}")
    if block is not None and source.num_windows < block:
        rule = f"must be at most {source.num_windows}, the sequences of {seq_len} tokens in data.sources.{source.name}"
        raise ConfigError(f"data.domain_block={block}: {rule}")
    if block is not None and len({label for stream in source.streams for label in stream.labels}) > 1:
        rule = f"data.sources.{source.name} has several domains; data.sources.{source.name}.domain=NAME makes them one"
        raise ConfigError(f"data.domain_block={block}: {rule}")
