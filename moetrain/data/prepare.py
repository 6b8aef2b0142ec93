"""From documents to token files: done once per setting and state of the text, atomically, with progress.

A prepared corpus is a folder: `tokenizer.json`, `train.bin` and `held_out.bin` (tokens, documents back to back, each
ended by the end-of-text token), `train.docs.npy` and `held_out.docs.npy` ([documents, 3]: start, length, domain),
`manifest.json`, `sources.json` (data/sources.py). It is made next to its place and renamed into it: an interrupted
preparation leaves nothing behind.
"""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TimeElapsedColumn
from tokenizers import Tokenizer

from moetrain.common import disk
from moetrain.common.console import console
from moetrain.common.extensions import make_paths_absolute
from moetrain.config import ConfigError, Data
from moetrain.data import debian, sources, token_sources, tokenizer
from moetrain.data.chat import ARRANGED, identify, prepare_chat
from moetrain.data.corpus import MIN_CHARACTERS, Document, cut, documents, held_out
from moetrain.data.files import LeftOut
from moetrain.data.manifest import SPLITS, VERSION, fingerprint, problem


def folder_of(options: Data) -> Path:
    """Where the corpus of these settings is, or will be."""
    settings: dict[str, Any] = {
        **options.model_dump(exclude={"dir", "attend_within_documents", "domain_block", "on_change"}),
        "version": VERSION,
    }
    if options.source == "chat":
        settings = {**{name: value for name, value in settings.items() if name not in ARRANGED}, **identify(options)}
    if options.source == "tokens":
        settings["sources"] = make_paths_absolute(settings["sources"])
        settings.pop("workers")
    if options.path is not None:
        settings["path"] = str(Path(options.path).resolve())
    if options.tokenizer is not None:
        settings["tokenizer"] = hashlib.sha256(Path(options.tokenizer).read_bytes()).hexdigest()
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    name = options.source if options.path is None else Path(options.path).resolve().name
    return Path(options.dir) / f"{name}-{key}"


def ensure(options: Data, trained_on: Mapping[str, str] | None = None) -> Path:
    """The prepared corpus of these settings, made now if there is none of the text as it is.

    `trained_on`: the fingerprint of the corpus that a run goes on with. Raises `ConfigError` where the text has changed
    since, unless `data.on_change=keep` says to go on with what is prepared. Safe to call from many processes.
    """
    if trained_on is not None and (folder := next((f for f in prepared(options) if _is(f, trained_on)), None)):
        if options.on_change == "error" and (said := sources.change(folder, options)):
            advice = f"data.on_change=keep goes on with the corpus of the run, {folder}; another run.name starts anew"
            raise ConfigError(f"{sources.place(options)}: {said}; {advice}")
        return folder
    if (folder := current(options)) is not None:
        return folder
    base = folder_of(options)
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        lock = open(base.parent / f".{base.name}.lock", "w")  # noqa: SIM115 - held until the end of the function
    except OSError as error:
        raise ConfigError(f"data.dir={options.dir}: must be a folder that can be written ({error.strerror})") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return current(options) or _make(options, base)


def current(options: Data) -> Path | None:
    """The prepared corpus of the text as it is now, with `data.on_change=keep` the newest one; None: there is none."""
    found = prepared(options)
    if options.on_change == "keep":
        return found[0] if found else None
    return next((folder for folder in found if sources.change(folder, options) is None), None)


def up_to_date(folder: Path, options: Data) -> str:
    """What to say of a corpus that is not prepared again."""
    if (folder / sources.NAME).is_file():
        return "up to date: the text is as it was when it was prepared"
    made = datetime.fromtimestamp((folder / "manifest.json").stat().st_mtime)
    advice = f"data={options.source} is not watched: remove the folder to prepare it again"
    return f"as it was prepared on {made:%Y-%m-%d}; {advice}"


def outdated(folder: Path, options: Data) -> list[str]:
    """A line where the text is no longer that of the corpus, which is used all the same."""
    said = sources.change(folder, options)
    return [f"{sources.place(options)}: {said}; it is used as it was prepared, {folder}"] if said else []


def prepared(options: Data) -> list[Path]:
    """All whole corpora of these settings, the newest first: NAME, and NAME.2 and so on of text that changed since."""
    return [folder for folder in _folders(folder_of(options)) if problem(folder) is None]


def _is(folder: Path, trained_on: Mapping[str, str]) -> bool:
    found = fingerprint(folder)
    return all(found[name] == trained_on[name] for name in found.keys() & trained_on.keys())


