"""What the workers do for each verb, once they have joined."""

import json
from pathlib import Path

from torch import nn

from moetrain import checkpoint, profile, runs, train
from moetrain.comm import broadcast_text
from moetrain.config import Config
from moetrain.data.loader import Corpus
from moetrain.engine.native import NativeEngine
from moetrain.evaluate import evaluate
from moetrain.generate import generate, prompts_of
from moetrain.mesh import Mesh
from moetrain.observe.console import console


def train_run(config: Config, mesh: Mesh, as_json: bool) -> None:
    name = broadcast_text(runs.name_of(config), mesh.device)
    folder = train.train(config.model_copy(update={"run": config.run.model_copy(update={"name": name})}), mesh)
    if as_json and mesh.is_main:
        print(json.dumps(json.loads((folder / "summary.json").read_text())))


def evaluate_run(config: Config, mesh: Mesh, as_json: bool) -> None:
    model, corpus, saved = _restore(config, mesh)
    scores, metrics = evaluate(model, corpus, config, mesh)
    if not mesh.is_main:
        return
    if as_json:
        print(json.dumps({"checkpoint": str(saved), **metrics}))
        return
    console.print(f"[bold]{saved}")
    for name, score in scores.items():
        console.print(f"{name:>12}  {score.bits_per_byte:.3f} bits a byte, {score.loss:.3f} nats a token")


def generate_run(config: Config, mesh: Mesh, as_json: bool) -> None:
    model, corpus, saved = _restore(config, mesh)
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
        console.print(f"[bold]{item['title']}")
        console.print(item["prompt"] + item["text"], markup=False)


def _restore(config: Config, mesh: Mesh) -> tuple[nn.Module, Corpus, Path]:
    """The newest checkpoint of `config.run`, on these ranks."""
    corpus, _ = train.open_data(config)
    config = train.with_vocabulary(config, corpus)
    newest = checkpoint.newest(runs.folder_of(config)) if mesh.is_main else None
    saved = Path(broadcast_text(str(newest or ""), mesh.device))
    engine = NativeEngine(train.build(config), mesh, config)
    checkpoint.load(saved, engine.model)
    engine.plan_with(profile.of_checkpoint(saved))
    return engine.model, corpus, saved
