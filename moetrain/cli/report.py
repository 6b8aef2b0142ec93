"""`moetrain report`."""

import argparse
import json
import os
from pathlib import Path

from moetrain.cli import arguments
from moetrain.common.console import console, styled
from moetrain.common.errors import ConfigError

HELP = """Write one self-contained HTML page that explains a run, or several side by side.

examples:
  moetrain report                                           for the newest run; writes RUN/report.html
  moetrain report runs/demo --png                           also its main figures, as RUN/figures/*.png
  moetrain report runs/a runs/b --out a-and-b.html          two runs compared
  moetrain report --live runs/demo                          the same page for a run in progress, served on 127.0.0.1
"""


def add_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", nargs="*", help="folders or names of runs; default: the newest run")
    verb.add_argument(
        "--out", metavar="FILE", help="the page; default: report.html in the run's folder, or in the runs' common one"
    )
    verb.add_argument("--png", action="store_true", help="write the main figures to figures/*.png beside the page")
    verb.add_argument("--live", action="store_true", help="serve the page on 127.0.0.1 and keep it up to date")
    verb.add_argument("--port", type=int, default=8765, help="port for --live; 0: any free one; default: %(default)s")
    arguments.add_json(verb, "print the findings as JSON")


def execute(options: argparse.Namespace) -> int:
    from moetrain import runs
    from moetrain.report import build, pictures
    from moetrain.report.read import open_run

    writing = {"--out": options.out, "--png": options.png, "--json": options.json}
    if options.live and any(writing.values()):
        names = ", ".join(name for name, value in writing.items() if value)
        raise ConfigError(f"--live: cannot be combined with {names}: it serves the page and writes nothing")
    found = [open_run(name) for name in options.run or [str(runs.find(None))]]
    if options.live:
        return _serve(found, options.port)
    path = Path(options.out) if options.out else _place([run.folder for run in found]) / "report.html"
    try:
        page = build.write(found, path)
        drawn = (
            [p for run in page["runs"] for p in pictures.draw(run, path.parent / "figures", len(found) > 1)]
            if options.png
            else []
        )
    except OSError as error:
        raise ConfigError(f"--out {path}: must be a file that can be written ({error.strerror})") from None
    if options.json:
        keep = ("name", "cards", "findings", "missing")
        told = [{name: each[name] for name in keep} for each in page["runs"]]
        print(json.dumps({"report": str(path), "pictures": [str(p) for p in drawn], "runs": told}))
        return 0
    colours = {"trouble": "red", "watch": "yellow", "good": "green"}
    for each in page["runs"]:
        console.print(styled((each["name"], "bold"), (f"  {each['about']}", "")))
        for finding in each["findings"]:
            level = f"{finding['level']:<7}"
            console.print(styled(("  ", ""), (level, colours[finding["level"]]), (f"  {finding['text']}", "")))
        for text in each["missing"]:
            console.print(f"  missing  {text}", style="dim")
    size = f", {path.stat().st_size / 2**20:.1f} MiB" + (f"; {len(drawn)} pictures" if drawn else "")
    console.print(styled((str(path), "bold"), (size, "")))
    return 0


def _place(folders: list[Path]) -> Path:
    return folders[0] if len(folders) == 1 else Path(os.path.commonpath([folder.resolve() for folder in folders]))


def _serve(found: list, port: int) -> int:
    from moetrain.report.live import HOST, server

    with server(found, port) as serving:
        console.print(styled((f"http://{HOST}:{serving.server_address[1]}", ""), ("  Ctrl-C ends it", "dim")))
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0
