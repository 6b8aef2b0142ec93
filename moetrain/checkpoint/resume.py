"""What a run goes on from: the newest checkpoint that is whole, or the one it is told. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain import runs
from moetrain.checkpoint import manifest
from moetrain.checkpoint.manifest import newest, progress
from moetrain.common.store import is_url
from moetrain.config import Balance, Config, ConfigError, Lora

FREE_OF_MODEL = {"init_std", "path", "trust_remote_code", "weights"}  # options that may change in a run
# router options that may change
FREE = {"freeze", "replay", "replay_missing", "skew", "noise", "capacity_factor", "zero_compute_tau", "k_start"}


def continues_own(config: Config, folder: Path) -> bool:
    """Tell whether `checkpoint.resume` lets a run in `folder` go on with what is its own.

    `auto` does. A path or `none` says how a run begins: the same command again goes on with it.
    """
    choice = config.checkpoint.resume
    if choice == "auto":
        return True
    return (runs.config_of(folder) or {}).get("checkpoint", {}).get("resume") == choice


def known_dtype(folder: Path | None, saved: Path | None) -> str:
    """Return the dtype that the run in `folder` computes in, or else that of `saved`; empty where there is neither."""
    known = runs.config_of(folder) if folder is not None else None
    if known is not None and "dtype" in known.get("train", {}):
        return str(known["train"]["dtype"])
    return str(manifest.read(saved)["config"]["train"].get("dtype", "")) if saved is not None else ""


def find_to_resume(config: Config, folder: Path | None, fetched: Path | None = None) -> Path | None:
    """Return the checkpoint that `checkpoint.resume` means for a run in `folder`, if any; the tensors' bytes are not
    read.

    `fetched`: where that of `checkpoint.resume=URL` lies by now; None: nowhere yet, and it is not looked at.

    Raises `ConfigError` where it is not there, damaged or foreign, or where going on from it would mix two runs in one
    folder.
    """
    present = newest(folder) if folder is not None else None
    own = folder is not None and present is not None and continues_own(config, folder)
    if config.checkpoint.resume == "auto" or own:
        if present is not None:
            check_fits(config, present, same_run=True)
            check_adapters(config, present)
            _check_steps(config, present, progress(present)[0])
        return present
    path = fetched or (None if is_url(config.checkpoint.resume) else find_named(config))
    if fetched is not None:
        check_fits(config, fetched, same_run=False)
    if path is not None:
        check_adapters(config, path)
        _check_steps(config, path, progress(path)[0] + 1)
    if present is not None and (
        path is None
        or not path.resolve().is_relative_to(present.parent.resolve())
        or progress(present) > progress(path)
    ):
        later = progress(present)[0]
        raise ConfigError(f"run.name={config.run.name}: has a checkpoint of step {later} already; take another name")
    return path


def _check_steps(config: Config, path: Path, fewest: int) -> None:
    """The steps of a checkpoint count. Raises `ConfigError` that says how many would train on."""
    steps, done = config.train.steps, progress(path)[0]
    if steps < fewest:
        rule = f"{path} has {done} steps already, and they count: train.steps={done + steps} trains {steps} more"
        rule += f"; run.name=NEW init_from={path} begins a new run with its weights alone"
        raise ConfigError(f"train.steps={steps}: {rule}")


def find_named(config: Config) -> Path | None:
    """Return the folder that `checkpoint.resume` names, if it names one.

    Raises `ConfigError` where it is not there, visibly damaged, or of another model.
    """
    choice = config.checkpoint.resume
    if choice in ("auto", "none"):
        return None
    if is_url(choice):
        raise ConfigError(f"checkpoint.resume={choice}: must be a folder here; `moetrain train` alone takes a URL")
    path = Path(choice)
    if not (path / manifest.MANIFEST).is_file():
        raise ConfigError(f"checkpoint.resume={choice}: must be auto, none or a folder step_N with a manifest.json")
    if said := manifest.problem(path):
        raise ConfigError(f"checkpoint.resume={choice}: {said}")
    check_fits(config, path, same_run=False)
    return path


def find_initial(config: Config) -> Path | None:
    """Return the checkpoint whose weights `init_from` means, if it is set; the tensors' bytes are not read.

    Raises `ConfigError` where it is not there, damaged or of another model.
    """
    choice = config.init_from
    if choice is None:
        return None
    for place in (Path(choice), Path(config.run.dir, choice)):
        if (place / manifest.MANIFEST).is_file():
            path, said = place, manifest.problem(place)
        elif (place / "config.yaml").is_file():
            found = newest(place)
            if found is None:
                raise ConfigError(f"init_from={choice}: the run has no complete checkpoint")
            path, said = found, None
        else:
            continue
        if said:
            raise ConfigError(f"init_from={choice}: {said}")
        check_fits(config, path, same_run=False)
        if manifest.read(path)["config"].get("lora", {}).get("rank"):
            rule = "holds adapters alone, no model; moetrain export --merge writes one, for model=hf"
            raise ConfigError(f"init_from={choice}: {rule}")
        return path
    if Path(choice, "config.json").is_file():
        raise ConfigError(f"init_from={choice}: model=hf model.path={choice} begins with the weights of such a folder")
    raise ConfigError(f"init_from={choice}: must be a run's folder or name, or a folder step_N with a manifest.json")


def check_data(path: Path, data: Mapping[str, str], same_run: bool) -> None:
    """Check that tokens mean what they meant and, where a run goes on, that its documents are the same.

    Raises `ConfigError`.
    """
    theirs = manifest.read(path).get("data", {})
    if theirs.get("tokenizer") != data["tokenizer"]:
        advice = "data.tokenizer=FILE takes that of the corpus it was trained on"
        raise ConfigError(f"checkpoint={path}: was trained with another tokenizer; {advice}")
    if same_run and any(theirs.get(name, data[name]) != data[name] for name in data):
        raise ConfigError(f"checkpoint={path}: was trained on other documents; another run.name starts a new run")


def check_fits(config: Config, path: Path, same_run: bool) -> None:
    """Check that the checkpoint is of this model, and of this data where a run goes on.

    Raises `ConfigError` that names the first difference.
    """
    theirs = manifest.read(path)["config"]
    ours = config.model_dump(mode="json")
    sections = {"model": set(ours["model"]) - FREE_OF_MODEL, "router": set(ours["router"]) - FREE}
    if same_run:
        sections |= {
            "train": {"seed", "seq_len"},
            "data": {"source", "vocab_size", "max_bytes_per_domain", "held_out", "domain_block"},
        }
    for section, fields in sections.items():
        known = type(getattr(config, section)).model_fields
        # what the version that saved it did not know had no other value
        defaults = {name: info.default for name, info in known.items() if not info.is_required()}
        for field in ours[section]:
            value, other = ours[section][field], theirs[section].get(field, defaults.get(field))
            if field in fields and value != other and not (field == "vocab_size" and value is None):
                advice = "; another run.name starts a new run" if same_run else ""
                raise ConfigError(f"{section}.{field}={value}: the checkpoint {path} has {other}{advice}")
    _check_buffers(config.balance, theirs["balance"], path)


def check_adapters(config: Config, path: Path) -> None:
    """Check that a run goes on with the adapters that the checkpoint has. Raises `ConfigError`."""
    theirs = manifest.read(path)["config"].get("lora") or Lora().model_dump(mode="json")
    for field, value in config.lora.model_dump(mode="json").items():
        if value != theirs.get(field):
            raise ConfigError(f"lora.{field}={value}: the checkpoint {path} has {theirs.get(field)}")


def _check_buffers(ours: Balance, theirs: dict[str, Any], path: Path) -> None:
    """What routers keep from step to step must be in the checkpoint, and a bias that is there is part of the model."""
    biased = theirs.get("bias", "none") != "none"
    if (ours.bias != "none") != biased:
        rule = "was trained with one, by which experts are chosen" if biased else "has none"
        raise ConfigError(f"balance.bias={ours.bias}: the checkpoint {path} {rule}")
    if ours.accumulate == "hold" and theirs.get("accumulate") != "hold":
        raise ConfigError(f"balance.accumulate=hold: the checkpoint {path} holds no frequencies; take buffer or exact")
