"""A sweep, `moetrain train -m`: Hydra's sweeper takes the overrides apart, Hydra's launcher starts each run.

A run is a process with workers of its own: here, one after another or several at once (`hydra/launcher=joblib`), or
wherever Slurm finds room (`hydra/launcher=submitit_slurm`). All are below `run.dir/run.name`.
"""

import json
import os
import re
import subprocess
import sys
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
from moetrain.config import ConfigError
from moetrain.observe.console import console
from moetrain.recovery.exits import REQUEUE
from moetrain.recovery.signals import INTERRUPTED

FAILED = float("nan")  # the result of a run that has none


def run(overrides: Sequence[str], extra_dir: str | None) -> int:
    """Every combination of the values given, `field=a,b,c`. Returns the exit code; raises `ConfigError`."""
    if "RANK" in os.environ:
        raise ConfigError("--multirun: a sweep starts the workers of its runs itself; start it without torchrun")
    parsed = _parsed(overrides)
    _check_launcher(parsed)
    swept = [o for o in parsed if o.is_sweep_override()]
    if not swept:
        raise ConfigError("--multirun: no field has several values (planner=home,llep)")
    if named := [o for o in swept if o.key_or_group in ("run.name", "run.dir")]:
        raise ConfigError(f"{named[0].input_line}: a sweep has one name, its runs are named by what differs")
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override() and not o.is_hydra_override()]
    settings = config.load(fixed, extra_dir)
    if not any(o.key_or_group == "hydra/sweeper" for o in parsed):
        for batch in BasicSweeper.split_arguments([o for o in parsed if not o.is_hydra_override()], None):
            for one in batch:
                runs.check_writable(config.load(one, extra_dir))
    folder = Path(settings.run.dir, settings.run.name or f"{datetime.now():%Y%m%d-%H%M%S}-sweep").resolve()
    same = [o.key_or_group for o in parsed if not o.is_sweep_override()]
    sys.argv = [sys.argv[0], "--multirun", *overrides, *_options(folder, same)]
    sys.argv += [f"--config-dir={Path(extra_dir).resolve()}"] if extra_dir else []
    hydra.main(version_base="1.3", config_path=str(config.config_dir()), config_name="config")(_one)()
    return _show(folder)


def _parsed(overrides: Sequence[str]) -> list[Override]:
    parser, out = OverridesParser.create(), []
    for override in overrides:
        try:
            out.append(parser.parse_override(override))
        except HydraException:
            raise ConfigError(f"{override}: not an override as Hydra reads it (field=value, field=a,b,c)") from None
    return out


def _check_launcher(parsed: Sequence[Override]) -> None:
    """That Hydra's launcher is installed."""
    for override in parsed:
        package = str(override.value()).partition("_")[0]
        if override.key_or_group != "hydra/launcher" or package not in ("joblib", "submitit"):
            continue
        if find_spec(f"hydra_plugins.hydra_{package}_launcher") is None:
            raise ConfigError(f"{override.input_line}: needs a package, pip install 'moetrain[sweep]'")


def _options(folder: Path, same: Sequence[str]) -> list[str]:
    """Hydra's own, for runs whose folders are made by moetrain."""
    dirname = "hydra.job.config.override_dirname"
    return [
        f"hydra.sweep.dir='{folder}'",
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=disabled",
        f"{dirname}.exclude_keys=[{','.join(same)}]",
        f"{dirname}.kv_sep=-",
        f"{dirname}.item_sep=-",
    ]


def _one(_: DictConfig) -> float:
    """One run of the sweep. Returns its held-out bits per byte, which a sweeper that searches takes for the score."""
    given = HydraConfig.get()
    folder = Path(given.sweep.dir)
    name = re.sub(r"[^\w.+-]+", "-", f"{given.job.num}-{given.job.override_dirname}")
    overrides = [o for o in given.overrides.task if o.partition("=")[0] not in ("run.name", "run.dir")]
    sources = [s.path for s in given.runtime.config_sources if s.provider == "command-line"]
    command = [sys.executable, "-m", "moetrain", "train", *overrides, f"run.dir='{folder}'", f"run.name='{name}'"]
    command += [f"--config-dir={path}" for path in sources]
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:  # it heard it too: it saves, and ends
                continue
    if process.returncode in (INTERRUPTED, REQUEUE):
        raise SystemExit(process.returncode)
    found = _summary(folder / name) if process.returncode == 0 else None
    return found["bits_per_byte"]["all"] if found else FAILED


def _summary(run: Path) -> dict | None:
    path = run / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _show(folder: Path) -> int:
    """The runs side by side. Returns 1 where one of them failed."""
    found = sorted((p.parent for p in folder.glob("*/config.yaml")), key=lambda p: int(p.name.partition("-")[0]))
    table = Table(box=None, header_style="bold")
    for column in ("run", "bits per byte", "tokens/s", "imbalance at home", "planned"):
        table.add_column(column, justify="left" if column == "run" else "right")
    whole = [(run, summary) for run in found if (summary := _summary(run))]
    for run, summary in whole:
        balance = summary["imbalance"]
        values = f"{summary['bits_per_byte']['all']:.3f}", f"{summary['tokens_per_second']:,.0f}"
        table.add_row(run.name, *values, f"{balance['home']:.3f}", f"{balance['planned']:.3f}")
    console.print(table)
    if missing := [run.name for run in found if run not in [run for run, _ in whole]]:
        console.print(f"[red]not complete:[/] {', '.join(missing)}; the same command goes on with them")
    console.print(f"compare them: moetrain report {folder}/*/")
    return 1 if missing or not found else 0
