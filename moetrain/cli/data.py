"""`moetrain data`."""

import argparse
import json

from moetrain.cli import arguments
from moetrain.common.console import console, styled

HELP = """Prepare a corpus: tokenizer, token files, held-out split. `train` does it where it has not been done.

examples:
  moetrain data                                             the text files of this Python installation
  moetrain data data=folder data.path=books                 your own text files (folders are domains), JSONL or Parquet
  moetrain data data=tokens data.sources.web.path=PREFIX    check files of tokens: Megatron's, or prepared ones
  moetrain data data=chat data.path=chat.jsonl --show 3     conversations; what is not learned of them is dimmed
"""


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_overrides(verb)
    arguments.add_json(verb)
    arguments.add_config_dir(verb)
    verb.add_argument(
        "--show", type=int, default=0, metavar="N", help="print the first N documents of the training split"
    )


def execute(options: argparse.Namespace) -> int:
    from moetrain import config
    from moetrain.data import prepare, preview

    settings = config.load(options.overrides, options.config_dir)
    known = prepare.current(settings.data)
    folder = known or prepare.ensure(settings.data)
    manifest = json.loads((folder / "manifest.json").read_text())
    shown = preview.read_documents(folder, options.show) if options.show > 0 else []
    if options.json:
        rows = {"shown": [document._asdict() for document in shown]} if options.show > 0 else {}
        print(json.dumps({"folder": str(folder), "up_to_date": known is not None, **manifest, **rows}))
        return 0
    if known:
        console.print(prepare.up_to_date(known, settings.data))
    console.print(styled((str(folder), "bold"), (f": vocabulary {manifest['vocab_size']:,}", "")))
    for split, facts in manifest["splits"].items():
        shares = ", ".join(f"{name} {count:,}" for name, count in facts["tokens_per_domain"].items())
        console.print(f"{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens ({shares})")
    if known:
        console.print("\n".join(prepare.news(manifest, settings.data)))
    for document in shown:
        preview.show(document)
    return 0
