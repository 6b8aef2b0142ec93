"""Sequences of `data=chat`: conversations packed into rows, or one a row, as a pure function of the sample's number.

The last token of a conversation is predicted and does not go in: as an input it counts as padding, so that what goes
in, and every statistic of it, is the same however conversations are packed.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.common.extensions import ChatOptions
from moetrain.config import Config, ConfigError
from moetrain.config.core_options import corpus_options
from moetrain.data.chat_files import list_sources
from moetrain.data.loader import Corpus, Sequences
from moetrain.data.mixture import Mixture, Source

Window = tuple[NDArray[Any], ...]  # tokens, domains, document numbers, targets


class Rows:
    """Conversations of a split, of one source or domain if it is given, in rows of `seq_len` + 1 tokens."""

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        seq_len: int,
        options: ChatOptions,
        source: int | None = None,
        domain: int | None = None,
        learns_all: bool = False,
    ) -> None:
        """`learns_all`: every token is a target, not only the assistant's.

        Raises `ConfigError` where conversations are longer than a row and `data.too_long` is `error`.
        """
        self._learns_all = learns_all
        self.seq_len, self._tokens, self._target = seq_len, corpus.tokens(split), corpus.targets(split)
        table, origin = corpus.documents(split), corpus.origins(split)
        taken = np.ones(len(table), bool)
        if source is not None:
            taken &= origin[:, 0] == source
        if domain is not None:
            taken &= table[:, 2] == domain
        is_long = taken & (table[:, 1] > seq_len + 1)
        self.num_long = int(is_long.sum())
        if self.num_long and options.too_long == "error":
            raise _too_long(corpus, table, origin, is_long, seq_len)
        if options.too_long == "skip":
            taken &= ~is_long
        self._table = table[taken].copy()
        self._table[:, 1] = np.minimum(self._table[:, 1], seq_len + 1)
        learned = np.array([learns_all or self._target[b : b + size].any() for b, size, _ in self._table], bool)
        self.num_empty = int((~learned).sum())  # what is cut off was all that they were to teach
        self._table = self._table[learned]
        self.labels = np.unique(self._table[:, 2])
        sizes = self._table[:, 1].tolist()
        self._rows = pack(sizes, seq_len + 1) if options.pack else [[n] for n in range(len(sizes))]
        self.sizes = [sum(sizes[n] - 1 for n in row) for row in self._rows]  # tokens that go in

    @property
    def num_conversations(self) -> int:
        """Those that are not left out."""
        return len(self._table)

    @property
    def num_windows(self) -> int:
        """Rows of one pass."""
        return len(self._rows)

    def window(self, number: int) -> Window:
        """Tokens, domains, document numbers and targets [L + 1] of a row."""
        tokens, domains = np.zeros(self.seq_len + 1, np.int64), np.zeros(self.seq_len + 1, np.int64)
        documents, target = np.full(self.seq_len + 1, -1), np.zeros(self.seq_len + 1, bool)
        at = 0
        for place, conversation in enumerate(self._rows[number]):
            begin, size, domain = self._table[conversation]
            tokens[at : at + size] = self._tokens[begin : begin + size]
            target[at : at + size] = self._learns_all or self._target[begin : begin + size]
            target[at] = False
            domains[at:] = domain
            documents[at : at + size - 1] = place
            at += size
        return tokens, domains, documents, target

    def windows(self, numbers: Sequence[int]) -> Sequences:
        """[B, L + 1] of each; B may be 0."""
        return stack_rows([self.window(number) for number in numbers], self.seq_len)


class ChatLoader:
    """Training sequences of `data=chat`, in the proportions of its sources."""

    def __init__(self, corpus: Corpus, config: Config) -> None:
        """Raises `ConfigError` where a source has nothing to train on."""
        self.seq_len, options = config.train.seq_len, _options(config)
        sources = list_sources(config.data)
        self._rows = [
            Rows(corpus, "train", self.seq_len, options, number, learns_all=config.train.objective == "lm")
            for number in range(len(sources))
        ]
        Rows(corpus, "held_out", self.seq_len, options)  # it may be too long as well, and is read at the end
        for (name, source), rows in zip(sources.items(), self._rows, strict=True):
            if not rows.num_windows:
                rule = f"must leave a conversation of {name} ({source.path}) that has something to learn"
                raise ConfigError(f"data.too_long={options.too_long}: {rule}")
        named = zip(sources.items(), self._rows, strict=True)
        mixed = [Source(name, source.weight, source.epochs, (rows,)) for (name, source), rows in named]
        self._mixture = Mixture(mixed, config.train.seed, config.data.domain_block or 1)
        self._counted = 0, 0  # samples, tokens
        self._too_long = options.too_long

    def samples(self, begin: int, end: int) -> Sequences:
        """[B, L + 1] of each: the global samples `begin` to `end` - 1; B may be 0."""
        found = stack_rows([self._mixture.window(sample) for sample in range(begin, end)], self.seq_len)
        return Sequences(found.tokens, found.domain, found.document, np.arange(begin, end), found.target)

    def count_tokens(self, end: int) -> int:
        """Returns the tokens that go in, without padding, of the global samples before `end`."""
        begin, total = self._counted if self._counted[0] <= end else (0, 0)
        for sample in range(begin, end):
            source, row = self._mixture.place(sample)
            total += self._rows[source].sizes[row]
        self._counted = end, total
        return total

    def describe(self) -> list[str]:
        """Lines that say how conversations became rows."""
        conversations, rows = sum(r.num_conversations for r in self._rows), sum(r.num_windows for r in self._rows)
        tokens, too_long = sum(sum(r.sizes) for r in self._rows), sum(r.num_long for r in self._rows)
        full = tokens / (rows * self.seq_len)
        lines = [f"{conversations:,} conversations in {rows:,} rows of {self.seq_len:,} tokens, {full:.0%} full"]
        if too_long:
            what = "cut" if self._too_long == "cut" else "left out"
            lines.append(f"data.too_long={self._too_long}: {too_long:,} conversations are longer than a row and {what}")
        if empty := sum(r.num_empty for r in self._rows):
            lines.append(f"data.too_long=cut: {empty:,} of them have nothing left to learn and are left out")
        return lines


def held_out_rows(corpus: Corpus, config: Config, domain: int) -> Rows:
    """The held-out conversations of a domain."""
    learns_all = config.train.objective == "lm"
    return Rows(corpus, "held_out", config.train.seq_len, _options(config), domain=domain, learns_all=learns_all)


def stack_rows(windows: Sequence[Window], seq_len: int) -> Sequences:
    """[B, L + 1] of windows; B may be 0."""
    if not windows:
        empty = np.zeros((0, seq_len + 1), np.int64)
        return Sequences(empty, empty, empty, target=empty.astype(bool))
    tokens, domain, document, target = (np.stack(part) for part in zip(*windows, strict=True))
    return Sequences(tokens, domain, document, target=target)


def pack(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Returns rows of indices whose sizes sum to at most `room`: best fit, the longest first (Krell et al., "Efficient
    Sequence Packing without Cross-contamination", 2021). Sizes are at most `room`."""
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = defaultdict(list)  # by the room that is left
    rooms: list[int] = []  # keys of `open_rows` that have a row, ascending
    for index in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        size = sizes[index]
        place = bisect_left(rooms, size)
        if place == len(rooms):
            number, left = len(rows), room - size
            rows.append([])
        else:
            left = rooms[place] - size
            number = open_rows[rooms[place]].pop()
            if not open_rows[rooms[place]]:
                del rooms[place]
        rows[number].append(index)
        if left > 1:  # a conversation has two tokens or more
            if not open_rows[left]:
                insort(rooms, left)
            open_rows[left].append(number)
    return rows


def _options(config: Config) -> ChatOptions:
    found: ChatOptions = corpus_options(config.data)  # type: ignore[assignment]
    return found


def _too_long(corpus: Corpus, table: NDArray, origin: NDArray, is_long: NDArray, seq_len: int) -> ConfigError:
    longest = int(np.argmax(np.where(is_long, table[:, 1], 0)))
    _, file, line = origin[longest]
    where = f"{corpus.manifest['chat']['files'][file]}:{line}"
    said = f"{int(is_long.sum()):,} conversations are longer than train.seq_len + 1 = {seq_len + 1:,} tokens"
    advice = "cut keeps their beginning, skip leaves them out"
    return ConfigError(f"data.too_long=error: {said}, the longest {where} with {table[longest, 1]:,}; {advice}")
