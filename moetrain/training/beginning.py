"""What all ranks agree on before the first step: the data, the configuration, and what the run goes on from."""

from pathlib import Path
from typing import NamedTuple

from moetrain import checkpoint, runs
from moetrain.common import versions
from moetrain.common.console import RunLogger
from moetrain.config import Config, HuggingFace, RunSpec, resolve
from moetrain.config.hugging_face import KEPT
from moetrain.data import prepare
from moetrain.data.conversations import ChatLoader
from moetrain.data.loader import Corpus, Samples
from moetrain.data.opening import open_data
from moetrain.data.replay import ReplayLoader
from moetrain.distributed.comm import barrier, broadcast_text, gather_texts
from moetrain.distributed.mesh import Mesh
from moetrain.engine import precision
from moetrain.models.base import LanguageModel
from moetrain.observe import summary
from moetrain.observe.estimate import Estimate, estimate, short
from moetrain.observe.layout import describe
from moetrain.recovery import watch as recovery
from moetrain.runs.starts import Start
from moetrain.training.preference import Reference
from moetrain.training.reference import NAME, read_reference
from moetrain.training.step import build, check_same_corpus


class Beginning(NamedTuple):
    """A run before the first step of this start."""

    config: RunSpec
    folder: Path
    corpus: Corpus
    loader: Samples
    model: LanguageModel  # without memory
    saved: Path | None  # the checkpoint to go on from, on the disk or in memory
    initial: Path | None  # the checkpoint of the weights that a new run, its adapters or its reference begin with
    reference: Reference | None  # of preference tuning, where it is there already
    first: int  # steps done
    position: int  # global samples seen
    size: Estimate
    logger: RunLogger
    start: Start | None  # the record of this start; None on ranks that do not write it
    is_complete: bool  # all steps were done and summarised before


def begin(config: Config, mesh: Mesh) -> Beginning:
    """Open the data, find what to go on from, write the run's configuration and print its layout.

    All ranks call it; rank 0 writes. `config.run.name` is set. Raises `ConfigError` on all ranks where the corpora of
    hosts differ, or what was saved does not fit the configuration.
    """
    corpus, loader = open_data(config, replays=True)
    check_same_corpus(corpus, mesh)
    folder, notes = runs.folder_of(config), versions.newer_than_tested()
    start = checkpoint.agree_on_start(config, folder, mesh)
    initial = checkpoint.agree_on_weights(config, start, mesh)
    if config.init_from is not None and start.path is not None and not config.lora.rank:
        notes.append(f"init_from={config.init_from}: not read, the run goes on from {start.path.name} of its own")
    dtype = precision.find_dtype(config, mesh, checkpoint.known_dtype(folder, start.path), notes.append)
    spec = resolve(config, mesh.world, corpus.vocab_size, dtype)
    if (spec.lora.rank or spec.train.objective == "dpo") and initial is not None:  # whatever is newer when it goes on
        spec = spec.model_copy(update={"init_from": str(initial.resolve())})
    model = build(spec)
    start = checkpoint.check_start(start, spec, mesh, model, corpus.fingerprint)
    start = recovery.find_newer(start, spec, folder, mesh)
    saved, more, reference = start.path, start.notes, None
    if spec.train.objective == "dpo" and saved is not None:
        reference = _find_reference(spec, folder, corpus, loader, mesh)
    makes_reference = spec.train.objective == "dpo" and reference is None
    if makes_reference and saved is not None:
        more = [*more, f"{folder / NAME} does not have all pairs: made anew of the weights that the run began with"]
        initial = initial or checkpoint.agree_on_weights(config, start, mesh, makes_reference)
    if initial is not None:
        checkpoint.check_weights(initial, mesh, model, corpus.fingerprint)
    model.awaits_checkpoint = saved is not None and model.adapted is None and not makes_reference
    first, position = checkpoint.progress(saved)
    is_complete = first >= spec.train.steps and _has_summary(folder, mesh)
    record: Start | None = None
    if mesh.is_main and not is_complete:
        if spec.checkpoint.resume == "none" and not checkpoint.continues_own(spec, folder):
            runs.forget_tracking(folder)
        runs.create(spec)
        runs.keep_model(spec)
        _keep_table(spec)
        runs.keep_corpus(folder, corpus.fingerprint)
        record = Start(folder, first, mesh)
        more = [*prepare.outdated(corpus.folder, spec.data), *more]
    barrier()
    logger = RunLogger(folder / "log.txt", silent=not mesh.is_main)
    logger.print_lines([*notes, *more, *_describe_objective(spec, loader), *_describe_adapters(spec, model)])
    size = estimate(spec)
    describe(spec, mesh, corpus, size, logger)
    return Beginning(
        spec,
        folder,
        corpus,
        loader,
        model,
        saved,
        initial,
        reference,
        first,
        position,
        size,
        logger,
        record,
        is_complete,
    )


