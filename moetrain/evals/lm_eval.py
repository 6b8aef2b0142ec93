"""A task of lm-eval in YAML, over local JSON Lines: prompts, examples and answers as lm-eval 0.4.13 builds them.

Templates are the user's, or somebody else's: they are rendered in Jinja's sandbox, and no function is called.
"""

import ast
import json
import random
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from moetrain.common import disk
from moetrain.common.errors import ConfigError, short
from moetrain.config.messages import plain
from moetrain.evals.task import ChoiceTask, Comparison, Extract, Prompt, PromptTask, Task, ask

MOST_BYTES = 1 << 32  # of a file of questions
SEED = 1234  # lm-eval's, of the examples that are drawn
Row = dict[str, Any]


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be a regular expression ({error})") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Files(_Part):
    data_files: str | dict[str, str]


class _Examples(_Part):
    sampler: Literal["default", "first_n"] = "default"


class _Generation(_Part):
    """Greedy, as `PromptTask` is answered."""

    until: str | list[str] | None = None
    max_gen_toks: int = Field(default=256, ge=1)
    do_sample: Literal[False] = False
    temperature: float = Field(default=0.0, ge=0.0, le=0.0)


class _Metric(_Part):
    metric: Literal["acc", "acc_norm", "acc_bytes", "exact_match"]
    aggregation: Literal["mean"] = "mean"
    higher_is_better: bool = True
    ignore_case: bool = False
    ignore_punctuation: bool = False
    regexes_to_ignore: tuple[Pattern, ...] = ()


class _Step(_Part):
    function: Literal["regex", "take_first"]
    regex_pattern: Pattern = r"#### (\-?[0-9\.\,]+)"
    group_select: int = 0
    fallback: str = "[invalid]"


class _Filter(_Part):
    name: str
    filter: list[_Step]


class _Spec(_Part):
    """The fields of lm-eval's YAML that are understood; others are refused by name."""

    task: str | None = None
    dataset_path: Literal["json"]
    dataset_kwargs: _Files
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    output_type: Literal["multiple_choice", "generate_until"] = "generate_until"
    doc_to_text: str
    doc_to_target: int | str | list[str]
    doc_to_choice: str | list[str] | dict[str, str] | None = None
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    fewshot_config: _Examples = _Examples()
    num_fewshot: int = Field(default=0, ge=0)
    generation_kwargs: _Generation = _Generation()
    filter_list: list[_Filter] = []
    metric_list: list[_Metric] = []
    dataset_name: Any = None  # from here on without an effect on what is asked
    tag: Any = None
    task_alias: Any = None
    metadata: Any = None
    repeats: Literal[1] = 1
    should_decontaminate: Any = None
    doc_to_decontamination_query: Any = None


