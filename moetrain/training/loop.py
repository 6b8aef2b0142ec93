"""Training, from top to bottom: config -> mesh -> data -> model -> engine -> loop."""

import time
from pathlib import Path

from moetrain import checkpoint, runs
from moetrain.common import versions
from moetrain.common.console import RunLogger
from moetrain.config import Config
from moetrain.data import prepare
from moetrain.data.loader import open_data, with_vocabulary
from moetrain.distributed.comm import barrier, broadcast_text
from moetrain.distributed.mesh import Mesh
from moetrain.engine import build_engine, calibrate, precision
from moetrain.engine.optim import learning_rate
from moetrain.launch.exits import Ended, Preempted
from moetrain.moe.clock import Clock
from moetrain.observe import picture, summary
from moetrain.observe.estimate import estimate, matmul_rate
from moetrain.observe.layout import describe
from moetrain.observe.recorder import Recorder
from moetrain.recovery import watch as recovery
from moetrain.report import build as report
from moetrain.runs.starts import Start
from moetrain.training.evaluate import evaluate
from moetrain.training.generate import generate, prompts_of
from moetrain.training.step import build, check_same_corpus, micro_batches, optimizer_step


def train(config: Config, mesh: Mesh) -> Path:
    """Train on the ranks of `mesh`; all of them call it. Returns the run's folder. `config.run.name` is set."""
    corpus, loader = open_data(config)
    check_same_corpus(corpus, mesh)
    config = with_vocabulary(runs.absolute(config), corpus)
    folder = runs.folder_of(config)
    model = build(config)
    start = checkpoint.agree_on_start(config, folder, mesh, model, corpus.fingerprint)
    said: list[str] = []
    config = precision.settled(config, mesh, checkpoint.known_dtype(folder, start.path), said.append)
    saved, notes = recovery.find_newer(start, config, folder, mesh)
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
    logger = RunLogger(folder / "log.txt", silent=not mesh.is_main)
    logger.print_lines([*versions.newer_than_tested(), *said, *notes])
    size = estimate(config, mesh.world)
    describe(config, mesh, corpus, size, logger)

    if finished:
        logger.print(f"{folder} has its {first} steps already. Another run.name or more train.steps trains on.")
        if ended is not None:
            summary.show(ended, logger)
        return folder
    engine = build_engine(model, mesh, config)
    if saved is not None:
        checkpoint.load(saved, engine)
        logger.print(f"resumed from {saved}, {first} steps done")
    engine.plan_with(calibrate.obtain(mesh, calibrate.Layer.of(config), folder, saved))
    peak = matmul_rate(mesh.device, engine.dtype)

    tokens_in_batch = config.train.global_batch * config.train.seq_len
    engine.model.at_step(first, config.train)
    with (
        checkpoint.Saver(folder, config, mesh, engine, corpus.fingerprint, first) as saver,
        Recorder(config, mesh, folder, first, corpus.domains, engine.model) as recorder,
        recovery.Watch(config, folder, mesh, engine, first, logger) as watch,
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
            logger.print_lines(saver.news())
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
                logger.print(f"asked to end: saved after step {step + 1}; the same command goes on from there")
                raise Preempted

        logger.print("evaluating held-out text, generating some, drawing pictures", style="dim")
        held_out = evaluate(engine.model, corpus, config, mesh)
        recorder.held_out(config.train.steps, held_out)
        prompts = prompts_of(corpus, config)
        texts = generate(engine.model, corpus, [p for _, p in prompts], config.generate, config.train.seq_len, mesh)
    if saver.saved == config.train.steps:
        watch.complete()
    logger.print_lines(saver.news())
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
            summary.show(found, logger)
        except OSError as error:
            logger.print(f"the run's picture, summary and report could not be written: {error.strerror}")
    logger.close()
    if saver.saved != config.train.steps:
        raise Ended(f"the state after step {config.train.steps} is not saved; what was said above tells why")
    return folder
