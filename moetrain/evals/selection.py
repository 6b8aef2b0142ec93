"""The tasks that a user chose: sets by name, and files of JSON Lines or of lm-eval's YAML."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.common.errors import ConfigError
from moetrain.evals import bundled, lm_eval
from moetrain.evals.lm_eval import Row, read_rows
from moetrain.evals.task import ChoiceTask, Prompt, PromptTask, Question, Task, ask


@dataclass(frozen=True)
class Selection:
    """What `moetrain eval` was told of tasks."""

    names: tuple[str, ...] = ()  # of bundled sets
    files: tuple[str, ...] = ()
    limit: int | None = None  # questions of each task, the first ones
    shots: int | None = None  # examples in each context; None: the task's own number
    max_length: int | None = None  # tokens that the model reads at a time; None: those it was trained with

    def read(self) -> list[Task]:
        """Read all tasks. Raises `ConfigError` in one line, also where two have the same name."""
        tasks = [bundled.read_task(name, self.shots, self.limit) for name in self.names]
        tasks += [read_task_file(Path(file), self.shots, self.limit) for file in self.files]
        names = [task.name for task in tasks]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(f"--tasks={twice[0]}: is named twice")
        return tasks


def read_task_file(path: Path, shots: int | None = None, limit: int | None = None) -> Task:
    """Read a task, its first `limit` questions. `.yaml`: a task of lm-eval; else JSON Lines.

    A line of JSON has `context` and either `choices` with the number of the right one as `label`, or `answer`, a text
    or a list of texts. Raises `ConfigError` that names the file, the line or field, and the rule.
    """
    try:
        if path.suffix in (".yaml", ".yml"):
            return lm_eval.read_task(path, shots, limit)
        if shots is not None:
            raise ConfigError(f"--shots={shots}: a file of JSON Lines has its examples in the contexts: {path}")
        return _read_lines(path, limit)
    except OSError as error:
        raise ConfigError(f"--task-file={path}: cannot be read ({error.strerror})") from None


def _read_lines(path: Path, limit: int | None) -> Task:
    rows = read_rows(path, limit)
    if "choices" in rows[0]:
        rule = "must have context, choices (two texts or more) and label, the number of the right one from 0"
        return ChoiceTask(path.stem, tuple(_each(path, rows, _question_of, rule)), 0)
    rule = "must have context and answer, a text or a list of texts"
    return PromptTask(path.stem, tuple(_each(path, rows, _prompt_of, rule)), 0)


def _question_of(row: Row) -> Question | None:
    match row:
        case {"context": str(context), "choices": [str(), str(), *_] as choices, "label": int(label)}:
            sound = all(isinstance(text, str) and text for text in choices) and 0 <= label < len(choices)
            if sound and not isinstance(label, bool):
                return ask(context, choices, label, " ")
    return None


def _prompt_of(row: Row) -> Prompt | None:
    match row:
        case {"context": str(context), "answer": str(answer)}:
            return Prompt(context, (answer,))
        case {"context": str(context), "answer": [str(), *_] as answers} if all(isinstance(a, str) for a in answers):
            return Prompt(context, tuple(answers))
    return None


def _each(path: Path, rows: Sequence[Row], make: Callable[[Row], Any], rule: str) -> list[Any]:
    out = []
    for number, row in enumerate(rows, 1):
        if (made := make(row)) is None:
            raise ConfigError(f"--task-file={path}: line {number} {rule}")
        out.append(made)
    return out
