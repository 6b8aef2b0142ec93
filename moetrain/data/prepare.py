"""From documents to token files: done once per setting, atomically, with progress.

A prepared corpus is a folder: `tokenizer.json`, `train.bin` and `held_out.bin` (tokens, documents back to back, each
ended by the end-of-text token), `train.docs.npy` and `held_out.docs.npy` ([documents, 3]: start, length, domain),
`manifest.json`. It is made next to its place and renamed into it: an interrupted preparation leaves nothing behind.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moetrain.config import ConfigError, Data
from moetrain.data import debian
from moetrain.data.corpus import Document, documents, held_out
from moetrain.observe.console import console

VERSION = 2  # of this format
END_OF_TEXT = "<|endoftext|>"
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
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading documents", total=None)
        found: list[Document] = []
        for document in documents(options):
            found.append(document)
            progress.update(task, advance=1, description=f"reading documents ({len(found)})")
        progress.remove_task(task)

        domains = sorted({d.domain for d in found})
        for domain in domains:
            if not re.fullmatch(r"[\w.-]+", domain) or domain == "all":
                raise ConfigError(
                    f"data: the domain {domain!r} must be a word of letters, digits, . _ and -, not 'all'"
                )
        texts: dict[str, list[Document]] = {split: [] for split in SPLITS}
        for document in found:
            texts["held_out" if held_out(document, options.held_out) else "train"].append(document)
        for domain in domains:  # a small corpus: the hash may have left a side of a domain empty
            _move_one_if_empty(texts, domain)
        tokenizer = _tokenizer(options, [d.text for d in texts["train"]], progress)
        tokenizer.save(str(folder / "tokenizer.json"))
        counts = {split: _write(folder, split, texts[split], domains, tokenizer, progress) for split in SPLITS}
    manifest = {
        "version": VERSION,
        "domains": domains,
        "vocab_size": tokenizer.get_vocab_size(),
        "end_of_text": _end_of_text(tokenizer),
        "splits": counts,
    }
    if options.source == "debian":
        manifest["packages"] = debian.versions(options)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _move_one_if_empty(texts: dict[str, list[Document]], domain: str) -> None:
    for empty, full in (SPLITS, SPLITS[::-1]):
        if not any(d.domain == domain for d in texts[empty]):
            candidates = [d for d in texts[full] if d.domain == domain]
            if len(candidates) < 2:
                raise ConfigError(f"data: the domain {domain!r} must have at least two documents, one to hold out")
            texts[full].remove(candidates[-1])
            texts[empty].append(candidates[-1])


def _tokenizer(options: Data, texts: list[str], progress: Progress) -> Tokenizer:
    if options.tokenizer is not None:
        try:
            given = Tokenizer.from_file(options.tokenizer)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"data.tokenizer={options.tokenizer}: {error}") from None
        if not set(pre_tokenizers.ByteLevel.alphabet()) <= given.get_vocab().keys():
            raise ConfigError(f"data.tokenizer={options.tokenizer}: must be byte-level, so that bytes can be counted")
        return given
    task = progress.add_task(f"training a tokenizer of {options.vocab_size} tokens", total=None)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    progress.remove_task(task)
    return tokenizer


def _end_of_text(tokenizer: Tokenizer) -> int:
    for name in (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"):
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise ConfigError(f"data.tokenizer: must have an end-of-text token, such as {END_OF_TEXT}")


def _write(
    folder: Path,
    split: str,
    found: list[Document],
    domains: list[str],
    tokenizer: Tokenizer,
    progress: Progress,
) -> dict[str, Any]:
    """Tokens and the table of documents of one split; returns what the manifest says of it."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    end = _end_of_text(tokenizer)
    table, start = [], 0
    per_domain = dict.fromkeys(domains, 0)
    task = progress.add_task(f"tokenizing {split.replace('_', ' ')}", total=len(found))
    with (folder / f"{split}.bin").open("wb") as out:
        for begin in range(0, len(found), 64):
            batch = found[begin : begin + 64]
            encodings = tokenizer.encode_batch([d.text for d in batch], add_special_tokens=False)
            for document, encoding in zip(batch, encodings, strict=True):
                tokens = np.array([*encoding.ids, end], dtype=dtype)
                out.write(tokens.tobytes())
                table.append((start, len(tokens), domains.index(document.domain)))
                per_domain[document.domain] += len(tokens)
                start += len(tokens)
            progress.update(task, advance=len(batch))
    np.save(folder / f"{split}.docs.npy", np.array(table, dtype=np.int64).reshape(-1, 3))
    size = sum(len(d.text.encode()) for d in found)
    return {"documents": len(found), "tokens": start, "bytes": size, "tokens_per_domain": per_domain}
