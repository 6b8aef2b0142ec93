"""A sweep, `moetrain train -m`: Hydra's sweeper takes the overrides apart, Hydra's launcher starts each run.

A run is a process with workers of its own: here, one after another or several at once (`hydra/launcher=joblib`), or
wherever Slurm finds room (`hydra/launcher=submitit_slurm`). All are below `run.dir/run.name`.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from rich.table import Table

from moetrain import config, runs
from moetrain.common import disk
from moetrain.common.console import console, styled
from moetrain.config import Config, ConfigError
from moetrain.launch.exits import REQUEUE
from moetrain.launch.signals import INTERRUPTED, REQUESTS

FAILED = float("nan")  # the result of a run that has none
ASKED = ".asked"  # a file in the sweep's folder: the runs under way are to save and end, no other is to begin
LOOK_SECONDS = 0.1


def run_sweep(overrides: Sequence[str], extra_dir: str | None) -> int:
    """Every combination of the values given, `field=a,b,c`. Returns the exit code; raises `ConfigError`."""
    if "RANK" in os.environ:
        raise ConfigError("--multirun: a sweep starts the workers of its runs itself; start it without torchrun")
    parsed = _parsed(overrides, extra_dir)
    _check_launcher(parsed)
    swept = [o for o in parsed if o.is_sweep_override()]
    if not swept:
        raise ConfigError("--multirun: no field has several values (planner=home,llep)")
    if named := [o for o in swept if o.key_or_group in ("run.name", "run.dir")]:
        raise ConfigError(f"{named[0].input_line}: a sweep has one name, its runs are named by what differs")
    same = [str(o.key_or_group) for o in parsed if not o.is_sweep_override()]
    settings = config.load([str(o.input_line) for o in parsed if not o.is_sweep_override() and _is_ours(o)], extra_dir)
    folder = Path(settings.run.dir, settings.run.name or f"{datetime.now():%Y%m%d-%H%M%S}-sweep").resolve()
    runs.check_writable(settings)
    names = _checked(parsed, same, extra_dir)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / ASKED).unlink(missing_ok=True)
    heard: list[int] = []

    def hear(number: int, _: object) -> None:
        heard.append(number)
        (folder / ASKED).touch()

    for number in REQUESTS:
        signal.signal(number, hear)
    sys.argv = [sys.argv[0], "--multirun", *overrides, *_options(folder, same)]
    sys.argv += [f"--config-dir={Path(extra_dir).resolve()}"] if extra_dir else []
    hydra.main(version_base="1.3", config_path=str(config.config_dir()), config_name="config")(_one)()
    (folder / ASKED).unlink(missing_ok=True)
    code = _show(folder, names)
    return (INTERRUPTED if signal.SIGINT in heard else REQUEUE) if heard else code


def _parsed(overrides: Sequence[str], extra_dir: str | None) -> list[Override]:
    out: list[Override] = []
    with config.composing(extra_dir) as loader:
        parser = OverridesParser.create(loader)  # which glob() looks through
        for override in overrides:
            try:
                out += parser.parse_overrides([override])  # parse_override alone forgets the loader
            except HydraException:
                raise ConfigError(f"{override}: not an override as Hydra reads it (field=value, field=a,b,c)") from None
    return out


def _is_ours(override: Override) -> bool:
    return not override.is_hydra_override()


def _find_override(parsed: Sequence[Override], group: str) -> str:
    """The value given for one of Hydra's own groups, or nothing."""
    return next((str(o.value()) for o in parsed if o.key_or_group == group), "")


def _check_launcher(parsed: Sequence[Override]) -> None:
    """That Hydra's launcher is installed."""
    launcher = _find_override(parsed, "hydra/launcher")
    package = launcher.partition("_")[0]
    if package in ("joblib", "submitit") and find_spec(f"hydra_plugins.hydra_{package}_launcher") is None:
        raise ConfigError(f"hydra/launcher={launcher}: needs a package, pip install 'moetrain[sweep]'")


