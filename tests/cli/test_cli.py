"""The command line as a user meets it: real processes, real workers, exit codes, the last words on the terminal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moetrain import checkpoint, cli

ROOT = Path(__file__).parents[2]
ALONE = ["parallel.nproc=1", "parallel.ep=1"]
SMALL = ["train.steps=3", "parallel.nproc=2", "train.threads=1"]


def moetrain(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "moetrain", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120", **env},
    )


@pytest.fixture(scope="module")
def overrides(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    shape = ["model=tiny", "train.seq_len=32", "train.global_batch=8", *data, *SMALL, "router.skew=4"]
    shape += ["eval.tokens_per_domain=256", "generate.tokens=4", f"run.dir={folder}", "run.name=first"]
    shape += ["balance.micro_fraction=0.01", "balance.sequence_coefficient=1e-4", "balance.device_coefficient=1e-3"]
    shape += ["balance.entropy_coefficient=1e-4", "balance.bias=sign", "track.window=2"]
    return [*shape, "planner=llep", "planner.min_rows=1"]


@pytest.fixture(scope="module")
def trained(overrides: list[str]) -> tuple[Path, str]:
    """A run made by `moetrain train` with its own two workers, tracked by wandb offline, and what it printed."""
    done = moetrain("train", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (o.removeprefix("run.dir=") for o in overrides if o.startswith("run.dir="))
    return Path(folder) / "first", done.stdout


def test_train_prints_layout_progress_and_summary(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    for expected in (
        "2 ranks on", "ep 2", "per rank", "GiB", "step     1/3", "imbalance", "Run complete", "active per token",
        "guests", "bits/byte", "bigram", "greek", "numbers", "all", "what the model wrote", str(folder),
    ):  # fmt: skip
        assert expected in printed, expected


def test_the_runs_folder_has_what_the_design_says(trained: tuple[Path, str]) -> None:
    folder, _printed = trained
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "run.png",
        "log.txt",
        "load_trace",
        "wandb",
    ):
        assert (folder / name).exists(), name
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "Run complete" in (folder / "log.txt").read_text()
    files = {p.suffix for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    assert files == {".safetensors", ".json"}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    _, _, listed = (ROOT / "docs" / "metrics.md").read_text().partition("## Metrics")
    documented = re.findall(r"^\| `([a-z_]+/[^`]+)` \|", listed.partition("## The load trace")[0], re.MULTILINE)
    patterns = {name: re.sub("DOMAIN|LL", "[a-z0-9]+", name) for name in documented}
    only_some = ("balance/replayed_fraction", "dpo/")  # of runs with router.replay or train.objective=dpo
    patterns = {name: pattern for name, pattern in patterns.items() if not name.startswith(only_some)}
    written = {name for row in rows for name in row} - {"step"}
    assert not {name for name in written if not any(re.fullmatch(p, name) for p in patterns.values())}
    assert not {name for name, p in patterns.items() if not any(re.fullmatch(p, w) for w in written)}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["guests"] > 0
    assert summary["imbalance"]["home"] > 1.5 > 1.1 > summary["imbalance"]["planned"]


def test_the_load_trace_is_what_was_routed(trained: tuple[Path, str]) -> None:
    from moetrain.observe.collect import trace

    found = trace.read(trained[0])
    assert found["step"].tolist() == [1]
    assert found["counts"].shape == (1, 2, 2, 8)  # samples, layers, ranks, experts
    assert (found["counts"].sum((2, 3)) == 8 * 32 * 2).all()
    assert (found["planned"].sum(2) == 8 * 32 * 2).all()


def test_the_report_of_a_real_run_lacks_nothing(trained: tuple[Path, str]) -> None:
    from moetrain.report import build
    from moetrain.report.read import open_run

    (page,) = build.data([open_run(str(trained[0]))])["runs"]
    absent = {name for name, figure in page["figures"].items() if figure["kind"] == "absent"}
    assert absent - {"gamma"} == {"held_out_steps"}  # null with fewer than three experts in use; one evaluation
    assert page["missing"] == []
    assert {card["name"] for card in page["cards"]} >= {
        "Steps",
        "Validation loss",
        "Throughput",
        "Saved by the plan",
        "Memory",
    }


def test_wandbs_own_reader_shows_what_was_sent(trained: tuple[Path, str]) -> None:
    """Every row, loads as histograms, the heat map of a sample, layers kept out of the way, the alert."""
    (offline,) = (trained[0] / "wandb").glob("offline-run-*")
    reader = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [str(reader), "leet", "inspect", "--json", str(offline)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines() if line]
    sent = [r["history"]["item"] for r in records if r["type"] == "history"]
    rows = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    for row, item in zip(rows, sent, strict=True):
        for name, value in row.items():
            if isinstance(value, list):
                assert item[f"{name}._type"] == "histogram"
                assert item[f"{name}.values"] == pytest.approx(value)
            elif value is not None:
                assert item[name] == pytest.approx(value), name
    assert [item.get("experts/load._type") for item in sent] == ["image-file", None, None, None]
    assert (sent[0]["experts/load.width"], sent[0]["experts/load.height"]) == (8 * 12, 2 * 12)
    metrics = [r["metric"] for r in records if r["type"] == "metric"]
    hidden = [metric["glob_name"] for metric in metrics if metric["options"].get("hidden") and "glob_name" in metric]
    assert hidden == ["balance/layer_*", "eval/layer_*", "specialise/layer_*"]
    alerts = [json.loads(line) for line in (trained[0] / "alerts.jsonl").read_text().splitlines()]
    assert [alert["kind"] for alert in alerts] == ["dead_experts"]
    assert [r["alert"]["text"] for r in records if r["type"] == "alert"] == [alert["text"] for alert in alerts]
    assert alerts[0]["text"] in trained[1].replace("\n", " ")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package that makes workspaces
def test_the_workspace_draws_metrics_that_there_are(trained: tuple[Path, str], capsys: pytest.CaptureFixture) -> None:
    from moetrain.observe.metrics import LOAD_IMAGE
    from moetrain.observe.workspace import SECTIONS

    rows = [json.loads(line) for line in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    written = {name for row in rows for name in row}
    for panel in (panel for panels in SECTIONS.values() for panel in panels):
        assert set(panel.metrics) <= written, panel
        assert panel.regex is None or any(re.search(panel.regex, name) for name in written), panel
    assert cli.main(["workspace", "somebody", "--json"]) == 0
    found = json.dumps(json.loads(capsys.readouterr().out))
    assert LOAD_IMAGE in found
    for name, panels in SECTIONS.items():
        assert name in found
        assert all(panel.title in found for panel in panels)


def test_run_again_trains_nothing_and_shows_the_same(trained: tuple[Path, str], overrides: list[str]) -> None:
    folder, printed = trained
    before = (folder / "metrics.jsonl").read_text()
    as_json = moetrain("train", overrides[0], "--json", *overrides[1:], *ALONE)
    assert as_json.returncode == 0, as_json.stderr
    assert json.loads(as_json.stdout) == json.loads((folder / "summary.json").read_text())
    done = moetrain("train", *overrides)
    assert done.returncode == 0, done.stderr
    assert "has its 3 steps already" in done.stdout
    assert printed[printed.index("Run complete") :] == done.stdout[done.stdout.index("Run complete") :]
    assert (folder / "metrics.jsonl").read_text() == before


def test_eval_finds_what_the_run_ended_with(trained: tuple[Path, str]) -> None:
    done = moetrain("eval", str(trained[0]), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    last = json.loads((trained[0] / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)


def test_eval_with_fewer_ranks_adapts_the_layout_as_train_does(
    trained: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    started = []
    monkeypatch.setattr("moetrain.launch.local.launch", lambda arguments, workers, again: started.append(workers) or 0)
    assert cli.main(["eval", str(trained[0]), "parallel.nproc=1", "parallel.ep=2"]) == 0, capfd.readouterr().err
    assert started == [1]


def test_generate_continues_a_prompt(trained: tuple[Path, str]) -> None:
    done = moetrain("generate", str(trained[0]), "generate.prompt=alpha beta", "generate.tokens=3", "--json", *ALONE)
    assert done.returncode == 0, done.stderr
    (item,) = json.loads(done.stdout)["generated"]
    assert item["prompt"] == "alpha beta"
    assert item["text"]


def test_a_misspelled_command_is_one_line_too(capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["trian"])
    line = "error: trian: no such command; did you mean train?; `moetrain --help` shows what it takes\n"
    assert capfd.readouterr().err == line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "train.stepz=1"], "error: train.stepz: no such field; did you mean train.steps?"),
        (
            ["train", "--steps", "5"],
            "error: --steps: no such option; fields are set as field=value; did you mean train.steps=5?",
        ),
        (
            ["train", "run.dir=/proc/nothing"],
            "error: run.dir=/proc/nothing: must be a folder that can be written",
        ),
        (
            ["train", "checkpoint.resume=/nowhere"],
            "error: checkpoint.resume=/nowhere: must be auto, none or a folder",
        ),
        (
            ["train", "data=folder", "data.path=/nowhere"],
            "error: data.path=/nowhere: there is no such file or folder",
        ),
        (
            ["train", "parallel.nproc=2", "train.global_batch=5"],
            "error: train.global_batch=5: must be a multiple of 2 ranks",
        ),
        (["eval", "/nowhere"], "error: run=/nowhere: must be a run's folder"),
        (
            ["data", "data.dir=/proc/nothing"],
            "error: data.dir=/proc/nothing: must be a folder that can be written",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    said = capfd.readouterr()
    assert said.out == ""
    (only,) = said.err.splitlines()
    assert only.startswith(line)
    assert not list(tmp_path.iterdir())


def test_bad_input_under_torchrun_is_found_before_any_group(tmp_path: Path) -> None:
    """A worker that torchrun started: its own line, exit code 2, no rendezvous with anybody."""
    env = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = moetrain("train", "train.global_batch=9", "parallel.ep=2", f"run.dir={tmp_path}", **env)
    assert done.returncode == 2
    assert done.stderr == "error: parallel.ep=2: must divide the ranks of one replica, 3\n"


def test_a_mistake_is_said_once_and_torchrun_does_not_try_again() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "--max-restarts", "3", "-m", "moetrain", "train", "train.stepz=1"],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode
    assert done.stderr.count("error: train.stepz: no such field") == 1, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"RANK": "", "WORLD_SIZE": "2"}, True),  # of a script without a number to set
        ({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, True),  # the first of another host: it has its own files
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, False),
    ],
)
def test_the_first_worker_of_a_host_says_what_is_wrong(
    env: dict[str, str], says: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "model=tiny", "train.stepz=1"]) == 2
    assert len(capfd.readouterr().err.splitlines()) == says


@pytest.mark.parametrize("arguments", [[], ["trian"], ["bench", "plan", "--bogus"], ["bench", "gpu", "--repeats", "0"]])
def test_a_command_line_that_cannot_be_read_is_one_line(arguments: list[str], capfd: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")


STARTING = """
import json, subprocess, sys
from moetrain import cli

