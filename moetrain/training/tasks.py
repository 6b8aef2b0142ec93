"""What the workers do for each verb, once they have joined."""

import json
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from moetrain import checkpoint, runs
from moetrain.checkpoint import manifest
from moetrain.common import disk
from moetrain.common.console import console, errors, styled
from moetrain.config import Config, ConfigError, RunSpec, name_run, resolve
from moetrain.data import prepare
from moetrain.data.loader import Corpus
from moetrain.data.opening import open_data
from moetrain.distributed.comm import broadcast_text
from moetrain.distributed.mesh import Mesh
from moetrain.engine import build_engine, precision, saved_costs
from moetrain.evals import results
from moetrain.evals.selection import Selection
from moetrain.models.base import LanguageModel
from moetrain.moe import calibrate
from moetrain.observe.metrics import HELD_OUT_DPO
from moetrain.observe.summary import NOT_EVALUATED
from moetrain.runs import lock
from moetrain.training.ending import AtEnd
from moetrain.training.evaluate import answer_tasks, evaluate
from moetrain.training.generate import generate, prompts_of
from moetrain.training.loop import train
from moetrain.training.reference import find_held_out_reference
from moetrain.training.step import build


def train_run(config: Config, mesh: Mesh, as_json: bool, at_end: Sequence[AtEnd] = ()) -> None:
    """Train; a run without a name gets one. `at_end` as in `train`."""
    with ExitStack() as stack:
        if config.run.name is None:  # under torchrun or Slurm: our own launcher has named the run, and holds its lock
            name = runs.make_name(config) if mesh.is_main else ""
            config = name_run(config, broadcast_text(name, mesh.device))
            if mesh.is_main:
                stack.enter_context(lock.hold(runs.folder_of(config)))
        folder = train(config, mesh, at_end)
    if as_json and mesh.is_main:
        print(json.dumps(disk.read_json(folder / "summary.json")))


def profile_run(config: Config, mesh: Mesh, as_json: bool) -> None:
    """Measure the layer of the config's model on these ranks and keep it in place of what was known."""
    spec = resolve(config, mesh.world, config.data.vocab_size, precision.find_dtype(config, mesh))
    began, layer = time.perf_counter(), saved_costs.layer_of(spec)
    with mesh.exchange.using("flat"):
        costs = calibrate.measure(mesh, layer)
    path = saved_costs.keep(mesh, layer, costs)
    if not mesh.is_main:
        return
    if as_json:
        print(calibrate.to_json(costs, mesh))
        return
    kept = "not saved: no cache folder can be written" if path is None else str(path)
    console.print(styled((str(kept), "bold"), (f", measured in {time.perf_counter() - began:.1f} s", "")))
    console.print(
        f"layer      width {layer.dim}, hidden {layer.hidden}, top-{layer.top_k}, {spec.train.dtype}, "
        f"{mesh.ep.size} ranks"
    )
    console.print(f"row        {1e6 * costs.row_forward:.2f} µs forward, {1e6 * costs.row_backward:.2f} µs backward")
    console.print(
        f"expert     {1e6 * costs.segment_forward:.0f} µs forward, {1e6 * costs.segment_backward:.0f} µs backward, "
        f"besides its rows; {costs.weight_bytes / 2**20:.2f} MiB to lend"
    )
    for name, link in (("inside", costs.inside), ("between", costs.between)):
        where = "in a node" if name == "inside" else "between nodes"
        console.print(f"link       {link.bandwidth / 1e9:.2f} GB/s and {1e6 * link.latency:.0f} µs a message {where}")
    for each in costs.kernels:
        ours, theirs = f"{1e3 * each.own:.2f} ms with our kernels", f"{1e3 * each.torch:.2f} with torch's"
        console.print(f"{each.part:<10} {ours}, {theirs}: {'torch' if each.torch_is_faster else 'ours'} will be used")
    console.print(f"overlap    {costs.overlap:.0%} of a transfer is hidden behind the computation")


