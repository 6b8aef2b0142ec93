"""Training, from top to bottom: config -> mesh -> data -> model -> engine -> loop."""

import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain import checkpoint, precision, profile, runs, versions
from moetrain.comm import barrier, broadcast_text, gather_texts
from moetrain.config import Config, ConfigError
from moetrain.data import prepare
from moetrain.data.loader import Corpus, Samples, Sequences, open_data, with_vocabulary
from moetrain.engine import Engine, build_engine
from moetrain.evaluate import evaluate
from moetrain.generate import generate, prompts_of
from moetrain.mesh import Mesh
from moetrain.model.transformer import Transformer
from moetrain.moe.balance import Balance, add_buffers
from moetrain.moe.clock import Clock
from moetrain.moe.routers import Choice
from moetrain.observe import picture, summary
from moetrain.observe.console import Voice
from moetrain.observe.estimate import estimate, matmul_rate
from moetrain.observe.health import RouterSums
from moetrain.observe.layout import describe
from moetrain.observe.meter import Part, Step
from moetrain.observe.recorder import Recorder
from moetrain.optim import learning_rate
from moetrain.recovery import watch as recovery
from moetrain.recovery.exits import Ended, Preempted
from moetrain.report import build as report
from moetrain.starts import Start


def train(config: Config, mesh: Mesh) -> Path:
    """Train on the ranks of `mesh`; all of them call it. Returns the run's folder. `config.run.name` is set."""
    corpus, loader = open_data(config)
    check_same_corpus(corpus, mesh)
    config = with_vocabulary(runs.absolute(config), corpus)
    folder = runs.folder_of(config)
    model = build(config)
    start = checkpoint.agree(config, folder, mesh, model, corpus.fingerprint)
    said: list[str] = []
    config = precision.settled(config, mesh, checkpoint.dtype_of(folder, start.path), said.append)
    saved, notes = recovery.newer(start, config, folder, mesh)
    first, position = checkpoint.progress(saved)
    this_start: Start | None = None
    ended = summary.read(folder) if mesh.is_main and first >= config.train.steps else None
    finished = bool(broadcast_text("yes" * (ended is not None), mesh.device))
    if not finished and mesh.is_main:
        runs.create(config)
        runs.keep_corpus(folder, corpus.fingerprint)
        this_start = Start(folder, first, mesh)
        said += prepare.outdated(corpus.folder, config.data)
    barrier()
    voice = Voice(folder / "log.txt", silent=not mesh.is_main)
    voice.say_all([*versions.newer_than_tested(), *said, *notes])
    size = estimate(config, mesh.world)
    describe(config, mesh, corpus, size, voice)

    if finished:
        voice.say(f"{folder} has its {first} steps already. Another run.name or more train.steps trains on.")
        if ended is not None:
            summary.show(ended, voice)
        return folder
    engine = build_engine(model, mesh, config)
    if saved is not None:
        checkpoint.load(saved, engine)
        voice.say(f"resumed from {saved}, {first} steps done")
    engine.plan_with(profile.obtain(mesh, profile.Layer.of(config), folder, saved))
    peak = matmul_rate(mesh.device, engine.dtype)

    tokens_in_batch = config.train.global_batch * config.train.seq_len
    engine.model.at_step(first, config.train)
    with (
        checkpoint.Saver(folder, config, mesh, engine, corpus.fingerprint, first) as saver,
        Recorder(config, mesh, folder, first, corpus.domains, engine.model) as recorder,
        recovery.Watch(config, folder, mesh, engine, first, voice) as watch,
    ):
        for step in range(first, config.train.steps):
            recorder.begin(step + 1)
            watch.begin(step + 1)
            began, clock = time.perf_counter(), Clock(mesh.device, watch.mark)
            with clock.phase("data"):
                shares = list(micro_batches(config, mesh, loader, position))
            lr = learning_rate(config.optim, step, config.train.steps)
            done = optimizer_step(engine, config, shares, lr, clock)
            position += config.train.global_batch
            engine.model.at_step(step + 1, config.train)
            seconds = time.perf_counter() - began

            last, asked = step + 1 == config.train.steps, watch.end(step + 1, position, done.norm)
            due = config.checkpoint.every and (step + 1) % config.checkpoint.every == 0
            saves = last or asked or bool(due and watch.sound)
            metrics = recorder.read(step + 1, done, always=saves)
            if saves:
                watch.mark("save")
                recorder.flush()
                metrics["perf/checkpoint_stall_seconds"] = saver.save(step + 1, position)
                watch.saved()
            voice.say_all(saver.news())
            if metrics:
                metrics |= {"train/lr": lr, "train/grad_norm": done.norm}
                metrics |= {"train/tokens": position * config.train.seq_len, "train/skipped_steps": watch.skipped}
                metrics |= {"perf/step_seconds": seconds, "perf/tokens_per_second": tokens_in_batch / seconds}
                metrics["perf/mfu"] = size.flops_per_token * tokens_in_batch / seconds / (peak * mesh.world)
                recorder.log(step + 1, metrics)
            if not last and config.eval.every and (step + 1) % config.eval.every == 0:
                recorder.held_out(step + 1, evaluate(engine.model, corpus, config, mesh))
            if asked and not last:
                saver.wait()
                if this_start is not None:
                    this_start.end()
                voice.say(f"asked to end: saved after step {step + 1}; the same command goes on from there")
                raise Preempted

        voice.say("evaluating held-out text, generating some, drawing pictures", style="dim")
        held_out = evaluate(engine.model, corpus, config, mesh)
        recorder.held_out(config.train.steps, held_out)
        prompts = prompts_of(corpus, config)
        texts = generate(engine.model, corpus, [p for _, p in prompts], config.generate, config.train.seq_len, mesh)
    if saver.saved == config.train.steps:
        watch.complete()
    voice.say_all(saver.news())
    if this_start is not None:
        this_start.end()
    if mesh.is_main:
        written = [
            {"title": title, "prompt": corpus.tokenizer.decode(prompt), "text": text}
            for (title, prompt), text in zip(prompts, texts, strict=True)
        ]
        bigram = summary.bigram_scores(config, corpus, loader, position)
        try:
            picture.draw(folder)
            found = summary.collect(folder, config, size, held_out.scores, bigram, written)
            report.write_of(folder)
            summary.show(found, voice)
        except OSError as error:
            voice.say(f"the run's picture, summary and report could not be written: {error.strerror}")
    voice.close()
    if saver.saved != config.train.steps:
        raise Ended(f"the state after step {config.train.steps} is not saved; what was said above tells why")
    return folder


