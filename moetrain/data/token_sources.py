"""The sources of `data=tokens` before a run: found, read through once, checked against the tokenizer, described.

What is described is a folder with `manifest.json`, `mixture.json` (the sources without their places: names, weights,
documents, digests), `tokenizer.json` and `sources.json`. The tokens stay where they are. What reading a file through
found is kept by its size and time in `data.dir/token-files`, so that another mixture of the same files is quick.
"""

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import DownloadColumn, Progress, TimeElapsedColumn
from tokenizers import Tokenizer

from moetrain.common import disk
from moetrain.common.console import console
from moetrain.common.extensions import TokenSource, read_sources
from moetrain.config import ConfigError, Data
from moetrain.data import sources, tokenizer
from moetrain.data.corpus import domain_name
from moetrain.data.files import BadText
from moetrain.data.manifest import MIXTURE, SPLITS, VERSION, problem
from moetrain.data.token_files import CHUNK, TokenFile, check_megatron, find_indexes, open_megatron

SCANNED = "token-files"  # below `data.dir`
MOST_ENDS = 16  # of the tokens that documents end in, the most frequent ones are kept


class SourceShare(NamedTuple):
    """Documents of one file of a source: all of a split that `moetrain data` prepared, or some of Megatron's."""

    split: str
    place: dict[str, Any]  # how `loader.Corpus` opens it
    domains: list[str]
    documents: int
    tokens: int
    tokens_per_domain: dict[str, int]
    digest: str


def prepare_sources(options: Data, folder: Path) -> None:
    """Write the description of `data.sources` into `folder`. Raises `ConfigError` for what a source is not."""
    found = read_sources(getattr(options, "sources", None) or {}, TokenSource)
    seen = sources.listing(options)
    indexes = {name: _find(name, "path", source.path) for name, source in found.items()}
    chosen = _choose_tokenizer(options, indexes)
    facts = _scan_all(options, [*itertools.chain(*indexes.values()), *_held_out_indexes(found)])
    parts, notes = {}, []
    for name, source in found.items():
        if indexes[name][0].suffix == ".idx":
            parts[name] = _megatron_parts(name, source, indexes[name], options.held_out, facts)
            notes += _check_tokens(name, [*indexes[name], *_held_out_indexes({name: source})], facts, chosen)
        else:
            parts[name] = _prepared_parts(name, source, indexes[name][0].parent, chosen)
    _write(folder, found, parts, notes, chosen)
    sources.record(folder, options, seen, {str(Path(p).relative_to("/")): f["sha256"] for p, f in facts.items()})


def _find(name: str, field: str, place: str) -> list[Path]:
    found = find_indexes(Path(place).absolute())
    if not found or (field == "held_out" and found[0].suffix != ".idx"):
        what = "" if field == "held_out" else "a folder prepared by `moetrain data`, "
        rule = f"must be {what}Megatron's PREFIX of a .bin and an .idx, or a folder of these"
        raise ConfigError(f"data.sources.{name}.{field}={place}: {rule}")
    return found


def _held_out_indexes(found: dict[str, TokenSource]) -> list[Path]:
    return [p for name, source in found.items() if source.held_out for p in _find(name, "held_out", source.held_out)]


def _choose_tokenizer(options: Data, indexes: dict[str, list[Path]]) -> Tokenizer:
    """`data.tokenizer`, or that of the first source that was prepared with one."""
    if options.tokenizer is not None:
        return tokenizer.read(options.tokenizer)
    for found in indexes.values():
        if found[0].suffix != ".idx":
            return tokenizer.read(str(found[0].with_name("tokenizer.json")))
    rule = f"must be the tokenizer.json that made the tokens of data.sources.{next(iter(indexes))}"
    raise ConfigError(f"data.tokenizer=null: {rule}")


