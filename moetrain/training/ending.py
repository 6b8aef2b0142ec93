"""After the last step: the model is judged, and the run's picture, summary and report are written."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from moetrain.distributed.mesh import Mesh
from moetrain.models.base import LanguageModel
from moetrain.observe import picture, summary
from moetrain.observe.metrics import HELD_OUT_DPO
from moetrain.observe.recorder import Recorder
from moetrain.observe.scores import HeldOut
from moetrain.training.beginning import Beginning
from moetrain.training.evaluate import evaluate
from moetrain.training.generate import generate, prompts_of
from moetrain.training.preference import SplitReference

AtEnd = Callable[[Path], object]  # called by rank 0 with the run's folder, when all else is in it


class Verdict(NamedTuple):
    """What the trained model is worth."""

    held_out: HeldOut
    texts: list[dict[str, str]]  # title, prompt and text


def judge(
    run: Beginning, model: LanguageModel, mesh: Mesh, recorder: Recorder, reference: SplitReference | None
) -> Verdict:
    """Evaluate the held-out text and have the model continue a prompt of every domain. All ranks call it.

    `reference`: of held-out pairs, under `train.objective=dpo`.
    """
    run.logger.print("evaluating held-out text, generating samples, drawing pictures", style="dim")
    config, corpus = run.config, run.corpus
    held_out = evaluate(model, corpus, config, mesh, reference)
    recorder.held_out(config.train.steps, held_out)
    prompts = prompts_of(corpus, config)
    texts = generate(model, corpus, [p for _, p in prompts], config.generate, config.train.seq_len, mesh)
    written = zip(prompts, texts, strict=True)
    return Verdict(
        held_out,
        [{"title": title, "prompt": corpus.tokenizer.decode(p), "text": text} for (title, p), text in written],
    )


def compare(before: HeldOut, after: HeldOut) -> list[str]:
    """Lines that say what post-training has changed."""
    losses = [found.scores["all"].loss for found in (before, after)]
    lines = [f"held-out loss {losses[0]:.3f} → {losses[1]:.3f} nats per target token, before and after"]
    if HELD_OUT_DPO["accuracy"] in after.metrics:
        accuracy, margin = (after.metrics[HELD_OUT_DPO[name]] for name in ("accuracy", "margin"))
        likelier = [found.metrics[HELD_OUT_DPO["likelier"]] for found in (before, after)]
        lines[0] = lines[0].replace("target token", "token of the chosen answers")
        lines.append(
            f"held-out pairs: the chosen answer has the higher reward in {accuracy:.1%}, by {margin:.3f} on average; "
            f"it is the likelier one in {likelier[0]:.1%} → {likelier[1]:.1%}"
        )
    return lines


def write_artifacts(run: Beginning, verdict: Verdict, position: int, at_end: Sequence[AtEnd]) -> None:
    """Write the picture and the summary, call each of `at_end`, and show the summary; `position`: samples seen.

    A disk that fails ends nothing: it is said in one line.
    """
    bigram = summary.bigram_scores(run.config, run.corpus, run.loader, position)
    try:
        picture.draw(run.folder)
        found = summary.collect(run.folder, run.config, run.size, verdict.held_out.scores, bigram, verdict.texts)
        for write in at_end:
            write(run.folder)
        summary.show(found, run.logger)
    except OSError as error:
        run.logger.print(f"the run's picture, summary and report could not be written: {error.strerror}")
