"""Sequences of `data=chat`: conversations packed into rows, or one a row, as a pure function of the sample's number;
preference pairs in pairs of rows.

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
    """Conversations of a split, of one source or domain if it is given, in rows of `seq_len` + 1 tokens.

    A window is one row; or, of pairs, two: the chosen conversations of some pairs and, in the same order, the rejected
    ones. The numbers of documents in them are those of the pairs in the split.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: str,
        config: Config,
        source: int | None = None,
        domain: int | None = None,
    ) -> None:
        """Every token is a target, not only the assistant's, under `train.objective=lm`; pairs come under `dpo`, and of
        pairs the chosen conversations alone under the others.

        Raises `ConfigError` where conversations are longer than a row and `data.too_long` is `error`.
        """
        options, self.seq_len = _options(config), config.train.seq_len
        self._learns_all = config.train.objective == "lm"
        self._tokens, self._target = corpus.tokens(split), corpus.targets(split)
        self.is_paired = config.train.objective == "dpo"
        halves = 2 if corpus.has_pairs else 1
        table, origin = (x.reshape(-1, halves, 3) for x in (corpus.documents(split), corpus.origins(split)))
        table = table if self.is_paired else table[:, :1]  # [n, halves, 3]
        taken = np.ones(len(table), bool)
        if source is not None:
            taken &= origin[:, 0, 0] == source
        if domain is not None:
            taken &= table[:, 0, 2] == domain
        is_long = taken & (table[:, :, 1] > self.seq_len + 1).any(1)
        self.num_long = int(is_long.sum())
        if self.num_long and options.too_long == "error":
            raise _too_long(corpus, table, origin, is_long, self.seq_len, self.what)
        if options.too_long == "skip":
            taken &= ~is_long
        sizes = np.minimum(table[:, :, 1], self.seq_len + 1)
        learned = np.array([self._is_learned(*each) for each in zip(table[taken], sizes[taken], strict=True)], bool)
        self.num_empty = int((~learned).sum())  # what is cut off was all that they were to teach
        self.numbers = np.flatnonzero(taken)[learned]  # of the conversations or pairs in the split
        self._table, self.document_sizes = table[self.numbers], sizes[self.numbers]  # as far as they are kept
        self.labels = np.unique(self._table[:, 0, 2])
        longest = self.document_sizes.max(1).tolist() if len(self.document_sizes) else []
        self.members = pack(longest, self.seq_len + 1) if options.pack else [[n] for n in range(len(longest))]
        self.sizes = [
            (self.document_sizes[row] - 1).sum(0).tolist() for row in self.members
        ]  # tokens that go in, of each row

    @property
    def what(self) -> str:
        """What a person calls its documents."""
        return "pairs" if self.is_paired else "conversations"

    def _is_learned(self, halves: NDArray[np.int64], sizes: NDArray[np.int64]) -> bool:
        """Whether something is left to learn of every half, and the halves of a pair are not the same."""
        parts = [slice(begin, begin + size) for (begin, _, _), size in zip(halves, sizes, strict=True)]
        if not all(self._learns_all or self._target[part].any() for part in parts):
            return False
        return len(parts) == 1 or not np.array_equal(self._tokens[parts[0]], self._tokens[parts[1]])

    @property
    def num_documents(self) -> int:
        """Conversations or pairs that are not left out."""
        return len(self._table)

    @property
    def num_windows(self) -> int:
        """Windows of one pass."""
        return len(self.members)

    def window(self, number: int) -> Window:
        """Tokens, domains, document numbers and targets [rows, L + 1] of a window."""
        shape = self._table.shape[1], self.seq_len + 1
        tokens, domains = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        documents, target = np.full(shape, -1), np.zeros(shape, bool)
        for half in range(len(tokens)):
            at = 0
            for place, member in enumerate(self.members[number]):
                (begin, _, domain), size = self._table[member, half], self.document_sizes[member, half]
                tokens[half, at : at + size] = self._tokens[begin : begin + size]
                target[half, at : at + size] = self._learns_all or self._target[begin : begin + size]
                target[half, at] = False
                domains[half, at:] = domain
                documents[half, at : at + size - 1] = self.numbers[member] if self.is_paired else place
                at += size
        return tokens, domains, documents, target

    def windows(self, numbers: Sequence[int]) -> Sequences:
        """[B, L + 1] of the rows of each; B may be 0."""
        return stack_rows([self.window(number) for number in numbers], self.seq_len)