def _folders(base: Path) -> list[Path]:
    later = [f for f in base.parent.glob(f"{glob.escape(base.name)}.*") if f.suffix[1:].isdecimal()]
    return sorted([f for f in (base, *later) if f.is_dir()], key=_number, reverse=True)


def _number(folder: Path) -> int:
    return int(folder.suffix[1:]) if folder.suffix[1:].isdecimal() else 1


def _make(options: Data, base: Path) -> Path:
    """A new one, beside those that are there; the caller holds the lock."""
    for leftover in base.parent.glob(f".{glob.escape(base.name)}.*.part"):  # of a preparation that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    what = "the files of its sources" if options.source == "tokens" else "documents, tokenizer, tokens"
    console.print(f"preparing the corpus {base.name}: {what}", style="dim")
    before = _folders(base)
    folder = base.with_name(f"{base.name}.{_number(before[0]) + 1}") if before else base
    if before:
        said = problem(before[0]) or sources.change(before[0], options)
        console.print(f"{before[0]}: {said}; prepared again, and it stays as it is")
    try:
        with _appearing(folder, base.name) as unfinished:
            if options.source == "tokens":
                token_sources.prepare_sources(options, unfinished)
            elif options.source == "chat":
                prepare_chat(options, unfinished)
            else:
                _prepare(options, unfinished)
    except OSError as error:
        raise ConfigError(f"data.dir={options.dir}: must have room for the corpus ({error.strerror})") from None
    return folder


@contextmanager
def _appearing(folder: Path, name: str) -> Iterator[Path]:
    """A new folder that takes its name at the end, or disappears."""
    unfinished = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=folder.parent))
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


def _prepare(options: Data, folder: Path) -> None:
    if options.source == "folder" and not Path(str(options.path)).exists():
        raise ConfigError(f"data.path={options.path}: there is no such file or folder")
    left_out, alone, seen = LeftOut(), [], sources.listing(options)
    own = tokenizer.read(options.tokenizer) if options.tokenizer is not None else None
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("reading documents", total=None)
        found: list[Document] = []
        for document in documents(options, left_out):
            found.append(document)
            progress.update(task, advance=1, description=f"reading documents ({len(found)})")
        if not found:
            raise ConfigError(f"data.source={options.source}: must have a document that is not left out")
        progress.remove_task(task)

        domains = sorted({d.domain for d in found})
        texts: dict[str, list[Document]] = {split: [] for split in SPLITS}
        for document in found:
            texts["held_out" if held_out(document, options.held_out) else "train"].append(document)
        for domain in domains:  # a small corpus: the hash may have left a side of a domain empty
            if _fill_if_empty(texts, domain, options.held_out):
                alone.append(domain)
        chosen = own or tokenizer.train(options, [d.text for d in texts["train"]], progress)
        text = chosen.to_str()  # Tokenizer.save() raises bare Exception on a full disk
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
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
        console.print(line)
    sources.record(folder, options, seen)
    disk.write(folder / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def news(manifest: dict[str, Any], options: Data) -> Iterator[str]:
    """What a person should know of how a corpus was made: what it left out, what it cut."""
    yield from LeftOut(manifest["left_out"]).lines()
    yield from manifest.get("notes", [])
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
    table, start, digest = [], 0, hashlib.sha256()
    per_domain = dict.fromkeys(domains, 0)
    numbers = {name: number for number, name in enumerate(domains)}
    task = progress.add_task(f"tokenizing {split.replace('_', ' ')}", total=sum(len(d.text) for d in found))
    with (folder / f"{split}.bin").open("wb") as out:
        for document, ids in zip(found, tokenizer.encode(chosen, (d.text for d in found)), strict=True):
            tokens = np.append(ids, np.uint32(end)).astype(dtype)
            out.write(raw := tokens.tobytes())
            digest.update(raw)
            table.append((start, len(tokens), numbers[document.domain]))
            per_domain[document.domain] += len(tokens)
            start += len(tokens)
            progress.update(task, advance=len(document.text))
    progress.remove_task(task)
    np.save(folder / f"{split}.docs.npy", np.array(table, dtype=np.int64).reshape(-1, 3))
    size = sum(len(d.text.encode()) for d in found)
    facts = {"documents": len(found), "tokens": start, "bytes": size, "tokens_per_domain": per_domain}
    return {**facts, "sha256": digest.hexdigest()}