def evaluate_run(config: Config, mesh: Mesh, as_json: bool) -> None:
    spec, model, corpus, saved = restore_run(config, mesh)
    reference = find_held_out_reference(spec, corpus)
    scores, metrics, _ = evaluate(model, corpus, spec, mesh, reference)
    if not mesh.is_main:
        return
    if as_json:
        known = {name: None if math.isnan(value) else value for name, value in metrics.items()}
        print(json.dumps({"checkpoint": str(saved), **known}))
        return
    console.print(str(saved), style="bold")
    for name, score in scores.items():
        found = f"{score.bits_per_byte:.3f} bits/byte, {score.loss:.3f} nats/token"
        console.print(f"{name:>12}  {found if score.num_bytes else NOT_EVALUATED}")
    if reference is not None:
        accuracy, margin = (metrics[HELD_OUT_DPO[name]] for name in ("accuracy", "margin"))
        console.print(
            f"       pairs  the chosen answer has the higher reward in {accuracy:.1%}, by {margin:.3f} on average"
        )


def answer_run(config: Config, mesh: Mesh, as_json: bool, selection: Selection) -> None:
    """Have the run's newest checkpoint answer tasks, keep the answers in the run's folder and print a table."""
    spec, model, corpus, saved = restore_run(config, mesh)
    tasks, shown = selection.read(), mesh.is_main and not as_json
    found = answer_tasks(model, corpus, spec, mesh, tasks, selection.max_length, shown)
    if not mesh.is_main:
        return
    for result in found:
        results.keep(runs.folder_of(config), saved, result)
    if as_json:
        print(json.dumps({"checkpoint": str(saved), "tasks": results.to_json(found)}))
        return
    console.print(str(saved), style="bold")
    console.print(results.tabulate(found))
    for result in found:
        if result.num_cut:
            console.print(
                f"{result.name}: {result.num_cut} requests are longer than the model reads and lost their left part"
            )
    console.print(f"every answer is in {runs.folder_of(config) / results.FOLDER}")


def generate_run(config: Config, mesh: Mesh, as_json: bool) -> None:
    _, model, corpus, saved = restore_run(config, mesh)
    prompts = prompts_of(corpus, config)
    texts = generate(model, corpus, [p for _, p in prompts], config.generate, config.train.seq_len, mesh)
    if not mesh.is_main:
        return
    found = [
        {"title": t, "prompt": corpus.tokenizer.decode(p), "text": x} for (t, p), x in zip(prompts, texts, strict=True)
    ]
    if as_json:
        print(json.dumps({"checkpoint": str(saved), "generated": found}))
        return
    for item in found:
        console.print(item["title"], style="bold")
        console.print(item["prompt"] + item["text"])


def restore_run(config: Config, mesh: Mesh) -> tuple[RunSpec, LanguageModel, Corpus, Path]:
    """Return the newest checkpoint of `config.run` that is whole, on these ranks. Raises `ConfigError`."""
    corpus, _ = open_data(config)
    for line in prepare.outdated(corpus.folder, config.data) if mesh.is_main else []:
        errors.print(line)
    spec = resolve(config, mesh.world, corpus.vocab_size, precision.find_dtype(config, mesh))
    saved, passed = checkpoint.first_whole(manifest.folders(runs.folder_of(config)), mesh)
    for path, said in passed if mesh.is_main else []:
        errors.print(f"{path} is incomplete or damaged and is skipped: {said}")
    if saved is None:
        raise ConfigError(f"run={runs.folder_of(config)}: has no complete checkpoint")
    checkpoint.check_data(saved, corpus.fingerprint, same_run=False)
    model = build(spec)
    model.awaits_checkpoint = model.adapted is None
    engine = build_engine(model, mesh, spec)
    if model.adapted is not None and (base := checkpoint.find_initial(config)) is not None:
        checkpoint.load_base(base, model)
    checkpoint.load(saved, engine, optimizer=False)
    engine.plan_with(saved_costs.of_checkpoint(saved))
    engine.model.at_step(checkpoint.progress(saved)[0], config.train)
    return spec, engine.model, corpus, saved
