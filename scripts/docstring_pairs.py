"""Questions and answers to fine-tune on, out of the docstrings of Python's standard library: `data=chat` reads them.

    python scripts/docstring_pairs.py pairs.jsonl

Every public function, class and method with a docstring gives one conversation; its domain is what is asked for.
"""

import argparse
import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument(
        "--library", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="a folder of Python"
    )
    options = parser.parse_args()
    count = 0
    with options.out.open("w", encoding="utf-8") as out:
        for kind, name, docstring in find_docstrings(options.library):
            if LEAST_CHARACTERS <= len(text := answer(docstring)) <= MOST_CHARACTERS:
                ask = f"What does the {kind} {name} do?" if kind != "class" else f"What is the class {name}?"
                messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": text}]
                out.write(json.dumps({"messages": messages, "domain": kind}) + "\n")
                count += 1
    print(f"{options.out}: {count:,} conversations")


if __name__ == "__main__":
    main()