class Started(Exception):
    pass

def start(*given, **more):
    raise Started

subprocess.Popen = start
try:
    cli.main(sys.argv[1:])
except (Started, SystemExit):
    pass
print(json.dumps(sorted(sys.modules)))
"""


def test_nothing_is_loaded_that_a_command_can_start_without(tmp_path: Path, data: list[str]) -> None:
    """Help comes at once; a launcher checks everything and starts the workers without torch and compiled code."""
    absent = {
        ("--help",): {"hydra", "omegaconf", "pydantic", "yaml", "numpy", "numba", "torch", "wandb", "matplotlib"},
        ("train", "model=tiny", "run.name=x", *data): {"numba", "torch", "wandb", "matplotlib"},
    }
    for arguments, names in absent.items():
        done = subprocess.run(
            [sys.executable, "-c", STARTING, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=60
        )
        assert done.returncode == 0, done.stderr
        *said, loaded = done.stdout.splitlines()
        assert not names & set(json.loads(loaded)), arguments
    assert said == ["starting 2 workers"]


def test_another_model_than_the_checkpoints_is_refused(
    trained: tuple[Path, str], data: list[str], capfd: pytest.CaptureFixture
) -> None:
    saved = checkpoint.newest(trained[0])
    more = [*data, *SMALL, f"checkpoint.resume={saved}", f"run.dir={trained[0].parent}"]
    assert cli.main(["train", "model=small", *more]) == 2
    assert capfd.readouterr().err == f"error: model.dim=256: the checkpoint {saved} has 64\n"


def test_two_runs_are_never_mixed_in_one_folder(
    trained: tuple[Path, str], overrides: list[str], capfd: pytest.CaptureFixture
) -> None:
    assert cli.main(["train", *overrides, "checkpoint.resume=none"]) == 2
    refused = "error: run.name=first: has a checkpoint of step 3 already; take another name\n"
    assert capfd.readouterr().err == refused
    assert cli.main(["train", *overrides, "router.top_k=1"]) == 2
    assert capfd.readouterr().err.startswith("error: router.top_k=1: the checkpoint ")


def test_fewer_steps_than_a_checkpoint_has_are_refused_with_what_to_do(
    trained: tuple[Path, str], overrides: list[str], capfd: pytest.CaptureFixture
) -> None:
    """Whether the run goes on by itself or another one begins with its checkpoint."""
    saved = checkpoint.newest(trained[0])
    rule = f"train.steps=2: {saved} has 3 steps already, and they count: train.steps=5 trains 2 more"
    rule += f"; run.name=NEW init_from={saved} begins a new run with its weights alone"
    for more in ([], [f"checkpoint.resume={saved}", "run.name=second"]):
        assert cli.main(["train", *overrides, "train.steps=2", *more]) == 2
        assert capfd.readouterr().err == f"error: {rule}\n"


def test_a_worker_that_raises_has_the_last_word(trained: tuple[Path, str], data: list[str], tmp_path: Path) -> None:
    """Rank 1 alone finds its shard of the checkpoint damaged: its traceback comes last, and all are gone in seconds."""
    patch = tmp_path / "sitecustomize.py"
    patch.write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import moetrain.moe.layer as layer\n"
        "    def broken(*given):\n"
        "        raise ValueError('planted fault')\n"
        "    layer.MoE.decide = broken\n"
    )
    overrides = [
        "model=tiny",
        "train.seq_len=32",
        "train.global_batch=8",
        *data,
        *SMALL,
        f"run.dir={tmp_path}/runs",
    ]
    done = moetrain("train", *overrides, "track.wandb=false", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1] == "ValueError: planted fault"
    assert any(re.fullmatch(r"rank 1 failed in step 1, .*:", line) for line in lines)
    assert "Connection" not in done.stdout + done.stderr


@pytest.mark.parametrize("given", [{}, {"PYTORCH_ALLOC_CONF": "a:b"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:b"}], ids=str)
def test_gpu_memory_grows_in_segments_unless_the_user_says_otherwise(given: dict[str, str]) -> None:
    """Said before torch is loaded, which reads it then."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    look = f"print([os.environ.get(name) for name in {names}], 'torch' in sys.modules)"
    program = f"import os, sys\nfrom moetrain import cli\ntry: cli.main(['train', '--help'])\nfinally: {look}"
    environment = {k: v for k, v in os.environ.items() if k not in names} | given
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    found = given or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert done.stdout.splitlines()[-1] == f"{[found.get(name) for name in names]} False"
