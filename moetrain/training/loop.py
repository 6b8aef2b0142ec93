"""Training, from top to bottom: config -> mesh -> data -> model -> engine -> loop."""

import time
from collections.abc import Sequence
from pathlib import Path

from moetrain import checkpoint
from moetrain.config import Config
from moetrain.distributed.mesh import Mesh
from moetrain.engine import build_engine, saved_costs
from moetrain.engine.exchange import settle_exchange
from moetrain.engine.optim import learning_rate
from moetrain.launch.exits import Ended, Preempted
from moetrain.moe.clock import Clock
from moetrain.observe import metrics as metric
from moetrain.observe import summary
from moetrain.observe.estimate import matmul_rate
from moetrain.observe.recorder import Recorder
from moetrain.recovery import watch as recovery
from moetrain.training.beginning import Beginning, begin
from moetrain.training.ending import AtEnd, compare, judge, write_artifacts
from moetrain.training.evaluate import evaluate
from moetrain.training.prediction import predict
from moetrain.training.reference import make_reference
from moetrain.training.step import micro_batches, optimizer_step


def train(config: Config, mesh: Mesh, at_end: Sequence[AtEnd] = ()) -> Path:
    """Train on the ranks of `mesh` and return the run's folder. All ranks call it; `config.run.name` is set.

    `at_end`: called by rank 0 with the folder of a run that has ended, such as what writes its report. Raises
    `ConfigError` for what does not fit, `Preempted` where all ranks were asked to end and have saved, `Diverged` after
    too many steps that were not finite, and `Ended` where the last state could not be saved.
    """
    run = begin(config, mesh)
    spec, steps, batch = run.config, run.config.train.steps, run.config.train.global_batch
    if run.is_complete:
        return _show_again(run)
    engine = build_engine(run.model, mesh, spec)
    if run.initial is not None and engine.model.adapted is not None:
        checkpoint.load_base(run.initial, engine.model)
        run.logger.print(f"adapters are beside the weights of {run.initial}")
    elif run.initial is not None:
        checkpoint.load_weights(run.initial, engine)
        what = "steps and optimizer begin anew" if run.saved is None else "those of the reference"
        run.logger.print(f"weights are those of {run.initial}; {what}")
    costs = saved_costs.obtain(mesh, saved_costs.layer_of(spec), run.folder, run.saved)
    engine.plan_with(costs)
    run.logger.print_lines(settle_exchange(mesh, spec, costs))
    reference = run.reference or make_reference(engine.model, run.corpus, run.loader, spec, mesh, run.logger)
    if run.saved is not None:
        checkpoint.load(run.saved, engine)
        run.logger.print(f"resumed from {run.saved}, {run.first} steps done")
    if mesh.is_main and (expected := predict(spec, mesh, costs)) is not None:
        run.logger.print_lines(expected.lines())
        expected.write(run.folder)
    peak_flops = matmul_rate(mesh.device, engine.dtype) * mesh.world
    position = run.position
    engine.model.at_step(run.first, spec.train)

    with (
        checkpoint.Saver(run.folder, spec, mesh, engine, run.corpus.fingerprint, run.first) as saver,
        Recorder(spec, mesh, run.folder, run.first, run.corpus.domains, engine.model) as recorder,
        recovery.Watch(spec, run.folder, mesh, engine, run.first, run.logger) as watch,
    ):
        before = None
        if spec.train.objective != "lm" and not run.first:  # what tuning is to improve
            before = evaluate(engine.model, run.corpus, spec, mesh, reference.get("held_out"))
            recorder.held_out(0, before)
        for step in range(run.first + 1, steps + 1):
            recorder.begin(step)
            watch.begin(step)
            began, clock = time.perf_counter(), Clock(mesh.device, watch.mark)
            with clock.phase("data"):
                shares = list(micro_batches(spec, mesh, run.loader, position))
            lr = learning_rate(spec.optim, step - 1, steps)
            done = optimizer_step(engine, spec, shares, lr, clock, reference.get("train"))
            position += batch
            engine.model.at_step(step, spec.train)
            seconds = time.perf_counter() - began

            is_last, end_requested = step == steps, watch.end(step, position, done.norm)
            is_due = watch.sound and _is_every(spec.checkpoint.every, step)
            saves = is_last or end_requested or is_due
            metrics = recorder.read(step, done, always=saves)
            if saves:
                watch.mark("save")
                recorder.flush()
                metrics[metric.CHECKPOINT_STALL_SECONDS] = saver.save(step, position)
                watch.saved()
            run.logger.print_lines(saver.news())
            if metrics:
                metrics |= {metric.LR: lr, metric.GRAD_NORM: done.norm}
                metrics |= {metric.TOKENS: run.loader.count_tokens(position), metric.SKIPPED_STEPS: watch.skipped}
                recorder.log(step, metrics | _speed(run, done.size.tokens, seconds, peak_flops))
            if not is_last and _is_every(spec.eval.every, step):
                recorder.held_out(step, evaluate(engine.model, run.corpus, spec, mesh, reference.get("held_out")))
            if end_requested and not is_last:
                watch.mark("save")
                saver.finish()
                run.logger.print_lines(saver.news())
                _end_record(run)
                run.logger.print(f"ended on request: saved after step {step}; the same command continues from there")
                raise Preempted
        verdict = judge(run, engine.model, mesh, recorder, reference.get("held_out"))
    if before is not None:
        run.logger.print_lines(compare(before, verdict.held_out))

    if saver.saved == steps:
        watch.complete()
    run.logger.print_lines(saver.news())
    _end_record(run)
    if mesh.is_main:
        write_artifacts(run, verdict, position, at_end)
    run.logger.close()
    if saver.saved != steps:
        raise Ended(f"the state after step {steps} is not saved; the lines above say why")
    return run.folder


def _is_every(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _speed(run: Beginning, tokens: int, seconds: float, peak_flops: float) -> dict[str, float]:
    """Return the metrics of a step of `tokens` that took `seconds`; `peak_flops`: a second, of all ranks."""
    mfu = run.size.flops_per_token * tokens / seconds / peak_flops
    return {metric.STEP_SECONDS: seconds, metric.TOKENS_PER_SECOND: tokens / seconds, metric.MFU: mfu}


def _end_record(run: Beginning) -> None:
    if run.start is not None:
        run.start.end()


def _show_again(run: Beginning) -> Path:
    """Show the summary of a run that had ended before."""
    done = f"{run.folder} has its {run.first} steps already"
    run.logger.print(f"{done}. Take another run.name for a new run, or more train.steps to continue this one.")
    if not run.logger.silent and (found := summary.read(run.folder)) is not None:
        summary.show(found, run.logger)
    return run.folder
