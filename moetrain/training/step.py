"""One optimizer step: this rank's micro-batches; forward, losses and backward of each; the update."""

import json
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.config import Config, ConfigError, HuggingFace, RunSpec
from moetrain.config.core_options import balance_options
from moetrain.data.loader import Corpus, Samples, Sequences
from moetrain.distributed.comm import all_reduce_sum, gather_texts
from moetrain.distributed.mesh import Mesh
from moetrain.engine import Engine
from moetrain.models.adapters import add_adapters
from moetrain.models.base import AnyChoice, LanguageModel
from moetrain.models.transformer import Transformer
from moetrain.moe.clock import Clock
from moetrain.moe.layer import LayerStats
from moetrain.moe.routing.balance import BalanceLoss, add_buffers
from moetrain.moe.routing.base import RecordedChoice
from moetrain.observe.collect.health import RouterSums
from moetrain.observe.collect.meter import BatchSize, MicroStep, StepRecord
from moetrain.training.preference import PairBatch, SplitReference, judge_pairs


class Batch(NamedTuple):
    """One micro-step's sequences on the device."""

    tokens: Tensor  # [B, L] int64
    targets: Tensor  # [B, L] int64
    domain: Tensor  # [B, L] of the targets
    is_target: Tensor | None  # [B, L] bool: which targets are to be predicted; None: all
    positions: Tensor | None  # [P] int64: where in the flattened targets they are
    about: tuple[Tensor | None, Tensor | None, Tensor | None]  # document, domain and sample of the tokens
    recorded: list[RecordedChoice] | None  # choices to replay, of every pass; None: the routers choose

    @classmethod
    def from_sequences(cls, share: Sequences, config: Config, device: torch.device) -> "Batch":
        document = share.attended(config.data.attend_within_documents)
        parts = (share.tokens, share.domain, document, share.sample, share.target, share.positions)
        tokens, domain, within, sample, target, positions = (
            None if x is None else torch.from_numpy(x).to(device) for x in parts
        )
        assert tokens is not None
        assert domain is not None
        is_target = None if target is None else target[:, 1:]
        about = within, domain[:, :-1], sample
        recorded = None if share.experts is None else find_recorded(share, device)
        return cls(tokens[:, :-1], tokens[:, 1:], domain[:, 1:], is_target, positions, about, recorded)


def find_recorded(share: Sequences, device: torch.device) -> list[RecordedChoice]:
    """Return the recorded choices of every pass through a layer of experts."""
    assert share.experts is not None
    is_padding = share.document[:, :-1] < 0
    is_complete = bool(((share.experts[:, :, 0, 0] >= 0) | is_padding).all())
    experts = torch.from_numpy(share.experts).to(device).flatten(0, 1).long()
    return [RecordedChoice(expert_TK, is_complete) for expert_TK in experts.unbind(1)]


def count_replayed(recorded: Sequence[RecordedChoice], stats: Sequence[LayerStats]) -> Tensor:
    """Return int64 [] the selections of a micro-step on this rank that are recorded ones."""
    return torch.stack([one.count_replayed(s.choice) for one, s in zip(recorded, stats, strict=True)]).sum()


def count_batch(shares: Sequence[Sequences], config: Config, device: torch.device, num_pairs: int = 0) -> BatchSize:
    """Count the global batch; `num_pairs`: those of this rank. All ranks call it, before the first forward: enters one
    small collective where sequences have padding or tokens that are not predicted."""
    if all(share.target is None for share in shares):
        tokens = config.train.global_batch * config.train.seq_len
        return BatchSize(tokens, tokens)
    own = [sum(share.num_tokens for share in shares), sum(share.num_targets for share in shares), num_pairs]
    tokens, targets, all_pairs = all_reduce_sum(torch.tensor(own, device=device)).tolist()
    return BatchSize(tokens, max(targets, 1), all_pairs)


