"""README and pages say what is there: links, files, verbs with their flags, options, overrides, the example."""

import io
import re
import shlex
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest
import yaml

from moetrain import config
from moetrain.cli import main
from moetrain.config import ConfigError, hugging_face
from moetrain.simulate import request

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [page for page in PAGES if page.is_file()] + sorted((ROOT / "docs").glob("*.md"))
RESULTS = sorted((ROOT / "docs" / "results").rglob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FOLDERS = ("moetrain", "tests", "scripts", "configs", "docs", "launch", "examples")
GROUPS = ("model", "data", "planner", "engine", "experiment", "cluster")
# what readers are told to make themselves: docs/add-a-router.md, docs/launch.md
THEIRS = {
    "router.name=cosine",
    "router.temperature=0.2",
    "model=mine",
    "model.path=DIR",
    "model.path=tiny-$F",
    "experiment=warm",
}
THEIRS |= {"cluster=NAMExDEVICES"}
NO_COMMAND = {"VERB"}


def read_blocks(page: str, *languages: str) -> list[str]:
    """The fenced code blocks of a page in one of these languages."""
    text = (ROOT / page).read_text()
    return [code for language, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages]


def read_spans(page: str) -> list[str]:
    """What stands in single backticks, outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def read_lines(page: str) -> Iterator[str]:
    """Lines of shell in a page, those that a backslash continues joined; and its spans."""
    for block in read_blocks(page, "bash", "sh"):
        yield from block.replace("\\\n", " ").splitlines()
    yield from read_spans(page)


def read_commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Each `moetrain VERB ...` and `launch/....sh ...` of a page: the verb and the words after it."""
    for line in read_lines(page):
        with suppress(ValueError):  # a span that is no line of shell: an apostrophe in a message
            words = shlex.split(line, comments=True)
            words = words[: next((n for n, word in enumerate(words) if word in ("|", "&", "&&", ";", ">")), None)]
            for program, verb in (("moetrain", None), ("launch/local.sh", "train"), ("launch/nodes.sh", "train")):
                if program in words[:4]:
                    rest = words[words.index(program) + 1 :]
                    if verb or (rest and re.fullmatch(r"[a-zA-Z]+", rest[0])):
                        yield (verb or rest.pop(0)), rest


def slugs(page: Path) -> set[str]:
    """Anchors of a page's headings, where GitHub and the site make the same ones."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    found = set()
    for title in re.findall(r"^#+ (.+)$", text, re.M):
        plain = re.sub(r"[^\w\s-]", "", title.lower()).strip()
        if (github := plain.replace(" ", "-")) == re.sub(r"[-\s]+", "-", plain):
            found.add(github)
    return found


@pytest.mark.parametrize("page", [*NAMES, *(str(page.relative_to(ROOT)) for page in RESULTS)])
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        if not file.is_file() or (anchor and anchor not in slugs(file)):
            broken.append(target)
        elif page.startswith("docs/") and not file.resolve().is_relative_to(ROOT / "docs"):
            broken.append(f"{target} is outside of the site")
    assert not broken


@pytest.mark.parametrize("page", NAMES)
def test_files_exist(page: str) -> None:
    missing = []
    for line in read_lines(page):
        for word in re.findall(r"[\w./{},*-]+", line):
            name = word.rstrip(".,/").split("::")[0]
            inside = name.startswith(tuple(f"{folder}/" for folder in FOLDERS))
            if not inside or re.search(r"[A-Z]{3,}|[*{]", name) or name.startswith("docs/results/"):
                continue
            if not (ROOT / name).exists():
                missing.append(name)
    listed = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")}
    for span in read_spans(page):
        if re.fullmatch(r"[\w-]+\.(py|sh)", span) and span not in listed:
            missing.append(span)
    assert not missing


def help_of(*words: str) -> str:
    """What `moetrain WORDS --help` prints."""
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as done:
        main([*words, "--help"])
    assert done.value.code in (0, None), words
    return out.getvalue()


flags_of = cache(lambda *words: set(re.findall(r"(?<!\w)--?[a-z][\w-]*", help_of(*words))))
verbs = cache(lambda: set(re.findall(r"^    ([a-z]+)\b", help_of(), re.M)))


@pytest.mark.parametrize("page", NAMES)
def test_verbs_have_these_flags(page: str) -> None:
    wrong = []
    for verb, words in read_commands(page):
        if verb not in verbs():
            wrong += [verb] if verb not in NO_COMMAND else []
            continue
        known = flags_of("bench", words[0]) if verb == "bench" and words and words[0].islower() else flags_of(verb)
        wrong += [f"{verb} {word}" for word in words if re.match(r"--?[a-z]", word) and word.split("=")[0] not in known]
    assert not wrong


@cache
def read_fields() -> set[str]:
    """Every option by its full name, and every part of one, from the YAML that is shipped."""
    found: set[str] = set()

    def add(tree: object, name: str) -> None:
        found.add(name)
        if isinstance(tree, dict):
            for key, value in tree.items():
                add(value, f"{name}.{key}" if name else key)

    for file in (ROOT / "configs").rglob("*.yaml"):
        text, group = file.read_text(), file.parent.name
        is_own = group in GROUPS and group != "experiment" and "@package _global_" not in text
        add(yaml.safe_load(text), group if is_own else "")
    return found - {""} | {f"model.{name}" for name in hugging_face.SIZES}


def check_word(word: str) -> str | None:
    """What is wrong with `field=value` or with the name of an option, if anything is."""
    field, equals, value = word.partition("=")
    if field in GROUPS:
        choices = {path.stem for path in (ROOT / "configs" / field).glob("*.yaml")}
        fine = not equals or set(value.split(",")) <= choices or "(" in value or value.isupper()
    else:
        fine = field in read_fields()
    return None if fine or word in THEIRS else word


@pytest.mark.parametrize("page", NAMES)
def test_options_exist(page: str) -> None:
    sections = "|".join({name.partition(".")[0] for name in read_fields()})
    pattern = rf"(?:(?:{sections})\.[a-z_]+(?:=\S*)?|(?:{'|'.join(GROUPS)})=\S+)"
    wrong = [check_word(span) for span in read_spans(page) if re.fullmatch(pattern, span)]
    assert not [
        word for word in wrong if word and not re.search(r"\.(py|md|bin|png|html|json|yaml|safetensors)$", word)
    ]


def overrides_of(words: list[str]) -> list[str]:
    """The overrides among the words of a command; of a sweep its first values; none where readers bring their own."""
    found = [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
    if any(word in THEIRS for word in found):
        return []
    sweep = "-m" in words or "--multirun" in words
    return [re.sub(r"(?<=[=,])([^,=]+),.*", r"\1", word) if sweep else word for word in found]


@pytest.mark.parametrize("page", NAMES)
def test_overrides_compose(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    for name in ("pairs.jsonl", "preferences.jsonl", "tokenizer.json"):  # readers of docs/post-train.md wrote them
        (tmp_path / name).touch()
    wrong = []
    for verb, words in read_commands(page):
        overrides = [word for word in overrides_of(words) if not word.startswith("hydra")]
        if verb in ("eval", "generate"):  # these are on top of a run's own configuration
            wrong += [word for word in overrides if check_word(word)]
            continue
        if not overrides or verb not in verbs() or any("..." in word or word.endswith("=") for word in overrides):
            continue
        try:
            (request.read if verb == "simulate" else config.load)(overrides)
        except ConfigError as error:
            wrong.append(f"{verb} {' '.join(overrides)}: {error}")
    assert not wrong


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in NAMES:
        for line in read_lines(page):
            if target := re.match(r"make ([a-z-]+)", line):
                assert target[1] in targets, f"{page}: {line}"


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    named = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert len(named) == len(set(named))
    assert {name for name in named if "/" not in name} == {page.name for page in (ROOT / "docs").glob("*.md")}
    assert all((ROOT / "docs" / name).is_file() for name in named)


def test_the_front_page_leads_to_every_page() -> None:
    text = (ROOT / "docs" / "index.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert not {page for page in pages if f"({page})" not in text}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_readme_shows_the_example_as_it_is() -> None:
    """The tests of the examples run the file."""
    assert read_blocks("README.md", "python") == [(ROOT / "examples" / "plain_loop.py").read_text()]


def test_the_check_finds_what_is_wrong() -> None:
    assert "--dry-run" in flags_of("train")
    assert "--dryrun" not in flags_of("train")
    assert {"train", "doctor"} <= verbs()
    assert check_word("train.stepz=3") == "train.stepz=3"
    assert check_word("planner=homes") == "planner=homes"
    assert check_word("planner.alpha=2") is None
    assert check_word("planner.alpha") is None
    assert overrides_of(["-m", "planner=home,llep", "train.seed=0,1"]) == ["planner=home", "train.seed=0"]


UNCLEAR = (  # phrases that new users stumbled over
    "it is not here",
    "word of it",
    "what it costs a step",
    "do not mind",
    "less FIRST",
    "learnt by heart",
)
BRITISH = r"\w*(?:al|im|on|il)is(?:e[ds]?|ing|ation)\b|\b(?:licences?|learnt|grey|colours?|behaviours?|neighbours?)\b"


@pytest.mark.parametrize("page", NAMES)
def test_words_are_those_of_the_glossary(page: str) -> None:
    """No phrase of a private English, and US spelling; names in backticks and addresses stay as they are."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    text = re.sub(r"`[^`]*`|\[\S+\.md\]\([^)]*\)|\]\([^)]*\)", "", text)
    text = " ".join(text.split())
    assert not [phrase for phrase in UNCLEAR if phrase in text]
    assert not {match[0].lower() for match in re.finditer(BRITISH, text, re.IGNORECASE)}