def read_task(path: Path, shots: int | None, limit: int | None) -> Task:
    """Read a task, its first `limit` questions, with `shots` examples in place of the file's `num_fewshot`.

    Raises `ConfigError` that names the file, the field and the rule, and `OSError`.
    """
    try:
        spec = _Spec.model_validate(disk.parsed_yaml(disk.read(path, 1 << 20)))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "it"
        raise ConfigError(f"--task-file={path}: {short(field)}: {plain(first['msg'])}") from None
    except (yaml.YAMLError, ValueError) as error:
        said = short(str(error).splitlines()[0])
        raise ConfigError(f"--task-file={path}: is no YAML that can be read ({said})") from None
    return _Reader(path, spec, spec.num_fewshot if shots is None else shots).read(limit)


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Read the objects in a file of JSON Lines, the first `limit`. Raises `ConfigError` and `OSError`."""
    out = []
    with disk.opened(path, MOST_BYTES) as file:
        for number, line in enumerate(islice(file, limit), 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ConfigError(f"--task-file={path}: line {number} must be a JSON object")
            out.append(row)
    if not out:
        raise ConfigError(f"--task-file={path}: has no question")
    return out


class _Reader:
    def __init__(self, path: Path, spec: _Spec, shots: int) -> None:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import SandboxedEnvironment

        self._path, self._spec, self._shots = path, spec, shots
        self._random = random.Random(SEED)
        self._sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)

    def read(self, limit: int | None) -> Task:
        s = self._spec
        split = s.test_split or s.validation_split
        shown = s.fewshot_split or s.training_split
        if self._shots and shown is None:
            raise self._error("fewshot_split", "must be given, the split that examples are taken from")
        is_own = shown == split  # a question is not among its own examples
        rows = self._read_split("test_split", split, None if is_own else limit)
        pool = rows if is_own else self._read_split("fewshot_split", shown) if self._shots else []
        rows = rows[:limit]
        contexts = [self._context(row, pool, is_own) for row in rows]
        name = s.task or self._path.stem
        if s.output_type == "multiple_choice":
            asked = (self._ask(row, context) for row, context in zip(rows, contexts, strict=True))
            return ChoiceTask(name, tuple(asked), self._shots, s.metric_list[0].metric if s.metric_list else "acc")
        return self._written(name, rows, contexts)

    def _error(self, field: str, rule: str) -> ConfigError:
        return ConfigError(f"--task-file={self._path}: {field}: {rule}")

    def _read_split(self, field: str, name: str | None, limit: int | None = None) -> list[Row]:
        files = self._spec.dataset_kwargs.data_files
        found = files if isinstance(files, str) else files.get(str(name))
        if found is None:
            raise self._error(field, f"must be a split in dataset_kwargs.data_files, not {short(name)}")
        return read_rows(self._path.parent / found, limit)

    def _context(self, row: Row, pool: Sequence[Row], is_own: bool) -> str:
        """The description, the examples and the question."""
        s = self._spec
        parts = [self._render("description", s.description, row)]
        for example in self._choose_examples(row, pool, is_own):
            target = self._target(example)
            target = self._choices(example)[target] if isinstance(target, int) else target
            answer = str(target[0] if isinstance(target, list) else target)
            question = self._render("doc_to_text", s.doc_to_text, example)
            parts.append(f"{question}{s.target_delimiter}{answer}{s.fewshot_delimiter}")
        return "".join([*parts, self._render("doc_to_text", s.doc_to_text, row)])

    def _choose_examples(self, row: Row, pool: Sequence[Row], is_own: bool) -> Sequence[Row]:
        if not self._shots:
            return []
        if len(pool) < self._shots + is_own:
            raise self._error("num_fewshot", f"is {self._shots}, its split has {len(pool)} examples")
        if self._spec.fewshot_config.sampler == "first_n":
            return [other for other in pool if not is_own or other != row][: self._shots]
        drawn = self._random.sample(list(pool), self._shots + is_own)
        return [other for other in drawn if not is_own or other != row][: self._shots]

    def _ask(self, row: Row, context: str) -> Any:
        choices, gold = self._choices(row), self._target(row)
        gold = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise self._error("doc_to_target", f"must be one of {len(choices)} choices, not {short(gold)}")
        return ask(context, choices, gold, self._spec.target_delimiter)

    def _written(self, name: str, rows: Sequence[Row], contexts: Sequence[str]) -> PromptTask:
        s = self._spec
        targets = (target if isinstance(target, list) else [target] for target in map(self._target, rows))
        prompts = (Prompt(c, tuple(map(str, t))) for c, t in zip(contexts, targets, strict=True))
        how = s.metric_list[0] if s.metric_list else _Metric(metric="exact_match")
        stop = s.generation_kwargs.until or [s.fewshot_delimiter]
        task = PromptTask(
            name,
            tuple(prompts),
            self._shots,
            (stop,) if isinstance(stop, str) else tuple(stop),
            s.generation_kwargs.max_gen_toks,
            comparison=Comparison(how.regexes_to_ignore, how.ignore_case, how.ignore_punctuation),
        )
        found = tuple(self._extract(pipeline) for pipeline in s.filter_list)
        return PromptTask(**{**vars(task), "extracts": found}) if found else task

    def _extract(self, pipeline: _Filter) -> Extract:
        steps = [step for step in pipeline.filter if step.function == "regex"]
        if len(steps) != 1:
            raise self._error(f"filter_list.{pipeline.name}", "must have one step of the function regex")
        return Extract(pipeline.name, steps[0].regex_pattern, steps[0].group_select, steps[0].fallback)

    def _target(self, row: Row) -> Any:
        """The number of the right choice, a text, or a list of texts."""
        how = self._spec.doc_to_target
        if not isinstance(how, str):
            return how
        if how in row:
            return row[how]
        text = self._render("doc_to_target", how, row)
        if text.isdigit() and self._spec.doc_to_choice is not None:
            return int(text)
        return self._literal("doc_to_target", text) if text[:1] == "[" and text[-1:] == "]" else text

    def _choices(self, row: Row) -> list[str]:
        how = self._spec.doc_to_choice
        found: Any = list(how.values()) if isinstance(how, dict) else how
        if isinstance(how, str):
            found = row[how] if how in row else self._literal("doc_to_choice", self._render("doc_to_choice", how, row))
        if not isinstance(found, list) or len(found) < 2 or not all(isinstance(text, str) and text for text in found):
            raise self._error("doc_to_choice", f"must give a list of two texts or more, not {short(found)}")
        return found

    def _literal(self, field: str, text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise self._error(field, f"must give a list, not {short(text)}") from None

    def _render(self, field: str, how: str, row: Row) -> str:
        """The field of the row that `how` names, or `how` as a template filled with the row."""
        from jinja2 import TemplateError

        if how in row:
            return str(row[how])
        try:
            return self._sandbox.from_string(how).render(**row)
        except (TemplateError, TypeError, ValueError) as error:
            raise self._error(field, f"cannot be rendered ({short(error)})") from None