def _prepared_parts(name: str, source: TokenSource, folder: Path, chosen: Tokenizer) -> list[SourceShare]:
    field = f"data.sources.{name}.path={source.path}"
    if source.held_out is not None:
        rule = "has no effect: the folder was prepared with a held-out part"
        raise ConfigError(f"data.sources.{name}.held_out={source.held_out}: {rule}")
    if said := problem(folder):
        raise ConfigError(f"{field}: {said}")
    manifest = json.loads((folder / "manifest.json").read_text())
    if "sources" in manifest:
        raise ConfigError(f"{field}: is a description of data=tokens, which holds no tokens; name its sources instead")
    if tokenizer.read(str(folder / "tokenizer.json")).to_str() != chosen.to_str():
        raise ConfigError(f"{field}: was prepared with another tokenizer than the other sources or data.tokenizer")
    domains = [domain_name(source.domain)] if source.domain else manifest["domains"]
    out = []
    for split in SPLITS:
        facts = manifest["splits"][split]
        counts = {domains[0]: facts["tokens"]} if source.domain else facts["tokens_per_domain"]
        place = {"folder": str(folder), "split": split, "vocab_size": manifest["vocab_size"]}
        last = {"first": 0, "last": facts["documents"]}
        out.append(
            SourceShare(split, place | last, domains, facts["documents"], facts["tokens"], counts, facts["sha256"])
        )
    return out


def _megatron_parts(
    name: str, source: TokenSource, indexes: list[Path], share: float, facts: dict[str, dict[str, Any]]
) -> list[SourceShare]:
    domain = domain_name(source.domain or name)

    def part(split: str, index: Path, first: int, last: int) -> SourceShare:
        begins = open_megatron(index).begins
        tokens, place = begins[last] - begins[first], {"index": str(index), "first": first, "last": last}
        digest = facts[str(index.with_suffix(".bin"))]["sha256"]
        return SourceShare(split, place, [domain], last - first, tokens, {domain: tokens}, digest)

    counts = {index: open_megatron(index).num_documents for index in indexes}
    if source.held_out is not None:
        held_out = {index: open_megatron(index).num_documents for index in _held_out_indexes({name: source})}
        train = [part("train", index, 0, count) for index, count in counts.items()]
        return train + [part("held_out", index, 0, count) for index, count in held_out.items()]
    if all(count < 2 for count in counts.values()):
        rule = f"must have at least two documents, the last of them held out, or data.sources.{name}.held_out=PATH"
        raise ConfigError(f"data.sources.{name}.path={source.path}: {rule}")
    borders = {index: n - max(1, round(n * share)) if n > 1 else n for index, n in counts.items()}
    train = [part("train", index, 0, border) for index, border in borders.items()]
    return train + [part("held_out", i, border, counts[i]) for i, border in borders.items() if border < counts[i]]


def _check_tokens(name: str, indexes: Sequence[Path], facts: dict[str, dict[str, Any]], chosen: Tokenizer) -> list[str]:
    """Raises `ConfigError` where files cannot have been made by the tokenizer; returns what a person should know."""
    vocab, end, notes = tokenizer.vocabulary_size(chosen), tokenizer.end_of_text(chosen), []
    for path in (index.with_suffix(".bin") for index in indexes):
        found, where = facts[str(path)], f"data.sources.{name}={path}"
        if wrong := [token for token in (found["low"], found["high"]) if not 0 <= token < vocab]:
            raise ConfigError(f"{where}: has the token {wrong[0]:,}, and the tokenizer has {vocab:,}")
        ends = {int(token): count for token, count in found["ends"]}
        ended, documents = ends.get(end, 0), found["documents"]
        if not ended and documents > 1 and max(ends.values()) == documents:
            said = f"every document ends in the token {max(ends):,}, and the tokenizer's end of text is {end:,}"
            raise ConfigError(f"{where}: {said}")
        if ended < documents:
            count = f"{documents - ended:,} of {documents:,} documents"
            notes.append(
                f"{path}: {count} do not end in the end-of-text token {end}: nothing separates them from the next"
            )
    return notes


