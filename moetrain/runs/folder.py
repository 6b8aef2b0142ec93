"""A run's folder, `runs/NAME/`: its config, metrics, load trace, checkpoints, wandb files and log."""

import errno
import json
import os
import tempfile
from contextlib import suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from moetrain.common import disk
from moetrain.common.redact import holds_secret
from moetrain.config import Config, ConfigError, HuggingFace, dump, fix_places, hugging_face, vary

ROOM = 1 << 18  # bytes that must fit on the disk: what a run writes before its first step
MODEL_FILES = (".json", ".jinja", ".txt", ".py")  # of a model's folder that a run keeps
MOST_MODEL_BYTES = 1 << 28
SECTIONS = ("run", "model", "router", "train", "data", "balance", "checkpoint")  # what of a run's config is looked into


def make_name(config: Config) -> str:
    """Returns `run.name`, or else that of a new folder in `run.dir`, made of the time and the planner.

    The folder is made, so that no other run gets the name.
    """
    if config.run.name is not None:
        return config.run.name
    begun = f"{datetime.now():%Y%m%d-%H%M%S}-{config.planner.name}"
    for number in count(1):
        folder = Path(config.run.dir, begun if number == 1 else f"{begun}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder.name


def check_writable(config: Config) -> None:
    """Raises `ConfigError` where the run's folder could not be written, or has no room. Leaves nothing behind."""
    folder = Path(config.run.dir) / (config.run.name or "")
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(ROOM))
            file.flush()
    except OSError as error:
        field = f"run.name={config.run.name}" if config.run.name and folder == there else f"run.dir={config.run.dir}"
        rule = "be a folder that can be written"
        rule = "have room for a run" if error.errno in (errno.ENOSPC, errno.EDQUOT) else rule
        raise ConfigError(f"{field}: must {rule} ({error.strerror})") from None


def folder_of(config: Config) -> Path:
    """Return the run's folder; `run.name` is set."""
    return Path(config.run.dir, str(config.run.name))


def heartbeats(folder: Path) -> Path:
    """Return the folder in which the ranks of the run in `folder` say how far they are."""
    return folder / "recovery" / "heartbeat"


def create(config: Config) -> None:
    """Make the folder with the user's umask and write the resolved config; remove what a kill left unfinished."""
    folder = _write(config, "config.yaml")
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())):
        disk.remove_parts(place)


def forget_tracking(folder: Path) -> None:
    """Have the run in `folder` begin as a new one on wandb."""
    (folder / "wandb_id").unlink(missing_ok=True)


def keep_submitted(config: Config) -> Path:
    """Write the configuration of a run that begins later into its folder, which is returned."""
    return _write(fix_places(vary(config, {"run.dir": os.path.abspath(config.run.dir)})), "submitted.yaml")


def _write(config: Config, name: str) -> Path:
    folder = folder_of(config)
    folder.mkdir(parents=True, exist_ok=True)
    secret = holds_secret(config.model_dump(mode="json"))
    disk.write(folder / name, dump(config), 0o600 if secret else 0o666)  # the run needs it complete
    return folder


def model_folder(config: Config) -> Path:
    """Return the folder that a model of `model.source=hf` is built from: its own, or what the run has kept of it."""
    assert isinstance(config.model, HuggingFace)
    return hugging_face.find_folder(config.model.path, config.run.model_dump())


def keep_model(config: Config) -> None:
    """Keep in the run's folder what a model of `model.source=hf` is built from, besides its weights: a run goes on,
    and is exported, where the model's folder is gone."""
    if not isinstance(config.model, HuggingFace):
        return
    place = folder_of(config) / hugging_face.KEPT
    place.mkdir(exist_ok=True)
    for path in sorted(Path(config.model.path).glob("*")):
        small = path.suffix in MODEL_FILES and path.is_file() and path.stat().st_size <= MOST_MODEL_BYTES
        if small and not path.name.endswith(".index.json"):
            disk.write(place / path.name, path.read_text(encoding="utf-8"))


def keep_corpus(folder: Path, fingerprint: dict[str, str]) -> None:
    """Remember in a run's folder which corpus it is trained on."""
    disk.write(folder / "corpus.json", json.dumps(fingerprint) + "\n")


def corpus_of(folder: Path) -> dict[str, str] | None:
    """Return the fingerprint of the corpus that the run in `folder` is trained on; None where none is known."""
    found = disk.read_json(folder / "corpus.json")
    sound = isinstance(found, dict) and found and all(isinstance(digest, str) for digest in found.values())
    return found if sound else None


def config_of(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return the sections of `config.yaml` in a run's folder; None where it is missing or damaged."""
    found = disk.read_yaml(folder / "config.yaml")
    sound = found is not None and all(isinstance(found.get(name), dict) for name in SECTIONS)
    return found if sound else None


def find(name: str | None, directory: str = "runs") -> Path:
    """Find a run by its folder, its name, or the newest one if nothing is named. Raises `ConfigError`."""
    if name is None:
        runs = sorted(Path(directory).glob("*/config.yaml"), key=os.path.getmtime)
        if not runs:
            raise ConfigError(f"run: {directory} has no run; `moetrain train` makes one")
        return runs[-1].parent
    for folder in (Path(name), Path(directory) / name):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"run={name}: must be a run's folder, or the name of one in {directory}")
