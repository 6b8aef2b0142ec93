"""The page: `page/page.html` with its style, its script and the runs' data put in. It needs nothing else, ever."""

import json
import math
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from moetrain import __version__
from moetrain.common import disk
from moetrain.common.redact import redacted
from moetrain.report.cards import about, cards, circumstances
from moetrain.report.compare import compare, flat
from moetrain.report.figures import figures
from moetrain.report.findings import findings
from moetrain.report.read import RunData

PARTS = Path(__file__).parent / "page"
SCRIPTS = ("plots.js", "heat.js", "page.js")


def names(runs: Sequence[RunData]) -> list[str]:
    """Return the runs' names, or their folders from where these differ."""
    short = [run.name for run in runs]
    if len({*short}) == len(short):
        return short
    return [
        os.path.relpath(run.folder.resolve(), os.path.commonpath([r.folder.resolve() for r in runs])) for run in runs
    ]


def data(runs: Sequence[RunData], live: bool = False) -> dict[str, Any]:
    """Return everything the page shows, for JSON."""
    named = names(runs)
    return {
        "version": __version__,
        "written": f"{datetime.now():%Y-%m-%d %H:%M}",
        "live": live,
        "runs": [_one(run, name) for run, name in zip(runs, named, strict=True)],
        "compare": compare(runs, named) if len(runs) > 1 else None,
    }


def _one(run: RunData, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "about": about(run),
        "circumstances": circumstances(run),
        "resumed": run.resumed,
        "cards": cards(run),
        "findings": [finding._asdict() for finding in findings(run)],
        "alerts": run.alerts[-50:],
        "figures": figures(run),
        "missing": run.missing,
        "config": flat(redacted(run.config)),
    }


def html(found: dict[str, Any]) -> str:
    """Return the whole page as text."""
    text = (PARTS / "page.html").read_text()
    parts = {
        "TITLE": _escape(" · ".join(run["name"] for run in found["runs"])) + " – moetrain",
        "CONNECT": "'self'" if found["live"] else "'none'",
        "STYLE": (PARTS / "style.css").read_text(),
        "SCRIPT": "\n".join((PARTS / name).read_text() for name in SCRIPTS),
        "DATA": as_json(found),
    }
    begin = {name: text.index(name) for name in parts}
    out, at = "", 0
    for name in sorted(parts, key=lambda name: begin[name]):
        out += text[at : begin[name]] + parts[name]
        at = begin[name] + len(name)
    return out + text[at:]


def as_json(found: dict[str, Any]) -> str:
    """Return JSON that may stand in a script element: no NaN, no end of the element."""
    return json.dumps(_finite(found), allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace(
        "<", "\\u003c"
    )


def write(runs: Sequence[RunData], path: Path) -> dict[str, Any]:
    """Write the page, whole or not at all. Returns what is on it."""
    found = data(runs)
    disk.write(path, html(found))
    return found


def write_of(folder: Path) -> None:
    """Write `report.html` in a run's own folder."""
    write([RunData(folder)], folder / "report.html")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
