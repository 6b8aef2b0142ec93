"""The reference of preference tuning: log p of every answer under the model that a run begins with.

Computed once, in one pass without gradient before the first step, and kept in the run's folder by the pair's number in
the corpus, so that a run that goes on reads it at any layout. N pairs of a split.
"""

import io
import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from torch import Tensor

from moetrain import runs
from moetrain.common import disk
from moetrain.common.arrays import BROKEN, read_arrays
from moetrain.common.console import RunLogger, errors
from moetrain.config import ConfigError, RunSpec
from moetrain.data.conversations import ChatLoader, Rows, held_out_rows
from moetrain.data.loader import Corpus, Samples
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.models.base import LanguageModel
from moetrain.training.preference import PairBatch, Reference, SplitReference

NAME = "reference.npz"  # in a run's folder


def make_reference(
    model: LanguageModel, corpus: Corpus, loader: Samples, config: RunSpec, mesh: Mesh, logger: RunLogger
) -> Reference:
    """Return the reference that `model`, as it is, makes, kept in the run's folder; empty where a run has no pairs.

    All ranks call it. Raises `ConfigError` where it cannot be kept.
    """
    if config.train.objective != "dpo":
        return {}
    assert isinstance(loader, ChatLoader)
    found, folder = compute_reference(model, corpus, loader, config, mesh), runs.folder_of(config)
    if mesh.is_main:
        try:
            write_reference(folder, found, corpus)
        except OSError as error:
            raise ConfigError(f"run.dir={config.run.dir}: must have room for {NAME} ({error.strerror})") from None
        count = sum(int((part.size_N2[:, 0] > 0).sum()) for part in found.values())
        logger.print(f"reference log-probabilities of {count:,} pairs are in {folder / NAME}")
    return found


def find_held_out_reference(config: RunSpec, corpus: Corpus) -> SplitReference | None:
    """Return that of the held-out pairs, as far as the run's folder has it; None where the run has no pairs."""
    loader = ChatLoader(corpus, config) if config.train.objective == "dpo" else None
    found = None if loader is None else read_reference(runs.folder_of(config), corpus, loader, config)
    return None if found is None else found["held_out"]


@torch.no_grad()
def compute_reference(
    model: LanguageModel, corpus: Corpus, loader: ChatLoader, config: RunSpec, mesh: Mesh
) -> Reference:
    """Compute log p of every answer under the model as it is, of training and of held-out pairs.

    All ranks call it, and call the model equally often; each pair is computed by one of them.
    """
    splits, found = _list_rows(corpus, loader, config), {}
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not mesh.is_main) as progress:
        total = sum(each.num_windows for parts in splits.values() for each in parts)
        bar = progress.add_task("reference log-probabilities", total=total)
        for split, parts in splits.items():
            logp_N2 = torch.zeros(len(corpus.documents(split)) // 2, 2, dtype=torch.float64, device=mesh.device)
            for rows in parts:
                each = config.micro_batch // 2
                for begin in range(0, rows.num_windows, each * mesh.world):
                    first = begin + mesh.rank * each
                    _fill(model, rows, range(first, min(first + each, rows.num_windows)), config, logp_N2)
                    progress.advance(bar, each * mesh.world)
            sizes = _sizes_of(parts, len(logp_N2))
            found[split] = SplitReference(all_reduce_sum(logp_N2).cpu().numpy(), sizes)
    for layer in model.layers_of_experts:
        layer.experts.residents.reset()  # other weights may be loaded next
    return found


def _list_rows(corpus: Corpus, loader: ChatLoader, config: RunSpec) -> dict[str, Sequence[Rows]]:
    """Return by split the rows that training and evaluation read."""
    held_out = [held_out_rows(corpus, config, domain) for domain in range(len(corpus.domains))]
    return {"train": loader.rows, "held_out": held_out}


def _fill(model: LanguageModel, rows: Rows, numbers: range, config: RunSpec, logp_N2: Tensor) -> None:
    """Run the model over some windows and enter what it finds."""
    share, device = rows.windows(numbers), logp_N2.device
    parts = (share.tokens, share.domain, share.attended(config.data.attend_within_documents), share.positions)
    tokens, domain, document, positions = (None if x is None else torch.from_numpy(x).to(device) for x in parts)
    assert tokens is not None
    assert domain is not None
    nats, _ = model(tokens[:, :-1], tokens[:, 1:], document, domain[:, :-1], positions=positions)
    pairs = PairBatch.from_sequences(share, device)
    logp_N2[torch.from_numpy(pairs.number_P).to(device)] = pairs.sum_logp(nats).T


def _sizes_of(parts: Sequence[Rows], count: int) -> NDArray[np.int64]:
    """[N, 2] tokens of each conversation as these rows have it; 0: they have it not."""
    out = np.zeros((count, 2), np.int64)
    for rows in parts:
        out[rows.numbers] = rows.document_sizes
    return out


def write_reference(folder: Path, reference: Reference, corpus: Corpus) -> None:
    """Keep it in a run's folder. Raises `OSError`."""
    arrays = {f"{split}.{name}": x for split, part in reference.items() for name, x in part._asdict().items()}
    raw = io.BytesIO()
    np.savez(raw, about=np.array(json.dumps(corpus.fingerprint)), **arrays)
    disk.write(folder / NAME, raw.getvalue())


def read_reference(folder: Path, corpus: Corpus, loader: ChatLoader, config: RunSpec) -> Reference | None:
    """Return what a run's folder keeps; None where it is missing, damaged, of another corpus or of other lengths."""
    try:
        splits = {split: [f"{split}.{name}" for name in SplitReference._fields] for split in corpus.manifest["splits"]}
        arrays = read_arrays(folder / NAME, ["about", *chain(*splits.values())])
        if json.loads(str(arrays["about"])) != corpus.fingerprint:
            return None
        found = {split: SplitReference(*(arrays[name] for name in names)) for split, names in splits.items()}
    except BROKEN:
        return None
    for split, parts in _list_rows(corpus, loader, config).items():
        needed = _sizes_of(parts, len(corpus.documents(split)) // 2)
        known = found[split].size_N2
        if known.shape != needed.shape or ((needed > 0) & (known != needed)).any():
            return None
    return found