def _checked(parsed: Sequence[Override], same: Sequence[str], extra_dir: str | None) -> list[str] | None:
    """The names of all runs, whose settings are sound. None where a sweeper finds out as it goes."""
    if _find_override(parsed, "hydra/sweeper"):
        return None
    try:
        (jobs,) = BasicSweeper.split_arguments([o for o in parsed if _is_ours(o)], None)
    except HydraException as error:
        raise ConfigError(f"--multirun: {str(error).partition(chr(10))[0]}") from None
    here = not _find_override(parsed, "hydra/launcher").startswith("submitit")
    for job in jobs:
        _check(config.load(job, extra_dir), here)
    return [_name(number, job, same) for number, job in enumerate(jobs)]


def _check(settings: Config, here: bool) -> None:
    """`here`: the run will be on this host, whose devices tell how many workers it has."""
    from moetrain.launch import local

    if here or settings.parallel.nproc:
        config.find_ep(settings, settings.parallel.nproc or local.auto_nproc())


def _name(number: int, overrides: Sequence[str], same: Sequence[str]) -> str:
    """Of a run, by its number and what differs."""
    differs = [o for o in overrides if o.partition("=")[0].lstrip("+~") not in same]
    return re.sub(r"[^\w.+-]+", "-", "-".join([str(number), *differs]))


def _options(folder: Path, same: Sequence[str]) -> list[str]:
    """Hydra's own, for runs whose folders are made by moetrain."""
    return [
        f"hydra.sweep.dir='{folder}'",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
        f"hydra.job.config.override_dirname.exclude_keys=[{','.join(same)}]",
    ]


def _one(_: DictConfig) -> float:
    """One run of the sweep. Returns its held-out bits per byte, which a sweeper that searches takes for the score."""
    given = HydraConfig.get()
    folder = Path(given.sweep.dir)
    name = _name(given.job.num, given.overrides.task, given.job.config.override_dirname.exclude_keys)
    overrides = [o for o in given.overrides.task if o.partition("=")[0] not in ("run.name", "run.dir")]
    sources = [s.path for s in given.runtime.config_sources if s.provider == "command-line"]
    command = [sys.executable, "-m", "moetrain", "train", *overrides, f"run.dir='{folder}'", f"run.name='{name}'"]
    command += [f"--config-dir={path}" for path in sources]
    if (folder / ASKED).exists():
        return FAILED
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # another process than the sweep's
        signal.signal(signal.SIGINT, lambda *_: None)
    together = {"WANDB_RUN_GROUP": folder.name, **os.environ}  # of wandb; track.group comes before it
    with subprocess.Popen(command, env=together) as process:
        while process.poll() is None:
            if (folder / ASKED).exists():
                process.send_signal(signal.SIGTERM)
                process.wait()
            time.sleep(LOOK_SECONDS)
    found = _summary(folder / name) if process.returncode == 0 else None
    bits = found["bits_per_byte"].get("all") if found else None
    return FAILED if bits is None else bits


def _summary(run: Path) -> dict | None:
    found = disk.read_json(run / "summary.json")
    return (
        found
        if isinstance(found, dict) and {"bits_per_byte", "tokens_per_second", "imbalance"} <= found.keys()
        else None
    )


def _show(folder: Path, names: Sequence[str] | None) -> int:
    """The runs side by side. Returns 1 where one of them failed."""
    if names is None:
        found = [path.parent.name for path in folder.glob("*-*/config.yaml")]
        names = sorted((n for n in found if n[0].isdigit()), key=lambda n: int(re.match(r"\d+", n)[0]))  # type: ignore[index]
    summaries = {name: _summary(folder / name) for name in names}
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("run", "bits per byte", "tokens/s", "imbalance at home", "planned"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, summary in summaries.items():
        if summary is not None:
            bits = summary["bits_per_byte"].get("all")
            values = "–" if bits is None else f"{bits:.3f}", f"{summary['tokens_per_second']:,.0f}"
            balance = summary["imbalance"]
            table.add_row(name, *values, f"{balance['home']:.3f}", f"{balance['planned']:.3f}")
    console.print(table)
    missing = [name for name, summary in summaries.items() if summary is None]
    if missing:
        rest = f" {', '.join(missing)}; the same command goes on with them"
        console.print(styled(("not complete:", "red"), (rest, "")))
    console.print(f"compare them: moetrain report {folder}/[0-9]*/")
    return 1 if missing else 0