class ChatLoader:
    """Training sequences of `data=chat`, in the proportions of its sources."""

    def __init__(self, corpus: Corpus, config: Config) -> None:
        """Raises `ConfigError` where a source has nothing to train on, or is not what is to be learned from."""
        self.seq_len, options = config.train.seq_len, _options(config)
        sources = list_sources(config.data)
        if config.train.objective == "dpo" and not corpus.has_pairs:
            places = ", ".join(source.path for source in sources.values())
            raise ConfigError(f'train.objective=dpo: needs rows with "chosen" and "rejected", and {places} has none')
        self._only_chosen = corpus.has_pairs and config.train.objective != "dpo"
        self.rows = [Rows(corpus, "train", config, number) for number in range(len(sources))]
        self._halves = 2 if config.train.objective == "dpo" else 1
        Rows(corpus, "held_out", config)  # it may be too long as well, and is read at the end
        for (name, source), rows in zip(sources.items(), self.rows, strict=True):
            if not rows.num_windows:
                rule = f"must leave one of the {rows.what} of {name} ({source.path}) that has something to learn"
                raise ConfigError(f"data.too_long={options.too_long}: {rule}")
        named = zip(sources.items(), self.rows, strict=True)
        mixed = [Source(name, source.weight, source.epochs, (rows,)) for (name, source), rows in named]
        self._mixture = Mixture(mixed, config.train.seed, (config.data.domain_block or 1) // self._halves or 1)
        self._counted = 0, 0  # samples, tokens
        self._too_long = options.too_long

    def samples(self, begin: int, end: int) -> Sequences:
        """[B, L + 1] of each: the global samples `begin` to `end` - 1; B may be 0. Samples 2n and 2n + 1 are the chosen
        and the rejected conversations of the same pairs."""
        places = (divmod(sample, self._halves) for sample in range(begin, end))
        rows = [tuple(x[[half]] for x in self._mixture.window(number)) for number, half in places]
        found = stack_rows(rows, self.seq_len)
        return Sequences(found.tokens, found.domain, found.document, np.arange(begin, end), found.target)

    def count_tokens(self, end: int) -> int:
        """Returns the tokens that go in, without padding, of the global samples before `end`."""
        begin, total = self._counted if self._counted[0] <= end else (0, 0)
        for sample in range(begin, end):
            number, half = divmod(sample, self._halves)
            source, row = self._mixture.place(number)
            total += self.rows[source].sizes[row][half]
        self._counted = end, total
        return total

    def describe(self) -> list[str]:
        """Lines that say how conversations or pairs became rows."""
        what, count = self.rows[0].what, sum(r.num_documents for r in self.rows)
        rows = sum(r.num_windows for r in self.rows) * self._halves
        tokens, too_long = sum(sum(map(sum, r.sizes)) for r in self.rows), sum(r.num_long for r in self.rows)
        full = tokens / (rows * self.seq_len)
        lines = [f"{count:,} {what} in {rows:,} rows of {self.seq_len:,} tokens, {full:.0%} full"]
        if self._only_chosen:
            lines.append("the rows are pairs: their chosen conversations are learned, the rejected ones are not read")
        if too_long:
            done = "cut" if self._too_long == "cut" else "left out"
            lines.append(f"data.too_long={self._too_long}: {too_long:,} {what} are longer than a row and {done}")
        if empty := sum(r.num_empty for r in self.rows):
            lines.append(f"data.too_long=cut: {empty:,} of them have nothing left to learn and are left out")
        return lines


def held_out_rows(corpus: Corpus, config: Config, domain: int) -> Rows:
    """The held-out conversations or pairs of a domain."""
    return Rows(corpus, "held_out", config, domain=domain)


def stack_rows(windows: Sequence[Window], seq_len: int) -> Sequences:
    """[B, L + 1] of the rows of windows; B may be 0."""
    if not windows:
        empty = np.zeros((0, seq_len + 1), np.int64)
        return Sequences(empty, empty, empty, target=empty.astype(bool))
    tokens, domain, document, target = (np.concatenate(part) for part in zip(*windows, strict=True))
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


def _too_long(
    corpus: Corpus, table: NDArray, origin: NDArray, is_long: NDArray, seq_len: int, what: str
) -> ConfigError:
    sizes = table[:, :, 1].max(1)
    longest = int(np.argmax(np.where(is_long, sizes, 0)))
    _, file, line = origin[longest, 0]
    where = f"{corpus.manifest['chat']['files'][file]}:{line}"
    said = f"{int(is_long.sum()):,} {what} are longer than train.seq_len + 1 = {seq_len + 1:,} tokens"
    advice = "cut keeps their beginning, skip leaves them out"
    return ConfigError(f"data.too_long=error: {said}, the longest {where} with {sizes[longest]:,}; {advice}")
