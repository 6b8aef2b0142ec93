"""The package as a newcomer gets it: the wheel outside a checkout, its packages, torchrun, the map."""

import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moetrain import config
from moetrain.common import versions
from moetrain.distributed.mesh import Mesh
from moetrain.doctor.host import LEAST_TORCH
from moetrain.training.loop import train

ROOT = Path(__file__).parents[2]


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=cwd, env={**os.environ, "COLUMNS": "120", **env}
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Dockerfile installs, but for the system's packages; those that moetrain needs are this environment's."""
    image = tmp_path_factory.mktemp("image")
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
            ran = subprocess.run(
                ["sh", "-c", rest], env=clean(image) | pip, capture_output=True, text=True, timeout=120
            )
            assert ran.returncode == 0, ran.stderr
    return image


def clean(image: Path) -> dict[str, str]:
    """An environment without anything of ours but the packages."""
    path = f"{Path(sys.executable).parent}:{os.defpath}"
    return {"PATH": path, "HOME": str(image), "PYTHONPATH": sysconfig.get_paths()["purelib"]}


def test_what_the_dockerfile_installs_works_in_an_empty_folder(image: Path, tmp_path: Path) -> None:
    """Its own modules and configs, not those of the checkout."""
    program = image / "opt" / "moetrain" / "bin" / "moetrain"
    ask = [str(program.with_name("python")), "-c", "import moetrain; print(moetrain.__file__)"]
    where = subprocess.run(ask, capture_output=True, text=True, cwd=tmp_path, env=clean(image))
    assert where.stdout.startswith(str(image)), where.stderr
    assert Path(where.stdout.strip()).with_name("py.typed").is_file()
    command = [str(program), "config", "model=tiny", "planner=llep", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean(image))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["planner"]["name"] == "llep"


@pytest.mark.grid  # its kernels are compiled from the beginning: two minutes
def test_what_the_dockerfile_installs_trains_in_an_empty_folder(image: Path, data: list[str], tmp_path: Path) -> None:
    overrides = ["model=tiny", "train.seq_len=32", "train.global_batch=4", "train.steps=2", "parallel.nproc=2"]
    overrides += [*data, "eval.tokens_per_domain=64", "generate.tokens=2", "run.name=image", "track.wandb=false"]
    program = image / "opt" / "moetrain" / "bin" / "moetrain"
    done = run([str(program), "train", *overrides], tmp_path, PYTHONPATH=clean(image)["PYTHONPATH"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "image" / "summary.json").is_file()
    layer = "import moetrain, torch; print(moetrain.MoE(dim=16, hidden=24, experts=4)(torch.ones(3, 16)).shape)"
    library = run([str(program.with_name("python")), "-c", layer], tmp_path, PYTHONPATH=clean(image)["PYTHONPATH"])
    assert "[3, 16]" in library.stdout, library.stderr


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_every_package_is_pinned_for_us_and_none_is_capped_for_users() -> None:
    """Those that are needed by those that are needed, too, as far as they are installed here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *itertools.chain(*extras.values())]]
    for requirement in wanted:
        assert not {each.operator for each in requirement.specifier} - {">="}, requirement
    pinned, seen = pins(), set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name != "moetrain":
            assert name in pinned, f"{requirement} has no line in constraints.txt"
            assert requirement.specifier.contains(pinned[name], prereleases=True), requirement
        asked = [name, *requirement.extras]
        if name == "moetrain" or set(asked) <= seen:
            continue
        seen |= set(asked)
        try:
            needs = [Requirement(text) for text in importlib.metadata.requires(name) or []]
        except importlib.metadata.PackageNotFoundError:
            continue
        for need in needs:
            if need.marker is None or any(
                need.marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)
            ):
                wanted.append(need)
    for file in ("Makefile", "Dockerfile"):
        installs = [line for line in (ROOT / file).read_text().splitlines() if "pip install" in line]
        assert installs
        assert all("constraints.txt" in line for line in installs), file


def test_make_installs_again_when_the_pins_change(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for number, name in enumerate((".venv/bin/python", "pyproject.toml", "constraints.txt", ".venv/installed-dev")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (number, number))
    ask = ["make", "--question", ".venv/installed-dev"]
    assert run(ask, tmp_path).returncode == 0
    os.utime(tmp_path / "constraints.txt", (9, 9))
    assert run(ask, tmp_path).returncode == 1


def test_the_image_has_what_goes_with_a_cluster() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (names,) = re.findall(r"'/src\[(.+)\]'", (ROOT / "Dockerfile").read_text())
    assert set(names.split(",")) == {"deepspeed", "tensorboard", "hf"} & extras.keys()


def test_the_tested_releases_are_those_of_the_constraints() -> None:
    for name, release in versions.TESTED.items():
        assert pins()[name].startswith(f"{release}."), name
    (least,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert least == ".".join(map(str, LEAST_TORCH))
    said = (ROOT / "docs" / "hosts.md").read_text()
    for name in ("torch", "numba", "transformers", "deepspeed"):
        assert f"{name} {pins()[name]}" in said, name


def started(mesh: Mesh, overrides: list[str], packages: str) -> str:
    """The log of a run, with this folder of packages before all others."""
    sys.path.insert(0, packages)
    try:
        folder = train(config.load(overrides), mesh)
    finally:
        sys.path.remove(packages)
    return (folder / "log.txt").read_text()


def test_newer_releases_than_tested_are_named_in_one_line(pool, tiny: list[str], tmp_path: Path) -> None:
    assert versions.newer_than_tested() == []
    for name, version in (("torch", "2.99.1+cu130"), ("numba", "0.68.9"), ("transformers", "10.0.0rc1")):
        about = tmp_path / "packages" / f"{name}-{version}.dist-info" / "METADATA"
        about.parent.mkdir(parents=True)
        about.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    once = [*tiny, "run.name=begun", "train.steps=1"]
    (said, _) = pool.run(started, 2, once, str(tmp_path / "packages"))
    line = "newer than what moetrain was tested with: torch 2.99.1+cu130 (2.13), transformers 10.0.0rc1 (5.24)"
    assert said.startswith(f"{line}\n")
    assert said.count("newer than") == 1


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


def test_the_architecture_names_every_package() -> None:
    """One line each, none of them gone."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    mapped = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).stdout.splitlines()
    packages = {str(Path(name).parent) for name in listed if name.startswith("moetrain/") and name.endswith(".py")}
    folders = {name.partition("/")[0] for name in listed if "/" in name and not name.startswith(".")}
    assert sorted(mapped) == sorted((packages | folders) - {"moetrain"})