def _scan_all(options: Data, indexes: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """What `_scan` finds in the tokens of all Megatron files, by the path of the `.bin`; a file is read once for all
    runs."""
    try:
        files = [open_megatron(index) for index in indexes if index.suffix == ".idx"]
        kept = {file.path: Path(options.dir, SCANNED, _key(file.path)) for file in files}
        out = {str(path): facts for path, place in kept.items() if (facts := disk.read_json(place))}
        files = [file for file in files if str(file.path) not in out]
        columns = (*Progress.get_default_columns()[:-1], DownloadColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("reading tokens", total=sum(file.tokens.nbytes for file in files))
            workers = getattr(options, "workers", None) or os.cpu_count() or 1
            with ThreadPoolExecutor(workers) as pool:
                scans = pool.map(lambda file: _scan(file, lambda size: progress.advance(task, size)), files)
                for file, facts in zip(files, scans, strict=True):
                    kept[file.path].parent.mkdir(exist_ok=True)
                    disk.write(kept[file.path], json.dumps(facts))
                    out[str(file.path)] = facts
    except BadText as error:
        raise ConfigError(f"data.sources: {error.where}: {error.rule}") from None
    return out


def _key(path: Path) -> str:
    stat = path.stat()
    index = path.with_suffix(".idx").stat()
    facts = [str(path), stat.st_size, stat.st_mtime_ns, index.st_size, index.st_mtime_ns]
    return f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.json"


def _scan(file: TokenFile, advance: Callable[[int], None]) -> dict[str, Any]:
    """Digest, smallest and largest token, and what documents end in. Raises `BadText` for a damaged index."""
    check_megatron(file)
    digest, low, high, ends = hashlib.sha256(), 0, 0, Counter[int]()
    for begin in range(0, len(file.tokens), CHUNK):
        part = np.ascontiguousarray(file.tokens[begin : begin + CHUNK])
        digest.update(part.data.cast("B"))
        low, high = min(low, int(part.min())), max(high, int(part.max()))
        advance(part.nbytes)
    for first in range(0, file.num_documents, CHUNK):
        borders = file.begins.read(first, min(first + CHUNK, file.num_documents) + 1)
        last = file.tokens[borders[1:][np.diff(borders) > 0] - 1]
        ends.update(dict(zip(*(part.tolist() for part in np.unique(last, return_counts=True)), strict=True)))
    counted = {"low": low, "high": high, "ends": ends.most_common(MOST_ENDS), "documents": sum(ends.values())}
    return {"sha256": digest.hexdigest(), **counted}


def _write(
    folder: Path,
    found: dict[str, TokenSource],
    parts: dict[str, list[SourceShare]],
    notes: list[str],
    chosen: Tokenizer,
) -> None:
    domains = sorted({domain for own in parts.values() for part in own for domain in part.domains})
    splits = {}
    for split in SPLITS:
        own = [part for each in parts.values() for part in each if part.split == split]
        counts = Counter(dict.fromkeys(domains, 0))
        for part in own:
            counts.update(part.tokens_per_domain)
        facts = {"documents": sum(part.documents for part in own), "tokens": sum(part.tokens for part in own)}
        digest = hashlib.sha256("".join(part.digest for part in own).encode()).hexdigest()
        splits[split] = {**facts, "tokens_per_domain": dict(counts), "sha256": digest}
    described, identity = [], []
    for name, source in found.items():
        shares = {"name": name, "weight": source.weight, "epochs": source.epochs}
        files: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        for part in parts[name]:
            labels = [domains.index(domain) for domain in part.domains]
            files[part.split].append({**part.place, "labels": labels})
        described.append({**shares, "files": files})
        identity.append(
            {**shares, "parts": [[p.split, p.domains, p.documents, p.tokens, p.digest] for p in parts[name]]}
        )
    (folder / "tokenizer.json").write_text(chosen.to_str(), encoding="utf-8")
    disk.write(folder / MIXTURE, json.dumps(identity, indent=2) + "\n")
    manifest = {
        "version": VERSION,
        "domains": domains,
        "vocab_size": tokenizer.vocabulary_size(chosen),
        "end_of_text": tokenizer.end_of_text(chosen),
        "splits": splits,
        "sources": described,
        "left_out": {},
        "one_document": [],
        "notes": notes,
    }
    for note in notes:
        console.print(note)
    disk.write(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")
