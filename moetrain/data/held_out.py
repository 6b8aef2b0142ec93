"""The held-out text that a model is judged by."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moetrain.config import Config
from moetrain.data.conversations import held_out_rows
from moetrain.data.loader import Corpus, Packed, Sequences, stack_windows
from moetrain.data.token_files import Stream


def held_out_windows(corpus: Corpus, config: Config, domain: int) -> Sequences:
    """The sequences that a domain is judged by, from all over its held-out text: the same at every time and layout.

    [B, L + 1]; text that does not fill a sequence is one by itself, shorter than the others.
    """
    seq_len = config.train.seq_len
    if corpus.is_chat:
        rows = held_out_rows(corpus, config, domain)
        wanted = max(1, config.eval.tokens_per_domain // (seq_len * (2 if rows.is_paired else 1)))
        spread = np.linspace(0, rows.num_windows, min(wanted, rows.num_windows), endpoint=False).astype(int)
        return rows.windows(spread.tolist())
    parts = _open_parts(corpus, seq_len, domain)
    if not any(part.num_windows for part in parts) and (longest := max(part.num_tokens for part in parts)) > 1:
        seq_len = longest - 1
        parts = _open_parts(corpus, seq_len, domain)
    ends = np.cumsum([part.num_windows for part in parts])
    wanted = max(1, config.eval.tokens_per_domain // config.train.seq_len)
    spread = np.linspace(0, ends[-1], min(wanted, ends[-1]), endpoint=False).astype(int)
    owners = np.searchsorted(ends, spread, side="right")
    begins = ends - [part.num_windows for part in parts]
    windows = [parts[owner].window(int(number - begins[owner])) for owner, number in zip(owners, spread, strict=True)]
    found = stack_windows(windows, seq_len)
    return replace(found, domain=np.full_like(found.domain, domain))


def _open_parts(corpus: Corpus, seq_len: int, domain: int) -> Sequence[Packed | Stream]:
    """The held-out text of a domain, cut into windows; of `data=tokens` file by file."""
    if not corpus.is_mixture:
        return [Packed(corpus, "held_out", seq_len, seed=0, domain=domain)]
    parts: list[Packed | Stream] = []
    for number, source in enumerate(corpus.manifest["sources"]):
        streams = corpus.streams(number, "held_out", seq_len)
        for stream, place in zip(streams, source["files"]["held_out"], strict=True):
            if place["labels"] == [domain]:
                parts.append(stream)
            elif domain in place["labels"]:
                own = place["labels"].index(domain)
                parts.append(Packed(Corpus(stream.file.path.parent), "held_out", seq_len, seed=0, domain=own))
    return parts
