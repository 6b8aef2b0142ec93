"""`moetrain record`: the choices of a model for the tokens that a run trains on, in a file that `router.replay` reads.

T tokens of a micro-batch, P passes through layers with experts, K experts a token.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moetrain import checkpoint
from moetrain.common.console import console
from moetrain.config import Config, ConfigError, RunSpec, resolve
from moetrain.data.loader import Corpus, Samples, Sequences
from moetrain.data.opening import open_data, samples_of
from moetrain.data.replay import AT_A_TIME, check_routers, cut_samples, describe_model, hash_tokens
from moetrain.distributed.comm import all_gather, all_reduce_sum, everyone
from moetrain.distributed.mesh import Mesh
from moetrain.engine import build_engine, precision
from moetrain.models.base import LanguageModel
from moetrain.moe.layer import LayerStats
from moetrain.moe.planning.cost import default_costs
from moetrain.moe.recorded import ChoiceFacts, RoutedExperts, hash_tokenizer
from moetrain.training.step import Batch, build, check_same_corpus
from moetrain.training.tasks import restore_run


class RecordedRun(NamedTuple):
    """What a model chose."""

    choices: RoutedExperts  # on rank 0; on the others without samples
    loss: float  # nats, the mean over the targets of the sequences that were read


def record_run(config: Config, mesh: Mesh, as_json: bool, path: Path) -> None:
    """Record what the newest checkpoint of `config.run`, or the weights that a new run would begin with, choose for the
    sequences of all steps. Raises `ConfigError`."""
    check_routers(config, "record")
    if config.run.name is not None:
        spec, model, corpus, _ = restore_run(config, mesh)
        loader = samples_of(corpus, spec)
    else:
        spec, model, corpus, loader = _begin_anew(config, mesh)
    found = record_choices(spec, mesh, model, corpus, loader)
    if not mesh.is_main:
        return
    try:
        found.choices.write(path)
    except OSError as error:
        raise ConfigError(f"--out={path}: cannot be written ({error.strerror})") from None
    c = found.choices
    if as_json:
        facts = {**c.facts.__dict__, "samples": len(c.lengths), "tokens": len(c.tokens), "loss": found.loss}
        print(json.dumps({"file": str(path), **facts}))
        return
    console.print(
        f"{path}: {len(c.lengths):,} samples, {len(c.tokens):,} tokens, {c.facts.num_layers} layers with experts, "
        f"{c.facts.top_k} experts a token; loss {found.loss:.4f} nats a token"
    )


@torch.no_grad()
def record_choices(config: RunSpec, mesh: Mesh, model: LanguageModel, corpus: Corpus, loader: Samples) -> RecordedRun:
    """Run the model over every sequence of the run once. All ranks call it."""
    numbers, size = list_new(loader, corpus, config.train.steps * config.train.global_batch), config.micro_batch
    facts = describe_model(config, hash_tokenizer(corpus.tokenizer.to_str()))
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)  # nats, targets
    samples: dict[bytes, tuple[NDArray[np.integer], NDArray[np.integer]]] = {}
    for begin in range(0, len(numbers), size * mesh.world):
        parts = [numbers[begin + rank * size : begin + (rank + 1) * size] for rank in range(mesh.world)]
        share = take(loader, parts[mesh.rank])
        batch = Batch.from_sequences(share, config, mesh.device)
        nats, stats = model(batch.tokens, batch.targets, *batch.about, None, batch.positions)
        sums += torch.stack([nats.sum().double(), nats.new_tensor(share.num_targets).double()])
        own = tabulate(stats, batch.tokens.numel(), facts)
        rows = own.new_full((size * config.train.seq_len, *own.shape[1:]), -1)
        rows[: len(own)] = own
        everywhere = all_gather(rows, everyone()).cpu().numpy()
        for part, found in zip(parts if mesh.is_main else (), everywhere, strict=False):
            _keep(take(loader, part), found, corpus.is_chat, samples)
    nats_sum, num_targets = all_reduce_sum(sums).tolist()
    return RecordedRun(RoutedExperts.collect(facts, samples.values()), nats_sum / max(num_targets, 1.0))


def list_new(loader: Samples, corpus: Corpus, end: int) -> list[int]:
    """Return the global samples before `end` that have something which those before them have not."""
    known, numbers = set[bytes](), []
    for begin in range(0, end, AT_A_TIME):
        found = loader.samples(begin, min(begin + AT_A_TIME, end))
        for row, first, last in cut_samples(found, corpus.is_chat):
            if (digest := hash_tokens(found.tokens[row, first:last])) not in known:
                known.add(digest)
                numbers.append(begin + row)
    return list(dict.fromkeys(numbers))


def take(loader: Samples, numbers: Sequence[int]) -> Sequences:
    """Return single global samples as one batch; it may be empty."""
    parts = [loader.samples(number, number + 1) for number in numbers] or [loader.samples(0, 0)]
    arrays = zip(*((p.tokens, p.domain, p.document, p.sample) for p in parts), strict=True)
    tokens, domain, document, sample = (np.concatenate([*each]) for each in arrays)
    targets = [part.target for part in parts if part.target is not None]
    return Sequences(tokens, domain, document, sample, np.concatenate(targets) if targets else None)


def tabulate(stats: Sequence[LayerStats], num_tokens: int, facts: ChoiceFacts) -> Tensor:
    """Return int32 [T, P, K] of the choices of every pass; -1 where there is none.

    Raises `ConfigError` where tokens choose different numbers of experts.
    """
    table = torch.full((num_tokens, len(stats), facts.top_k), -1, dtype=torch.int32, device=stats[0].counts_E.device)
    for place, one in enumerate(stats):
        expert_N = one.choice.expert_N
        if one.choice.chosen_N is not None:
            expert_N = expert_N.masked_fill(~one.choice.chosen_N, -1)
        if num_tokens and len(expert_N) % num_tokens:
            raise ConfigError("record: the router's tokens must all choose as many experts")
        if num_tokens:
            expert_TK = expert_N.view(num_tokens, -1)
            table[:, place, : expert_TK.shape[1]] = expert_TK.int()
    return table


def _keep(
    share: Sequences,
    rows: NDArray[np.integer],
    is_chat: bool,
    samples: dict[bytes, tuple[NDArray[np.integer], NDArray[np.integer]]],
) -> None:
    """Add what a rank found, rows [T, P, K] for its `share`, by tokens; the first of equal samples is kept."""
    length = share.tokens.shape[1] - 1
    for row, first, last in cut_samples(share, is_chat):
        tokens = share.tokens[row, first:last]
        samples.setdefault(hash_tokens(tokens), (tokens, rows[row * length + first : row * length + last]))


def _begin_anew(config: Config, mesh: Mesh) -> tuple[RunSpec, LanguageModel, Corpus, Samples]:
    """The model as a new run would begin. Raises `ConfigError`."""
    corpus, loader = open_data(config)
    check_same_corpus(corpus, mesh)
    spec = resolve(config, mesh.world, corpus.vocab_size, precision.find_dtype(config, mesh))
    model = build(spec)
    initial = checkpoint.agree_on_weights(config, checkpoint.StartingPoint(None, []), mesh)
    if initial is not None:
        checkpoint.check_weights(initial, mesh, model, corpus.fingerprint)
    engine = build_engine(model, mesh, spec)
    if initial is not None:
        checkpoint.load_weights(initial, engine)
    engine.plan_with(default_costs())
    engine.model.at_step(0, spec.train)
    return spec, engine.model, corpus, loader
