"""The first documents of a prepared corpus as a person reads them, what is not learned of them dimmed."""

from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text

from moetrain.common.console import console
from moetrain.config import ConfigError
from moetrain.data.loader import Corpus

MOST_TOKENS = 2000  # of a document that are shown


class PreviewedDocument(NamedTuple):
    """A document in pieces."""

    domain: str
    where: str  # the file and line or row of a conversation; else empty
    tokens: int
    targets: int
    pieces: list[dict[str, Any]]  # {"text", "learned"}
    half: str = ""  # of a pair: chosen or rejected


def read_documents(folder: Path, count: int) -> list[PreviewedDocument]:
    """Returns the first documents, or pairs of them, of the training split.

    Raises `ConfigError` where the corpus holds no tokens.
    """
    corpus = Corpus(folder)
    if corpus.is_mixture:
        raise ConfigError("--show: data=tokens lists sources; show one of them by its own settings")
    tokens, out = corpus.tokens("train"), []
    halves = ("chosen", "rejected") if corpus.has_pairs else ("",)
    for number, (begin, size, domain) in enumerate(corpus.documents("train")[: count * len(halves)].tolist()):
        own = tokens[begin : begin + size].tolist()
        learned = corpus.targets("train")[begin : begin + size].tolist() if corpus.is_chat else [True] * size
        where = ""
        if corpus.is_chat:
            _, file, line = corpus.origins("train")[number].tolist()
            where = f"{corpus.manifest['chat']['files'][file]}:{line}"
        pieces, half = _cut_pieces(corpus, own, learned), halves[number % len(halves)]
        out.append(PreviewedDocument(corpus.domains[domain], where, size, sum(learned), pieces, half))
    return out


def _cut_pieces(corpus: Corpus, tokens: list[int], learned: list[bool]) -> list[dict[str, Any]]:
    """The text in runs of tokens that are learned, or are not."""
    runs = [list(run) for _, run in groupby(np.arange(min(len(tokens), MOST_TOKENS)), key=lambda n: learned[n])]
    text = [corpus.tokenizer.decode([tokens[n] for n in run], skip_special_tokens=False) for run in runs]
    return [{"text": piece, "learned": learned[run[0]]} for piece, run in zip(text, runs, strict=True)]


def show(document: PreviewedDocument) -> None:
    """Print a document; where the output is no terminal, what is learned stands in [[double brackets]]."""
    counts = f"{document.targets:,} of {document.tokens:,} tokens are learned"
    half = f"  {document.half}" if document.half else ""
    console.print(f"\n{document.domain}  {document.where}{half}  {counts}", style="bold", markup=False)
    is_plain = not console.is_terminal and document.targets < document.tokens
    text = Text()
    for piece in document.pieces:
        written = f"[[{piece['text']}]]" if is_plain and piece["learned"] else piece["text"]
        text.append(written, style="" if piece["learned"] else "dim")
    console.print(text)
    if document.tokens > MOST_TOKENS:
        console.print(f"... {document.tokens - MOST_TOKENS:,} tokens more", style="dim")
