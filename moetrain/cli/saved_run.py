"""The configuration of a run that has a checkpoint, for verbs that use one."""

from collections.abc import Sequence

from moetrain import checkpoint, config, runs
from moetrain.common.errors import ConfigError
from moetrain.config import Config


def load_run(name: str | None, overrides: Sequence[str]) -> Config:
    """The configuration of the run in the folder or of the name `name`, by default the newest one, with `overrides`.

    Raises `ConfigError` where there is no complete checkpoint, or where it does not fit the overrides.
    """
    folder = runs.find(name)
    if folder.name in ("", ".."):
        folder = folder.resolve()
    saved = checkpoint.newest(folder)
    if saved is None:
        raise ConfigError(f"run={folder}: has no complete checkpoint")
    facts = {"run.dir": str(folder.parent), "run.name": folder.name, "data.on_change": "keep"}  # its own corpus
    settings = config.load_resolved(folder / "config.yaml", overrides, facts)
    checkpoint.check_fits(settings, saved, same_run=True)
    return settings
