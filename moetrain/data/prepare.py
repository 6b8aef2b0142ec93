"""From documents to token files: done once per setting, atomically, with progress.

A prepared corpus is a folder: `tokenizer.json`, `train.bin` and `held_out.bin` (tokens, documents back to back, each
ended by the end-of-text token), `train.docs.npy` and `held_out.docs.npy` ([documents, 3]: start, length, domain),
`manifest.json`. It is made next to its place and renamed into it: an interrupted preparation leaves nothing behind.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TimeElapsedColumn
from tokenizers import Tokenizer

from moetrain.config import ConfigError, Data
from moetrain.data import debian, tokenizer
from moetrain.data.corpus import MIN_CHARACTERS, Document, cut, documents, held_out
from moetrain.data.files import LeftOut
from moetrain.observe.console import console

VERSION = 3  # of this format
SPLITS = ("train", "held_out")


def folder_of(options: Data) -> Path:
    """Where the corpus of these settings is, or will be."""
    settings: dict[str, Any] = {
        **options.model_dump(exclude={"dir", "attend_within_documents", "domain_block"}),
        "version": VERSION,
    }
    if options.path is not None:
        settings["path"] = str(Path(options.path).resolve())
    if options.tokenizer is not None:
        settings["tokenizer"] = hashlib.sha256(Path(options.tokenizer).read_bytes()).hexdigest()
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = options.source if options.path is None else Path(options.path).resolve().name
    return Path(options.dir) / f"{name}-{key}"


def ensure(options: Data) -> Path:
    """The prepared corpus of these settings, made now if it is not there. Safe to call from many processes."""
    folder = folder_of(options)
    if (folder / "manifest.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.parent / f".{folder.name}.lock", "w")  # noqa: SIM115 - held until the end of the function
    except OSError as error:
        raise ConfigError(f"data.dir={options.dir}: must be a folder that can be written ({error.strerror})") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "manifest.json").is_file():
            console.print(f"[dim]preparing the corpus {folder.name}: documents, tokenizer, tokens")
            _clear_leftovers(folder)
            with _appearing(folder) as unfinished:
                _prepare(options, unfinished)
    return folder


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A new folder that takes its name at the end, or disappears."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    os.chmod(unfinished, 0o777 & ~_umask())
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _clear_leftovers(folder: Path) -> None:
    """What a killed preparation could not take away itself; the caller holds the lock."""
    for leftover in folder.parent.glob(f".{folder.name}.*.part"):
        shutil.rmtree(leftover, ignore_errors=True)


def _prepare(options: Data, folder: Path) -> None:
    left_out, alone = LeftOut(), []
    own = tokenizer.read(options.tokenizer) if options.tokenizer is not None else None
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("reading documents", total=None)
        found: list[Document] = []
        for document in documents(options, left_out):
            found.append(document)
            progress.update(task, advance=1, description=f"reading documents ({len(found)})")
        progress.remove_task(task)

        domains = sorted({d.domain for d in found})
        texts: dict[str, list[Document]] = {split: [] for split in SPLITS}
        for document in found:
            texts["held_out" if held_out(document, options.held_out) else "train"].append(document)
        for domain in domains:  # a small corpus: the hash may have left a side of a domain empty
            if _fill_if_empty(texts, domain, options.held_out):
                alone.append(domain)
        chosen = own or tokenizer.train(options, [d.text for d in texts["train"]], progress)
        chosen.save(str(folder / "tokenizer.json"))
        counts = {split: _write(folder, split, texts[split], domains, chosen, progress) for split in SPLITS}
    manifest = {
        "version": VERSION,
        "domains": domains,
        "vocab_size": tokenizer.vocabulary_size(chosen),
        "end_of_text": tokenizer.end_of_text(chosen),
        "splits": counts,
        "left_out": left_out.found,
        "one_document": alone,
    }
    if options.source == "debian":
        manifest["packages"] = debian.versions(options)
    for line in news(manifest, options):
        console.print(line, markup=False)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def news(manifest: dict[str, Any], options: Data) -> Iterator[str]:
    """What a person should know of how a corpus was made: what it left out, what it cut."""
    yield from LeftOut(manifest["left_out"]).lines()
    for domain in manifest["one_document"]:
        yield f"the domain {domain} is one document: its last {options.held_out:.0%} are held out"


def _fill_if_empty(texts: dict[str, list[Document]], domain: str, share: float) -> bool:
    """Give a domain a document in each split; true where its only one had to be cut for it."""
    for empty, full in (SPLITS, SPLITS[::-1]):
        if not any(d.domain == domain for d in texts[empty]):
            candidates = [d for d in texts[full] if d.domain == domain]
            if len(candidates) == 1:
                if (parts := cut(candidates[0], share)) is None:
                    rule = f"must have at least two documents, or one of {MIN_CHARACTERS} characters that can be cut"
                    raise ConfigError(f"data: the domain {domain!r} {rule}; one is held out")
                texts[full].remove(candidates[0])
                for split, part in zip(SPLITS, parts, strict=True):
                    texts[split].append(part)
                return True
            texts[full].remove(candidates[-1])
            texts[empty].append(candidates[-1])
    return False


def _write(
    folder: Path,
    split: str,
    found: list[Document],
    domains: list[str],
    chosen: Tokenizer,
    progress: Progress,
) -> dict[str, Any]:
    """Tokens and the table of documents of one split; returns what the manifest says of it."""
    dtype = np.uint16 if tokenizer.vocabulary_size(chosen) <= 1 << 16 else np.uint32
    end = tokenizer.end_of_text(chosen)
    table, start = [], 0
    per_domain = dict.fromkeys(domains, 0)
    numbers = {name: number for number, name in enumerate(domains)}
    task = progress.add_task(f"tokenizing {split.replace('_', ' ')}", total=sum(len(d.text) for d in found))
    with (folder / f"{split}.bin").open("wb") as out:
        for document, ids in zip(found, tokenizer.encode(chosen, (d.text for d in found)), strict=True):
            tokens = np.append(ids, np.uint32(end)).astype(dtype)
            out.write(tokens.tobytes())
            table.append((start, len(tokens), numbers[document.domain]))
            per_domain[document.domain] += len(tokens)
            start += len(tokens)
            progress.update(task, advance=len(document.text))
    progress.remove_task(task)
    np.save(folder / f"{split}.docs.npy", np.array(table, dtype=np.int64).reshape(-1, 3))
    size = sum(len(d.text.encode()) for d in found)
    return {"documents": len(found), "tokens": start, "bytes": size, "tokens_per_domain": per_domain}
