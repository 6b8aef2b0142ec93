"""The parts of `scripts/gpu_check.sh`, one after another, each with a time limit of its own; a summary; one archive.

A part that fails or takes too long leaves the end of what it said in the summary, and the next one begins. The archive
is written anew after every part: whatever ends this program, what was found so far is in it.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SECONDS = 540  # in all
LEAST = 8  # seconds left that a part is begun with
LAST_LINES = 12  # of a part that failed
SHAPES = ("gpt-oss-120b", "deepseek-v3", "qwen3-30b", "kimi-k2")


@dataclass(frozen=True)
class Part:
    name: str
    seconds: float
    command: list[str]
    report: str | None = None  # the file, among the results, that the summary shows


def parts(out: Path, rehearse: bool) -> list[Part]:
    """In order of value."""
    python, tiny = [sys.executable, "-u"], ["--rehearse"] if rehearse else []

    def own(name: str, seconds: float) -> Part:
        command = [*python, "scripts/gpu_parts.py", name, str(out), *tiny]
        return Part(name, seconds, command, f"{name}.md")

    def layer(shape: str, seconds: float) -> Part:
        command = [*python, "-m", "moetrain", "bench", "layer", "--virtual-ranks", "8", "--shape", shape]
        command += ["--scenario", "balanced", "80 % into 1", "95 % into 1", "--planner", "home", "llep", "makespan"]
        command += ["--tokens", "32", "--dim", "32", "--hidden", "32", "--repeats", "1"] if rehearse else []
        command += ["--tokens", "8192", "--dtype", "bf16"] if not rehearse else ["--warmup", "1", "--dtype", "fp32"]
        return Part(f"layer-{shape}", seconds, [*command, "--out", f"{out}/layer-{shape}"], f"layer-{shape}/layer.md")

    gemms = [*python, "-m", "moetrain", "bench", "gpu", "--out", str(out)]
    gemms += ["--scale", "64", "--repeats", "2"] if rehearse else []
    tests = [
        *python,
        "-m",
        "pytest",
        "--gpu",
        "-v",
        "-p",
        "no:cacheprovider",
        *(["--rehearse", "-k", "not triton and not fp8 and not static_plan"] if rehearse else []),
    ]
    return [
        own("device", 60),
        own("train", 100),
        own("ranks", 90),
        *(layer(shape, 80) for shape in SHAPES[:2]),
        own("trace", 70),
        own("kernels", 60),
        own("fp8", 40),
        own("step", 80),
        *(layer(shape, 80) for shape in SHAPES[2:]),
        Part("gemms", 60, gemms, "gpu.md"),
        Part("tests", 200, tests),
    ]


def run(part: Part, log: Path, limit: float) -> tuple[str, float]:
    """('' or what went wrong, seconds). What the part says is shown, and kept in `log`."""
    began = time.monotonic()
    with log.open("w") as kept:
        process = subprocess.Popen(part.command, stdout=kept, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            wrong = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            wrong = f"more than {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it, and what it left
            process.wait()
    return wrong, time.monotonic() - began


def pack(archive: Path, folders: list[Path]) -> None:
    """Whole or as it was."""
    unfinished = archive.with_name(f".{archive.name}.part")
    with tarfile.open(unfinished, "w:gz") as out:
        for folder in folders:
            out.add(folder, folder.name)
    unfinished.rename(archive)


def tables_of(text: str) -> list[str]:
    """A report's rows and findings, cells as narrow as they can be."""
    rows = [line for line in text.splitlines() if line.startswith(("| ", "- "))]
    return [re.sub(r" *\| *", "|", line) for line in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a folder for what is in between")
    parser.add_argument("archive", nargs="?", type=Path)
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a machine without a GPU")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="these alone: device, train, layer-SHAPE, ...")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not options.rehearse:
        print(f"error: no GPU that PyTorch of {sys.executable} can use", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and not options.rehearse else "rehearsal"
    name = re.sub(r"\W+", "-", device)
    results = Path("docs/results", name) if not options.rehearse else options.work / name
    archive = options.archive or Path(os.environ.get("OUT", "runs"), "gpu_check.tar.gz")
    logs = options.work / "logs"
    for folder in (results, logs, archive.parent):
        folder.mkdir(parents=True, exist_ok=True)
    began, summary = time.monotonic(), [f"# GPU check: {device}, torch {torch.__version__}", ""]
    details: list[str] = []
    failed = False
    for part in parts(results, options.rehearse):
        if options.parts and part.name not in options.parts:
            continue
        left = SECONDS - (time.monotonic() - began)
        limit = min(part.seconds, left) if not options.rehearse else 10 * part.seconds
        if limit < LEAST:
            summary.append(f"- {part.name}: not begun, {left:.0f} s were left")
            continue
        print(f"== {part.name}, at {time.monotonic() - began:.0f} s", flush=True)
        wrong, took = run(part, logs / f"{part.name}.log", limit)
        said = (logs / f"{part.name}.log").read_text(errors="replace").splitlines()
        summary.append(
            f"- {part.name}: {wrong or 'done'}, {took:.0f} s"
            + (f". {said[-1]}" if part.name == "tests" and said else "")
        )
        if wrong:
            failed = True
            details += [f"## {part.name}: {wrong}", "", "```", *(line[:300] for line in said[-LAST_LINES:]), "```", ""]
        if part.report and (results / part.report).is_file():
            details += [f"## {part.name}", "", *tables_of((results / part.report).read_text()), ""]
        (results / "check.md").write_text("\n".join([*summary, "", *details]))
        for trace in results.glob("trace-*.json.gz"):
            trace.rename(logs / trace.name)
        pack(archive, [results, logs])
    print("\n".join([*details, *summary]))  # what came of each part last: who sees only an end sees that
    print(f"results: {results}; everything: {archive}, {archive.stat().st_size / 2**20:.1f} MiB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
