"""`moetrain export`."""

import argparse
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.cli import arguments
from moetrain.common.errors import ConfigError

if TYPE_CHECKING:
    from moetrain.checkpoint.reading import SavedModel
    from moetrain.config import Config

HELP = """Write a run's model as a folder of Hugging Face, which transformers loads with from_pretrained.

Of a LoRA run it writes the adapters, which peft loads; with --merge the model that has them in it.

examples:
  moetrain export runs/demo --out demo-hf                   the newest checkpoint
  moetrain export runs/demo --out demo-bf16 --dtype bf16 --step 200 --shard-size 2GB
  moetrain export runs/lora --out adapters                  the adapters of a LoRA run, for peft
  moetrain export runs/demo --out s3://bucket/demo-hf       into a store (docs/checkpoints.md)
"""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_options(verb: argparse.ArgumentParser) -> None:
    arguments.add_run(verb)
    verb.add_argument(
        "--out", metavar="FOLDER", required=True, help="the folder to write, or its URL; it must not be there"
    )
    verb.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="of the weights; default: fp32, or as a Hugging Face folder had it"
    )
    verb.add_argument(
        "--shard-size", default="5GB", metavar="SIZE", help="most of a file, as 500MB; default: %(default)s"
    )
    verb.add_argument(
        "--merge", action="store_true", help="of a LoRA run: the model with its adapters added, not the adapters alone"
    )
    verb.add_argument("--step", type=arguments.positive, metavar="N", help="a checkpoint's step; default: the newest")
    arguments.add_json(verb)


def execute(options: argparse.Namespace) -> int:
    """Export in this process, without ranks. Returns 0; raises `ConfigError` before anything is written."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from moetrain import runs
    from moetrain.checkpoint import exporting
    from moetrain.common.console import console
    from moetrain.common.store import is_url, open_store
    from moetrain.training.export import prepare_export

    shard_bytes, out = parse_size(options.shard_size), Path(options.out)
    store = open_store(options.out, "--out") if is_url(options.out) else None
    if store is None:
        exporting.check_target(out)
    folder = runs.find(options.run)
    settings, saved = _load(folder, options.step)
    tensors, texts, notes, stem = prepare_export(settings, saved, options.dtype, options.merge)
    total = sum(tensor.block.bytes for tensor in tensors)
    if stem != exporting.STEM and total > shard_bytes:
        raise ConfigError(f"--shard-size={options.shard_size}: peft reads adapters from one file of {total:,} bytes")
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=options.json) as progress:
        task = progress.add_task("checking the checkpoint", total=saved.num_bytes)
        saved.check_bytes(lambda done: progress.advance(task, done))
        task = progress.add_task(f"writing {options.out}", total=total)

        def write(place: Path) -> None:
            exporting.write_folder(place, tensors, texts, shard_bytes, lambda done: progress.advance(task, done), stem)

        if store is None:
            write(out)
        else:
            sent = progress.add_task("uploading", total=total)
            exporting.write_store(store, write, folder, lambda done: progress.advance(sent, done))
    about = {"out": options.out, "checkpoint": str(saved.path), "tensors": len(tensors), "bytes": total, "notes": notes}
    if options.json:
        print(json.dumps(about))
        return 0
    console.print(f"{options.out}: {len(tensors):,} tensors, {total:,} bytes, from {saved.path}")
    for note in notes:
        console.print(note, style="dim")
    return 0


def parse_size(text: str) -> int:
    """Return the bytes that a size as `5GB` means. Raises `ConfigError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if not size:
        raise ConfigError(f"--shard-size={text}: must be a number and a unit, as 500MB or 5GB")
    return size


def _load(folder: Path, step: int | None) -> tuple["Config", "SavedModel"]:
    """The configuration of the run and its checkpoint. Raises `ConfigError`."""
    from moetrain import checkpoint, config
    from moetrain.checkpoint import manifest
    from moetrain.checkpoint.reading import SavedModel

    path = checkpoint.newest(folder) if step is None else folder / "checkpoints" / f"step_{step}"
    if path is None:
        raise ConfigError(f"run={folder}: has no complete checkpoint")
    if not path.is_dir():
        there = ", ".join(str(manifest.step_of(each)) for each in reversed(manifest.folders(folder)))
        raise ConfigError(f"--step={step}: {folder} has checkpoints of the steps {there}")
    settings = config.load_resolved(
        folder / "config.yaml", [], {"run.dir": str(folder.parent), "run.name": folder.name}
    )
    return settings, SavedModel(path)
