"""Fixtures: the pool of ranks, a small corpus, small configs."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from moetrain import config
from moetrain.engine import precision
from tests.grid import Grid, add_options
from tests.pool import Pool

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

TINY = ["model=tiny", "train.dtype=fp32", "train.seq_len=32", "train.global_batch=8", "track.wandb=false"]


ON_GPU = "test_gpu.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help=f"{ON_GPU} alone, on a GPU; all other tests run without one")
    parser.addoption("--rehearse", action="store_true", help="with --gpu: on the CPU, to see that the tests run")
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Grid(config), "grid")
    for number in (
        signal.SIGHUP,
        signal.SIGINT,
    ):  # ignored under nohup, in the background: so would be what starts here
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # several gloo ranks: a machine with a GPU tests the same
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: its kernels run on the CPU


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.suffix != ".py":
        return None
    return (collection_path.name == ON_GPU) != config.getoption("--gpu") or None


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    ranks = Pool()
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session", autouse=True)
def _calm() -> None:
    torch.set_num_threads(1)
    os.environ["WANDB_MODE"] = "offline"


@pytest.fixture(scope="session")
def bf16_is_fast() -> bool:
    """Whether this CPU has instructions for it. Elsewhere torch takes forty times as long, and tests take a sample."""
    return precision.speed_of_bf16(torch.device("cpu")) > 0.5


@pytest.fixture(autouse=True)
def _heard() -> None:
    """A command line with --json, run in this process, leaves the terminal quiet."""
    from moetrain.common.console import console

    console.quiet = False


def write_text(root: Path) -> None:
    """Small documents in two domains: counting, and letters."""
    for domain, words in (
        ("numbers", "one two three four five six seven"),
        ("greek", "alpha beta gamma delta epsilon"),
    ):
        (root / domain).mkdir(parents=True)
        for number in range(24):
            turned = words.split()[number % 5 :] + words.split()[: number % 5]
            (root / domain / f"{number:02d}.txt").write_text(" ".join(turned * (20 + number)) + f" end {number}\n")


@pytest.fixture(scope="session")
def corpus_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    write_text(root)
    return root


@pytest.fixture(scope="session")
def data(corpus_text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that point at the small corpus, prepared once."""
    from moetrain.data import prepare

    folder = tmp_path_factory.mktemp("corpora")
    overrides = ["data=folder", f"data.path={corpus_text}", f"data.dir={folder}", "data.vocab_size=300"]
    prepare.ensure(config.load(overrides).data)
    return overrides


@pytest.fixture
def tiny(data: list[str], tmp_path: Path) -> list[str]:
    """Overrides of a whole small run in a folder of its own."""
    return [*TINY, *data, f"run.dir={tmp_path}", "eval.tokens_per_domain=256", "generate.tokens=4"]
