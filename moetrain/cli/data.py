"""`moetrain data`."""

import argparse
import json

from moetrain.cli import arguments
from moetrain.common.console import console, styled

HELP = """Prepare a corpus: tokenizer, token files, held-out split. `train` does it where it has not been done.

examples:
  moetrain data                                             the text files of this Python installation
  moetrain data data=folder data.path=books                 your own text files (folders are domains) or JSONL
"""


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_overrides(verb)
    arguments.add_json(verb)
    arguments.add_config_dir(verb)


def execute(options: argparse.Namespace) -> int:
    from moetrain import config
    from moetrain.data import prepare

    settings = config.load(options.overrides, options.config_dir)
    known = prepare.current(settings.data)
    folder = known or prepare.ensure(settings.data)
    manifest = json.loads((folder / "manifest.json").read_text())
    if options.json:
        print(json.dumps({"folder": str(folder), "up_to_date": known is not None, **manifest}))
        return 0
    if known:
        console.print(prepare.up_to_date(known, settings.data))
    console.print(styled((str(folder), "bold"), (f": vocabulary {manifest['vocab_size']:,}", "")))
    for split, facts in manifest["splits"].items():
        shares = ", ".join(f"{name} {count:,}" for name, count in facts["tokens_per_domain"].items())
        console.print(f"{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens ({shares})")
    if known:
        console.print("\n".join(prepare.news(manifest, settings.data)))
    return 0
