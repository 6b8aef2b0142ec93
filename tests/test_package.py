"""The package as a newcomer gets it: the wheel outside a checkout, torchrun, the README's map."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=cwd, env={**os.environ, "COLUMNS": "120", **env}
    )


def test_what_the_dockerfile_installs_trains_in_an_empty_folder(data: list[str], tmp_path: Path) -> None:
    """Its lines in a clean environment, but for the system's packages; those that moetrain needs are this one's."""
    image, empty, here = tmp_path / "image", tmp_path / "empty", sysconfig.get_paths()["purelib"]
    empty.mkdir()
    clean = {"PATH": f"{Path(sys.executable).parent}:{os.defpath}", "HOME": str(tmp_path), "PYTHONPATH": here}
    pip = {"PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    for word, _, rest in (line.partition(" ") for line in text.splitlines()):
        rest = rest.replace("/opt/", f"{image}/opt/").replace("/src", f"{image}/src")
        if word == "COPY":
            *names, to = rest.split()
            for name in names:
                Path(to).parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    Path(to).mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / name, to)
        elif word == "RUN" and "apt-get" not in rest:
            ran = subprocess.run(["sh", "-c", rest], env=clean | pip, capture_output=True, text=True, timeout=120)
            assert ran.returncode == 0, ran.stderr
    python = image / "opt" / "moetrain" / "bin" / "python"
    ask = [str(python), "-c", "import moetrain; print(moetrain.__file__)"]
    where = subprocess.run(ask, capture_output=True, text=True, cwd=empty, env=clean)
    assert where.stdout.startswith(str(image)), where.stderr
    overrides = ["model=tiny", "train.seq_len=32", "train.global_batch=4", "train.steps=2", "parallel.nproc=2"]
    overrides += [*data, "eval.tokens_per_domain=64", "generate.tokens=2", "run.name=image", "track.wandb=false"]
    done = run([str(python.with_name("moetrain")), "train", *overrides], empty, PYTHONPATH=here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (empty / "runs" / "image" / "summary.json").is_file()


@pytest.mark.parametrize("script", ["nodes.sh", "slurm.sh"])
def test_launch_scripts_say_how_they_are_used(script: str, tmp_path: Path) -> None:
    done = run(["bash", str(ROOT / "launch" / script), "node-1", "2", "8", "model=tiny"], tmp_path)
    assert done.returncode == 2
    assert f"launch/{script} " in done.stderr
    assert "run.name=" in done.stderr
    assert "set -euo" not in done.stderr


def test_torchrun_starts_the_same_program(data: list[str], tmp_path: Path) -> None:
    overrides = ["model=tiny", "train.seq_len=32", "train.global_batch=4", "train.steps=2", "track.wandb=false"]
    overrides += [*data, "eval.tokens_per_domain=64", "generate.tokens=2", f"run.dir={tmp_path}/runs"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = run(["bash", str(ROOT / "launch" / "local.sh"), "2", *overrides], tmp_path, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()  # both ranks agreed on a name
    assert (folder / "summary.json").is_file()


def test_the_readme_maps_every_file() -> None:
    """One line each, none of them gone."""
    text = (ROOT / "README.md").read_text()
    mapped = set(re.findall(r"^\| `([^` ]+/[^` ]+)` \|", text[text.index("## The map") :], re.MULTILINE))
    patterns = (
        "moetrain/**/*.py",
        "docs/*.md",
        "launch/*",
        "configs/*",
        "scripts/*",
        "tests/*.py",
        "tests/faults/*.py",
    )
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).stdout.splitlines()
    tracked = {ROOT / name for name in listed} | {(ROOT / name).parent for name in listed}
    actual = {p.relative_to(ROOT).as_posix() for pattern in patterns for p in ROOT.glob(pattern) if p in tracked}
    actual = {name for name in actual if not name.endswith("__init__.py")}
    assert mapped == actual
