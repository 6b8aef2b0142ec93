"""The package as a newcomer gets it: the wheel outside a checkout, torchrun, the README's map."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=cwd, env={**os.environ, "COLUMNS": "120", **env}
    )


def test_the_wheel_trains_in_an_empty_folder(data: list[str], tmp_path: Path) -> None:
    """Built as pip builds it, unpacked away from the checkout, run with nothing else around."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    built = run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)], tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    assert run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], tmp_path).returncode == 0
    empty.mkdir()
    env = {"PYTHONPATH": str(site)}
    where = run([sys.executable, "-c", "import moetrain; print(moetrain.__file__)"], empty, **env)
    assert where.stdout.startswith(str(site))
    overrides = ["model=tiny", "train.seq_len=32", "train.global_batch=4", "train.steps=2", "parallel.nproc=2"]
    overrides += [*data, "eval.tokens_per_domain=64", "generate.tokens=2", "run.name=wheel", "track.wandb=false"]
    done = run([sys.executable, "-m", "moetrain", "train", *overrides], empty, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (empty / "runs" / "wheel" / "summary.json").is_file()


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
    patterns = ("moetrain/**/*.py", "docs/*.md", "launch/*", "configs/*", "scripts/*", "tests/*.py")
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).stdout.splitlines()
    tracked = {ROOT / name for name in listed} | {(ROOT / name).parent for name in listed}
    actual = {p.relative_to(ROOT).as_posix() for pattern in patterns for p in ROOT.glob(pattern) if p in tracked}
    actual = {name for name in actual if not name.endswith("__init__.py")}
    assert mapped == actual
