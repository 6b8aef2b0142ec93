"""Questions and answers to fine-tune on, out of the docstrings of Python's standard library: `data=chat` reads them.

    python scripts/docstring_pairs.py pairs.jsonl
    python scripts/docstring_pairs.py preferences.jsonl --rejected shuffled

Every public function, class and method with a docstring gives one conversation; its domain is what is asked for. With
`--rejected` it gives a pair: its own answer is the chosen one, and the rejected one has its words in another order
(`shuffled`) or is the answer to another question of its domain (`other`).
"""

import argparse
import ast
import json
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MOST_CHARACTERS = 400  # of an answer: the first paragraph, if it is no longer
LEAST_CHARACTERS = 20


def find_docstrings(library: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (kind, full name, docstring) of all public classes, functions and methods below a folder, in order."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts) or {"test", "tests", "site-packages"} & {
            *parts
        }:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        yield from _find_in(tree, ".".join(part for part in parts if part != "__init__"))


def _find_in(node: ast.AST, name: str) -> Iterator[tuple[str, str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            kind = (
                "class"
                if isinstance(child, ast.ClassDef)
                else "method"
                if isinstance(node, ast.ClassDef)
                else "function"
            )
            if text := ast.get_docstring(child):
                yield kind, f"{name}.{child.name}", text
            if kind == "class":
                yield from _find_in(child, f"{name}.{child.name}")


def answer(docstring: str) -> str:
    """The first paragraph in one line."""
    return re.sub(r"\s+", " ", re.split(r"\n\s*\n", docstring.strip())[0])


def make_conversations(found: Sequence[tuple[str, str, str]]) -> Iterator[dict[str, Any]]:
    """Yields a row for every (kind, question, answer)."""
    for kind, ask, text in found:
        yield {"messages": [_say("user", ask), _say("assistant", text)], "domain": kind}


def make_pairs(found: Sequence[tuple[str, str, str]], rejected: str) -> Iterator[dict[str, Any]]:
    """Yields a row for every question that a rejected answer is found for; which one depends on the question alone."""
    answers: dict[str, list[str]] = {}
    for kind, _, text in found:
        answers.setdefault(kind, []).append(text)
    for kind, ask, text in found:
        draw, words = random.Random(ask), text.split()
        wrong = " ".join(draw.sample(words, len(words))) if rejected == "shuffled" else draw.choice(answers[kind])
        if wrong != text:
            own = {"prompt": [_say("user", ask)], "chosen": [_say("assistant", text)]}
            yield {**own, "rejected": [_say("assistant", wrong)], "domain": kind}


def _say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument(
        "--library", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="a folder of Python"
    )
    parser.add_argument("--rejected", choices=["shuffled", "other"], help="write pairs with such a rejected answer")
    options = parser.parse_args()
    found = [
        (kind, f"What does the {kind} {name} do?" if kind != "class" else f"What is the class {name}?", text)
        for kind, name, docstring in find_docstrings(options.library)
        if LEAST_CHARACTERS <= len(text := answer(docstring)) <= MOST_CHARACTERS
    ]
    rows = list(make_pairs(found, options.rejected) if options.rejected else make_conversations(found))
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{options.out}: {len(rows):,} {'pairs' if options.rejected else 'conversations'}")


if __name__ == "__main__":
    main()
