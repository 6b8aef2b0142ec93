"""What a task's answers are worth: metrics, a file in the run's folder, a row of the table."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from moetrain.common import disk
from moetrain.evals.task import ChoiceTask, PromptTask, Question
from moetrain.observe.collect.health import max_vio

FOLDER = "eval"


@dataclass(frozen=True)
class Result:
    """Of one task."""

    name: str
    shots: int
    primary: str
    metrics: Mapping[str, float]  # each but bits per byte with its standard error as NAME_stderr
    answers: Sequence[Mapping[str, Any]]  # of every question
    experts: Mapping[str, Sequence[int]]  # tokens that each expert of a layer computed, by layer
    num_cut: int  # requests that lost their left part, being longer than the model's sequences

    @property
    def imbalance(self) -> float:
        """The largest load of an expert over the mean, averaged over layers."""
        found = [1 + max_vio(np.asarray(counts)) for counts in self.experts.values() if sum(counts)]
        return float(np.mean(found)) if found else math.nan

    def summary(self) -> dict[str, Any]:
        """Return the result without the single answers."""
        out = {"task": self.name, "shots": self.shots, "questions": len(self.answers), "primary": self.primary}
        return out | {"metrics": dict(self.metrics), "cut": self.num_cut, "expert_imbalance": self.imbalance}


def judge_choices(task: ChoiceTask, values: Sequence[Sequence[float]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the metrics and the single answers; `values`: log-likelihoods (nats) of the choices.

    `acc` takes the likeliest choice, `acc_norm` and `acc_bytes` the one with the best log-likelihood per character and
    per byte. `bits_per_byte` is that of the right choice, averaged over questions.
    """
    answers: list[dict[str, Any]] = []
    hits: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
    bits = []
    for question, nats in zip(task.questions, values, strict=True):
        picked = _pick(question, nats)
        for name, choice in picked.items():
            hits[name].append(float(choice == question.gold))
        size = len(question.texts[question.gold].encode())
        bits.append(-nats[question.gold] / math.log(2) / max(1, size))
        answers.append({"log_likelihoods": list(nats), "gold": question.gold, "choice": picked.get(task.primary)})
    metrics = {name: value for name, found in hits.items() if found for name, value in _mean(name, found).items()}
    return metrics | {"bits_per_byte": float(np.mean(bits))}, answers


def _pick(question: Question, nats: Sequence[float]) -> dict[str, int]:
    """The choice that each metric takes; of equal ones the first. None where there is no choice."""
    if len(nats) < 2:
        return {}
    characters = [max(1, len(text)) for text in question.texts]
    size = [max(1, len(text.encode())) for text in question.texts]
    scores = {"acc": np.asarray(nats), "acc_norm": np.divide(nats, characters), "acc_bytes": np.divide(nats, size)}
    return {name: int(found.argmax()) for name, found in scores.items()}


def judge_texts(task: PromptTask, texts: Sequence[str]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the metrics and the single answers; `texts`: what the model wrote. Of several extracts, each is scored."""
    metrics: dict[str, float] = {}
    answers: list[dict[str, Any]] = [
        {"text": text, "answers": list(prompt.answers)} for text, prompt in zip(texts, task.prompts, strict=True)
    ]
    for extract in reversed(task.extracts):  # the first has the plain name
        name = "exact_match" if extract is task.extracts[0] else f"exact_match,{extract.name}"
        right = [
            task.comparison.match(extract.find(text), prompt.answers)
            for text, prompt in zip(texts, task.prompts, strict=True)
        ]
        metrics = _mean(name, [float(r) for r in right]) | metrics
        for answer, is_right in zip(answers, right, strict=True):
            answer["right"] = is_right
    return metrics, answers


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {name: float(np.mean(values)), f"{name}_stderr": spread}


def keep(run: Path, checkpoint: Path, result: Result) -> Path:
    """Write `RUN/eval/NAME.json`, whole or not at all; characters that do not suit a file are left out of the name."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", result.name).lstrip(".") or "task"
    path = disk.make_own(run / FOLDER) / f"{name}.json"
    body = {"checkpoint": checkpoint.name, **_finite(result.summary())}
    body |= {"experts": dict(result.experts), "answers": result.answers}
    disk.write(path, json.dumps(body) + "\n")
    return path


def to_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [_finite(result.summary()) for result in results]


def _finite(tree: Any) -> Any:
    """The tree with None in place of numbers that JSON has no word for."""
    if isinstance(tree, dict):
        return {name: _finite(value) for name, value in tree.items()}
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def tabulate(results: Sequence[Result]) -> Table:
    """Return the table for a terminal: a row a task, with the metric it is known for and those of its kind.

    The last column is the largest load of an expert over the mean, averaged over layers.
    """
    table = Table()
    for name in ("task", "shots", "questions", "result", "acc", "acc_norm", "acc_bytes", "bits/byte", "load max/mean"):
        table.add_column(name, justify="left" if name in ("task", "result") else "right", no_wrap=name == "result")
    for r in results:
        spread = r.metrics.get(f"{r.primary}_stderr", math.nan)
        value = f"{r.primary} {_cell(r.metrics[r.primary])}" + (f" ± {_cell(spread)}" if spread == spread else "")
        cells = [_cell(r.metrics.get(name)) for name in ("acc", "acc_norm", "acc_bytes", "bits_per_byte")]
        table.add_row(r.name, str(r.shots), str(len(r.answers)), value, *cells, _cell(r.imbalance, 2))
    return table


def _cell(value: float | None, digits: int = 3) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.{digits}f}"