def _describe_adapters(config: Config, model: LanguageModel) -> list[str]:
    """Return a line on what LoRA trains and what it leaves."""
    if model.adapted is None:
        return []
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters()) - size
    kind = "one for all experts of a layer" if config.lora.shared else "one for each expert"
    places = (
        f"{len(model.adapted.linears)} linear layers and {len(model.adapted.matrices)} matrices of experts ({kind})"
    )
    said = f"LoRA: adapters of rank {config.lora.rank} beside {places}, {short(size)} parameters; "
    return [f"{said}the model's {short(total)} are frozen, its routers too"]


def _find_reference(config: RunSpec, folder: Path, corpus: Corpus, loader: Samples, mesh: Mesh) -> Reference | None:
    """Return what all ranks find in the run's folder; None on all of them where one finds nothing of use."""
    assert isinstance(loader, ChatLoader)
    found = read_reference(folder, corpus, loader, config)
    return found if all(gather_texts("yes" * (found is not None), mesh.saving)) else None


def _describe_objective(config: Config, loader: Samples) -> list[str]:
    """Lines on what post-training learns, and what may move its router."""
    lines = loader.describe() if isinstance(loader, ReplayLoader) else []
    inner = loader.inner if isinstance(loader, ReplayLoader) else loader
    lines += inner.describe() if isinstance(inner, ChatLoader) else []
    if config.train.objective != "lm":
        b, named = config.balance, ("coefficient", "sequence_coefficient", "device_coefficient", "z_coefficient")
        moved = [f"balance.{name}={getattr(b, name):g}" for name in named if getattr(b, name)]
        moved += [f"balance.bias={b.bias}"] if b.bias != "none" else []
        routers = "routers are frozen" if config.router.freeze or config.lora.rank else "routers learn"
        said = f"{' and '.join(moved)} act on them" if moved else "no balance loss, z-loss or bias acts on them"
        loss = f"mean over pairs, dpo.loss={config.dpo.loss} dpo.beta={config.dpo.beta:g}"
        loss = "mean over the assistant's tokens" if config.train.objective == "sft" else loss
        lines.append(f"objective {config.train.objective}: the loss is the {loss}; {routers}, {said}")
    return lines


def _keep_table(spec: RunSpec) -> None:
    """Keep in the run's folder which tensors the folder of its model has, so that an export needs no more of it."""
    if isinstance(spec.model, HuggingFace):
        from moetrain.hf import folder  # transformers takes seconds to load

        if folder.has_weights(spec.model.path):
            folder.keep_table(spec.model.path, runs.folder_of(spec) / KEPT)


def _has_summary(folder: Path, mesh: Mesh) -> bool:
    """Tell on all ranks whether rank 0 finds the summary of a run that ended."""
    found = mesh.is_main and summary.read(folder) is not None
    return bool(broadcast_text("yes" * found, mesh.device))
