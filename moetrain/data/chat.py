"""`data=chat`: conversations become tokens, and a mask of those that the assistant says.

A prepared corpus as that of data/prepare.py, its documents being conversations, and besides: `train.target.bin` and
`held_out.target.bin` (uint8 per token: whether it is to be predicted), `train.rows.npy` and `held_out.rows.npy`
([documents, 3]: source, file, line or row), `chat_template.jinja`. Of preference pairs, documents 2n and 2n + 1 are the
chosen and the rejected conversation of a pair, and the manifest says so. Conversations are read, encoded and written
one by one; only where the tokenizer has to be trained are all of them held in memory.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from rich.progress import Progress, TimeElapsedColumn
from tokenizers import Tokenizer

from moetrain.common import disk
from moetrain.common.console import console
from moetrain.common.extensions import ChatSource
from moetrain.config import ConfigError, Data
from moetrain.data import files, sources, tokenizer
from moetrain.data.chat_files import list_sources, read_conversations
from moetrain.data.chat_rows import Conversation, PreferencePair
from moetrain.data.chat_template import TEMPLATE_FILES, ChatTemplate, EncodedConversation
from moetrain.data.corpus import COPIES, FINGERPRINTS, domain_name, hash_text
from moetrain.data.files import BadText, LeftOut
from moetrain.data.manifest import SPLITS, VERSION

ARRANGED = (
    "sources",
    "chat_template",
    "pack",
    "too_long",
)  # options that do not change what is prepared, or `identify`
DOMAIN = "chat"  # of conversations whose row, folder and source name none


class Row(NamedTuple):
    """A conversation, or the two of a pair, on its way into a split."""

    encoded: tuple[EncodedConversation, ...]
    domain: int
    origin: tuple[int, int, int]  # source, file, line or row
    key: str  # by which it is held out or not


def prepare_chat(options: Data, folder: Path) -> None:
    """Write the conversations of `data.path` or `data.sources` into `folder`. Raises `ConfigError`."""
    found, left_out, seen = list_sources(options), LeftOut(), sources.listing(options)
    with ExitStack() as stack:
        columns = (*Progress.get_default_columns(), TimeElapsedColumn())
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        chosen = tokenizer.read(options.tokenizer) if options.tokenizer else _train(options, found, progress)
        template = ChatTemplate.open(options, chosen)
        writers = {
            split: _ConversationWriter(folder, split, tokenizer.vocabulary_size(chosen), stack) for split in SPLITS
        }
        domains, paths = _Numbers(), _Numbers()
        waiting: dict[tuple[int, str], Row] = {}  # the last of every domain and split, which may have to change sides
        task = progress.add_task("reading conversations", total=None)
        for number, row in enumerate(_read(options, found, template, left_out, domains, paths), 1):
            split = SPLITS[hash_text(row.key.encode()) < options.held_out * 2**32]
            if (before := waiting.get((row.domain, split))) is not None:
                writers[split].write(before)
            waiting[row.domain, split] = row
            progress.update(task, advance=1, description=f"reading conversations ({number:,})")
        if not waiting:
            said = "".join(f"; {line}" for line in left_out.lines())
            raise ConfigError(f"{sources.place(options)}: must have a conversation that is not left out{said}")
        has_pairs = any(len(row.encoded) == 2 for row in waiting.values())
        for (domain, split), row in sorted(waiting.items(), key=lambda item: (item[0][1] != "held_out", item[0])):
            other = SPLITS[split == SPLITS[0]]
            is_missing = (domain, other) not in waiting
            if is_missing and not writers[split].has(domain):
                name = domains.names[domain]
                raise ConfigError(f"{sources.place(options)}: {name} must have two conversations; one is held out")
            writers[other if is_missing else split].write(row)
    order = np.argsort(domains.names)
    places = np.argsort(order)
    manifest = {
        "version": VERSION,
        "domains": sorted(domains.names),
        "vocab_size": tokenizer.vocabulary_size(chosen),
        "end_of_text": template.end_token,
        "splits": {split: writer.finish(places, domains.names) for split, writer in writers.items()},
        "left_out": left_out.found,
        "one_document": [],
        "notes": template.notes,
        "chat": {"sources": list(found), "files": paths.names, "pairs": has_pairs},
    }
    for line in (*left_out.lines(), *template.notes):
        console.print(line)
    (folder / "tokenizer.json").write_text(chosen.to_str(), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template.text, encoding="utf-8")
    sources.record(folder, options, seen)
    disk.write(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def identify(options: Data) -> dict[str, Any]:
    """What else than the common settings tells one prepared corpus from another: its sources and the template."""
    found = {name: [os.path.abspath(source.path), source.domain] for name, source in list_sources(options).items()}
    own = getattr(options, "chat_template", None)
    beside = Path(options.tokenizer).parent if options.tokenizer is not None else None
    paths = [Path(own)] if own else [beside / name for name in TEMPLATE_FILES] if beside else []
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()]
    return {"conversations": found, "template": digests}


class _Numbers:
    """Names by the order of their first use."""

    def __init__(self) -> None:
        self._found: dict[str, int] = {}

    def number(self, name: str) -> int:
        return self._found.setdefault(name, len(self._found))

    @property
    def names(self) -> list[str]:
        return list(self._found)


def _read(
    options: Data,
    found: dict[str, ChatSource],
    template: ChatTemplate,
    left_out: LeftOut,
    domains: _Numbers,
    paths: _Numbers,
) -> Iterator[Row]:
    """Yields what is taken of all sources; counts what is not. Raises `ConfigError` for what is bad."""
    same_text, taken, copies = FINGERPRINTS[options.dedup], dict[str, int](), dict[bytes, str]()
    kind: type | None = None
    for number, (conversation, domain) in enumerate_sources(options, found, left_out):
        try:
            kind = kind or type(conversation)
            if kind is not type(conversation):
                rule = 'rows must be pairs of "chosen" and "rejected" or conversations, not both'
                raise BadText(conversation.where, rule)
            encoded = _encode(conversation, template)
        except BadText as error:
            files.refuse_or_skip(error, options.on_bad, left_out)
            continue
        text = "\0".join(each.text for each in encoded)
        key = conversation.prompt_text if isinstance(conversation, PreferencePair) else text
        if (print_ := same_text(text)) in copies and options.dedup != "none":
            left_out.add(COPIES[options.dedup], f"{conversation.where}, as {copies[print_]}")
            continue
        copies[print_] = conversation.where
        size, limit = len(text.encode()), options.max_bytes_per_domain
        if limit is not None and taken.get(domain, 0) + size > limit:
            left_out.add("beyond data.max_bytes_per_domain", conversation.where)
            continue
        taken[domain] = taken.get(domain, 0) + size
        file, _, line = conversation.where.rpartition(":")
        yield Row(encoded, domains.number(domain), (number, paths.number(file), int(line)), key)


def _encode(row: Conversation | PreferencePair, template: ChatTemplate) -> tuple[EncodedConversation, ...]:
    """Raises `BadText` where the template refuses the row, or there is nothing in it to learn."""
    each = (row.chosen, row.rejected) if isinstance(row, PreferencePair) else (row,)
    encoded = tuple(template.encode(conversation) for conversation in each)
    if not all(one.target.any() for one in encoded):
        raise BadText(row.where, "the chat template marks nothing of it as the assistant's")
    if len(encoded) == 2 and np.array_equal(encoded[0].tokens, encoded[1].tokens):
        raise BadText(row.where, '"chosen" and "rejected" must differ, and are the same in the chat template')
    return encoded


def enumerate_sources(
    options: Data, found: dict[str, ChatSource], left_out: LeftOut
) -> Iterator[tuple[int, tuple[Conversation | PreferencePair, str]]]:
    """Yields (number of the source, (conversation or pair, name of its domain))."""
    for number, (name, source) in enumerate(found.items()):
        if not Path(source.path).exists():
            raise ConfigError(f"data.sources.{name}.path={source.path}: there is no such file or folder")
        for conversation in read_conversations(Path(source.path), options.on_bad, left_out):
            fallback = DOMAIN if options.path is not None else name
            yield number, (conversation, domain_name(source.domain or conversation.domain or fallback))


def _train(options: Data, found: dict[str, ChatSource], progress: Progress) -> Tokenizer:
    """A tokenizer learned from what the conversations say."""
    texts = [row.learned_text for _, (row, _) in enumerate_sources(options, found, LeftOut())]
    return tokenizer.train(options, texts, len(texts), sum(map(len, texts)), progress)


class _ConversationWriter:
    """The files of one split."""

    def __init__(self, folder: Path, split: str, vocab_size: int, stack: ExitStack) -> None:
        """`stack`: closes the files, whatever happens."""
        self._folder, self._split = folder, split
        self._dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self._tokens: IO[bytes] = stack.enter_context((folder / f"{split}.bin").open("wb"))
        self._target: IO[bytes] = stack.enter_context((folder / f"{split}.target.bin").open("wb"))
        self._table: list[tuple[int, int, int]] = []
        self._origin: list[tuple[int, int, int]] = []
        self._digest, self._start, self._bytes, self._targets = hashlib.sha256(), 0, 0, 0

    def has(self, domain: int) -> bool:
        """Whether a conversation of the domain is written already."""
        return any(row[2] == domain for row in self._table)

    def write(self, row: Row) -> None:
        """Add a conversation, or the two of a pair."""
        for each in row.encoded:
            tokens, target = each.tokens.astype(self._dtype).tobytes(), each.target.astype(np.uint8).tobytes()
            for stream, raw in ((self._tokens, tokens), (self._target, target)):
                stream.write(raw)
                self._digest.update(raw)
            self._table.append((self._start, len(each.tokens), row.domain))
            self._origin.append(row.origin)
            self._start += len(each.tokens)
            self._targets += int(each.target.sum())
            self._bytes += len(each.text.encode())

    def finish(self, places: Any, names: list[str]) -> dict[str, Any]:
        """Write the tables; returns what the manifest says of the split. `places[domain]`: its number by name."""
        table = np.array(self._table, np.int64).reshape(-1, 3)
        counts = {name: int(table[table[:, 2] == n, 1].sum()) for n, name in enumerate(names)}
        table[:, 2] = places[table[:, 2]]
        np.save(self._folder / f"{self._split}.docs.npy", table)
        np.save(self._folder / f"{self._split}.rows.npy", np.array(self._origin, np.int64).reshape(-1, 3))
        facts = {"documents": len(table), "tokens": self._start, "targets": self._targets, "bytes": self._bytes}
        return {**facts, "tokens_per_domain": dict(sorted(counts.items())), "sha256": self._digest.hexdigest()}