class Batch(NamedTuple):
    """One micro-step's sequences on the device."""

    tokens: Tensor  # [B, L] int64
    targets: Tensor  # [B, L] int64
    domain: Tensor  # [B, L] of the targets
    about: tuple[Tensor | None, ...]  # what else the model takes: document, domain, sample of the tokens

    @classmethod
    def of(cls, share: Sequences, config: Config, device: torch.device) -> "Batch":
        tokens, domain, document, sample = (torch.from_numpy(x).to(device) for x in vars(share).values())
        within = document[:, :-1] if config.data.attend_within_documents else None
        return cls(tokens[:, :-1], tokens[:, 1:], domain[:, 1:], (within, domain[:, :-1], sample))


def optimizer_step(
    engine: Engine, config: Config, shares: Sequence[Sequences], lr: float, clock: Clock | None = None
) -> Step:
    """Forward, losses and backward of every micro-step, then the update; `clock` sees where the time goes."""
    clock = clock or Clock(engine.mesh.device)
    tokens_in_batch = config.train.global_batch * config.train.seq_len
    parts: list[Part] = []
    model, groups = engine.model, engine.mesh.ep.size
    balance = Balance(config.balance, model.routers, tokens_in_batch, config.train.seq_len, groups)
    batches = [Batch.of(share, config, engine.mesh.device) for share in shares]
    choices: list[list[Choice] | None] = [None] * len(batches)
    if balance.looks_ahead:
        with clock.phase("forward"):
            choices[1:] = [balance.foresee(model.count(batch.tokens, *batch.about)) for batch in batches[1:]]
    for number, batch in enumerate(batches):
        with clock.phase("forward"):
            nats, stats = engine.forward(batch.tokens, batch.targets, *batch.about, choices[number])
            losses, router = balance.losses(stats), RouterSums.of(stats)
        with clock.phase("backward"):
            loss = nats.sum() / tokens_in_batch + losses.weighted
            engine.backward(spoilt(loss), last=number == len(batches) - 1)
        losses = losses._replace(weighted=losses.weighted.detach())
        parts.append(Part(nats.detach(), batch.domain, losses, [s.light() for s in stats], router))
        choices[number] = None  # they are large
    with clock.phase("update"):
        norm = engine.step(lr)
        if math.isfinite(norm):
            balance.finish()
    return Step(parts, balance.counts, norm, clock)


def spoilt(loss: Tensor) -> Tensor:
    """The loss; where it is not finite, one whose gradients are not either, so that all ranks see it in their norm."""
    return loss * (1 + 0 * loss.detach())


def build(config: Config) -> Transformer:
    """The model, without memory; the engine gives it some."""
    with torch.device("meta"):
        model = Transformer(config.model, config.router, config.planner, config.train.recompute)
        add_buffers(model.routers, config.balance)
    if config.train.compile:
        model.compile_dense()
    return model


def check_same_corpus(corpus: Corpus, mesh: Mesh) -> None:
    """Raises `ConfigError` on all ranks where one has another corpus: hosts prepare their own `data=local`."""
    found = gather_texts(json.dumps([corpus.fingerprint, str(corpus.folder)]), mesh.saving)
    ranks = {tuple(json.loads(text)[0].values()): rank for rank, text in reversed([*enumerate(found)])}
    if len(ranks) > 1:
        places = " and ".join(f"rank {rank} {json.loads(found[rank])[1]}" for rank in sorted(ranks.values())[:2])
        raise ConfigError(f"data: ranks have different corpora, {places}; data.dir=FOLDER, one that all hosts share")


def micro_batches(config: Config, mesh: Mesh, loader: Samples, position: int) -> Iterator[Sequences]:
    """This rank's sequences of one optimizer step, micro-step by micro-step; `position`: its first global sample.

    The batch is cut into equal parts, one a rank and micro-step, or parts that differ by one.
    """
    size, parts = config.train.global_batch, config.micro_steps(mesh.world) * mesh.world
    for part in range(mesh.rank, parts, mesh.world):
        first, end = (-(-size * n // parts) for n in (part, part + 1))
        yield loader.samples(position + first, position + end)
