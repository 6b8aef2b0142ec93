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

from rich.progress import Progress, TimeElapsedColumn

from moetrain.common import disk
from moetrain.common.console import console
from moetrain.common.extensions import make_paths_absolute
from moetrain.config import ConfigError, Data
from moetrain.data import debian, sources, token_sources, tokenizer
from moetrain.data.chat import ARRANGED, identify, prepare_chat
from moetrain.data.encode import write_tokens
from moetrain.data.files import LeftOut
from moetrain.data.manifest import SPLITS, VERSION, fingerprint, problem
from moetrain.data.parallel import choose_workers
from moetrain.data.spool import Spool, collect, fill_empty_splits


def folder_of(options: Data) -> Path:
    """Where the corpus of these settings is, or will be."""
    settings: dict[str, Any] = {
        **options.model_dump(exclude={"dir", "attend_within_documents", "domain_block", "on_change"}),
        "version": VERSION,
    }
    settings.pop("workers", None)
    for name, default in (("text_field", "text"), ("domain_field", "domain")):  # as corpora were named before these
        if settings.get(name) == default:
            settings.pop(name)
    if options.source == "chat":
        settings = {**{name: value for name, value in settings.items() if name not in ARRANGED}, **identify(options)}
    if options.source == "tokens":
        settings["sources"] = make_paths_absolute(settings["sources"])
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
    left_out, seen = LeftOut(), sources.listing(options)
    own = tokenizer.read(options.tokenizer) if options.tokenizer is not None else None
    work = folder / "work"
    work.mkdir()
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True) as progress:
        spool = _collect(options, work, left_out, progress)
        alone = fill_empty_splits(spool, options.held_out)
        characters = spool.sum("train", "length")
        chosen = own or tokenizer.train(options, spool.texts("train"), spool.count("train"), characters, progress)
        text = chosen.to_str()  # Tokenizer.save() raises bare Exception on a full disk
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        counts = _write(spool, folder, options, progress)
    shutil.rmtree(work)
    manifest = {
        "version": VERSION,
        "domains": sorted(spool.names),
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


def _collect(options: Data, work: Path, left_out: LeftOut, progress: Progress) -> Spool:
    """All documents on the disk, those that are taken known. Raises `ConfigError` where there is none."""
    task, count = progress.add_task("reading documents", total=None), 0

    def tick(documents: int) -> None:
        nonlocal count
        count += documents
        progress.update(task, advance=documents, description=f"reading documents ({count:,})")

    spool = collect(options, work, left_out, tick)
    progress.remove_task(task)
    if not spool.count("train") + spool.count("held_out"):
        if options.source == "folder":
            said = "".join(f"; {line}" for line in left_out.lines())
            rule = f'must hold text files or JSONL or Parquet with a "{getattr(options, "text_field", "text")}" field'
            raise ConfigError(f"data.path={options.path}: {rule}{said}")
        raise ConfigError(f"data.source={options.source}: must have a document that is not left out")
    return spool


def _write(spool: Spool, folder: Path, options: Data, progress: Progress) -> dict[str, dict[str, Any]]:
    """The token files; returns what the manifest says of each split."""
    total = sum(spool.sum(split, "length") for split in SPLITS)
    task = progress.add_task("tokenizing", total=total)
    workers = choose_workers(getattr(options, "workers", None), sum(spool.sum(split, "size") for split in SPLITS))
    counts = write_tokens(spool, folder, sorted(spool.names), workers, lambda size: progress.advance(task, size))
    progress.remove_task(task)
    return counts


def news(manifest: dict[str, Any], options: Data) -> Iterator[str]:
    """What a person should know of how a corpus was made: what it left out, what it cut."""
    yield from LeftOut(manifest["left_out"]).lines()
    yield from manifest.get("notes", [])
    for domain in manifest["one_document"]:
        yield f"the domain {domain} is one document: its last {options.held_out:.0%} are held out"