def optimizer_step(
    engine: Engine,
    config: Config,
    shares: Sequence[Sequences],
    lr: float,
    clock: Clock | None = None,
    reference: SplitReference | None = None,
) -> StepRecord:
    """Forward, losses and backward of every micro-step, then the update; `clock` sees where the time goes.

    `reference`: of the training pairs, under `train.objective=dpo`.
    """
    clock = clock or Clock(engine.mesh.device)
    pairs = [PairBatch.from_sequences(share, engine.mesh.device) for share in shares if reference is not None]
    size = count_batch(shares, config, engine.mesh.device, sum(len(part.number_P) for part in pairs))
    parts: list[MicroStep] = []
    model, groups = engine.model, engine.mesh.ep.size
    balance = BalanceLoss(balance_options(config.balance), model.routers, size.tokens, config.train.seq_len, groups)
    batches = [Batch.from_sequences(share, config, engine.mesh.device) for share in shares]
    choices: list[Sequence[AnyChoice] | None] = [batch.recorded for batch in batches]
    if balance.looks_ahead:
        with clock.phase("forward"):
            for number, batch in enumerate(batches[1:], 1):
                choices[number] = balance.foresee(model.count(batch.tokens, *batch.about, choices[number]))
    for number, batch in enumerate(batches):
        with clock.phase("forward"):
            nats, stats = engine.forward(batch.tokens, batch.targets, *batch.about, choices[number], batch.positions)
            losses, router = balance.losses(stats), RouterSums.collect(stats)
            replayed = None if batch.recorded is None else count_replayed(batch.recorded, stats)
            judged = None if reference is None else judge_pairs(nats, pairs[number], reference, config.dpo)
        with clock.phase("backward"):
            own = nats.sum() / size.targets if judged is None else (judged.loss / size.pairs).float()
            loss = own + losses.weighted
            engine.backward(spread_not_finite(loss), last=number == len(batches) - 1)
        losses = losses._replace(weighted=losses.weighted.detach())
        light, sums = [s.light() for s in stats], None if judged is None else judged.sums
        parts.append(MicroStep(nats.detach(), batch.domain, batch.is_target, losses, light, router, replayed, sums))
        choices[number] = None  # they are large
    with clock.phase("update"):
        norm = engine.step(lr)
        if math.isfinite(norm):
            balance.finish()
    return StepRecord(parts, balance.counts, norm, clock, size)


def spread_not_finite(loss: Tensor) -> Tensor:
    """Return the loss, or where it is not finite one whose gradients are not either: all ranks see it in their norm."""
    return loss * (1 + 0 * loss.detach())


def build(config: Config) -> LanguageModel:
    """The model, without memory; the engine gives it some.

    Raises `ConfigError` where the model of a folder is not covered.
    """
    model: LanguageModel
    if isinstance(config.model, HuggingFace):
        from moetrain.hf.model import build_hf_model  # transformers takes seconds to load

        model = build_hf_model(config)
    else:
        with torch.device("meta"):
            model = Transformer(config.model, config.router, config.planner, config.train.recompute)
            add_buffers(model.routers, balance_options(config.balance))
    if config.router.freeze:
        model.freeze_routers()
    if config.lora.rank:
        add_adapters(model, config.lora)
    if config.train.compile:
        model.compile_dense()
    return model


def check_same_corpus(corpus: Corpus, mesh: Mesh) -> None:
    """Raises `ConfigError` on all ranks where one has another corpus: hosts prepare their own `data=local`."""
    found = gather_texts(json.dumps([corpus.fingerprint, str(corpus.folder)]), mesh.saving)
    ranks = {tuple(json.loads(text)[0].values()): rank for rank, text in reversed([*enumerate(found)])}
    if len(ranks) > 1:
        places = " and ".join(f"rank {rank} {json.loads(found[rank])[1]}" for rank in sorted(ranks.values())[:2])
        raise ConfigError(
            f"data: ranks have different corpora ({places}); set data.dir to a folder that all hosts share"
        )


def micro_batches(config: RunSpec, mesh: Mesh, loader: Samples, position: int) -> Iterator[Sequences]:
    """This rank's sequences of one optimizer step, micro-step by micro-step; `position`: its first global sample.

    The batch is cut into equal parts, one a rank and micro-step, or parts that differ by one.
    """
    each, parts = config.train.sequences_of_a_sample, config.micro_steps * mesh.world
    size = config.train.global_batch // each
    for part in range(mesh.rank, parts, mesh.world):
        first, end = (-(-size * n // parts) * each for n in (part, part + 1))
        yield loader.samples(position + first, position + end)
