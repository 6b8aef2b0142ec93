"""The facts of a prepared corpus: its `manifest.json`, whether the folder is whole, and its fingerprint."""

import hashlib
import json
from pathlib import Path

import numpy as np

from moetrain.common import disk

VERSION = 3  # of the format
SPLITS = ("train", "held_out")
MIXTURE = "mixture.json"  # of data=tokens: its sources, wherever they lie


def problem(folder: Path) -> str | None:
    """What is wrong with a prepared corpus as far as sizes tell; None for nothing."""
    try:
        manifest = json.loads(disk.read(folder / "manifest.json"))
        names = [*manifest["domains"], *manifest["one_document"], *(manifest["splits"][s]["sha256"] for s in SPLITS)]
        if not all(isinstance(name, str) for name in names) or not isinstance(manifest["end_of_text"], int):
            return "its manifest is damaged"
        if not (folder / "tokenizer.json").is_file():
            return "tokenizer.json is missing"
        if "sources" in manifest:  # of data=tokens: what they consist of lies elsewhere
            return None if (folder / MIXTURE).is_file() else f"{MIXTURE} is missing"
        width = 2 if int(manifest["vocab_size"]) <= 1 << 16 else 4
        for split in SPLITS:
            facts, size = manifest["splits"][split], (folder / f"{split}.bin").stat().st_size
            if size != facts["tokens"] * width:
                return f"{split}.bin has {size:,} bytes, but {facts['tokens'] * width:,} were written"
            if not isinstance(facts["sha256"], str):
                raise ValueError(f"the digest of {split}.bin is none")
            table = np.load(folder / f"{split}.docs.npy", mmap_mode="r")
            if table.shape != (facts["documents"], 3):
                return f"{split}.docs.npy has not {facts['documents']} documents"
            if "chat" in manifest and (folder / f"{split}.target.bin").stat().st_size != facts["tokens"]:
                return f"{split}.target.bin has not {facts['tokens']:,} tokens"
            if "chat" in manifest and np.load(folder / f"{split}.rows.npy", mmap_mode="r").shape != table.shape:
                return f"{split}.rows.npy has not {facts['documents']} documents"
            if "chat" in manifest and manifest["chat"].get("pairs") and facts["documents"] % 2:
                return f"{split}.docs.npy has a pair without its other half"
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError) as error:
        return f"it cannot be read ({error})"


def fingerprint(folder: Path) -> dict[str, str]:
    """What a run remembers of its data: digests of the tokenizer, the table of training documents, their tokens."""
    manifest = json.loads((folder / "manifest.json").read_text())
    documents = MIXTURE if "sources" in manifest else "train.docs.npy"
    found = {"tokenizer": digest_file(folder / "tokenizer.json"), "documents": digest_file(folder / documents)}
    return {name: digest[:16] for name, digest in {**found, "tokens": manifest["splits"]["train"]["sha256"]}.items()}


def digest_file(path: Path) -> str:
    """SHA-256 of a file. Raises `OSError`."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
