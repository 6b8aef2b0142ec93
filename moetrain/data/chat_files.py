"""Rows of conversations out of the user's files: JSONL, a JSON list, Parquet, or the folder of a `datasets.Dataset`."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moetrain.common.extensions import ChatSource, read_sources
from moetrain.config import ConfigError, Data
from moetrain.data import files
from moetrain.data.chat_rows import Conversation, PreferencePair, parse_row
from moetrain.data.files import BadText, LeftOut

TABLE_SUFFIXES = {".parquet", ".arrow"}
MOST_SHOWN = 200  # characters of another library's message


def read_conversations(path: Path, on_bad: str, left_out: LeftOut) -> Iterator[Conversation | PreferencePair]:
    """Yields the rows below `path` in a fixed order; a folder's subfolders are domains.

    Raises `ConfigError` with file and line for what is malformed, or with `on_bad` "skip" counts it in `left_out`.
    """
    for file, domain in _find_files(path, left_out):
        try:
            for where, row in _read_rows(file):
                try:
                    if isinstance(row, BadText):
                        raise row
                    yield parse_row(where, row, domain)
                except BadText as error:
                    files.refuse_or_skip(error, on_bad, left_out)
        except BadText as error:
            files.refuse_or_skip(error, on_bad, left_out)


def list_sources(options: Data) -> dict[str, ChatSource]:
    """`data.sources`, or `data.path` alone."""
    if options.path is not None:
        return {Path(options.path).stem: ChatSource(path=options.path)}
    return read_sources(getattr(options, "sources", None) or {}, ChatSource)


def list_files(path: Path) -> list[Path]:
    """The files that `read_conversations` reads."""
    return [file for file, _ in _find_files(path, LeftOut())]


def _find_files(path: Path, left_out: LeftOut) -> Iterator[tuple[Path, str | None]]:
    """(file, domain or None) of all files of rows below `path`; a file that is named itself is always read."""
    if path.is_file():
        yield path, None
        return
    if (path / "dataset_dict.json").is_file():
        splits = sorted(each.name for each in path.iterdir() if (each / "state.json").is_file())
        rule = f"is a dict of datasets; choose one, such as data.path={path / splits[0]}" if splits else "is empty"
        raise ConfigError(f"data.path={path}: {rule}")
    found = [file for file in sorted(path.rglob("*")) if file.is_file()]
    for file in found:
        below = file.relative_to(path).parts
        if any(part.startswith(".") for part in below):
            left_out.add("hidden", file)
        elif _kind_of(file) is None:
            if not (file.parent / "state.json").is_file():  # beside the tables of `Dataset.save_to_disk`
                left_out.add(f"the suffix {file.suffix[:20]} is none of conversations", file)
        else:
            yield file, below[0] if len(below) > 1 else None


def _kind_of(file: Path) -> str | None:
    """What rows are read from the file as; None: it has none."""
    suffix = files.kind_of(file)[0]
    if suffix in TABLE_SUFFIXES:
        return suffix
    if suffix == ".json" and (file.parent / "state.json").is_file():
        return None
    return "lines" if suffix in files.ROW_SUFFIXES else "list" if suffix == ".json" else None


def _read_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(place, row or the `BadText` that it is) of a file. Raises `BadText` where the file cannot be read on."""
    kind = _kind_of(file) or "lines"
    if kind in TABLE_SUFFIXES:
        yield from _read_table(file, kind)
    elif kind == "list":
        try:
            rows = json.loads(files.read_text(file))
        except (ValueError, RecursionError) as error:
            raise BadText(str(file), f"must be JSON ({error})") from None
        if not isinstance(rows, list):
            raise BadText(str(file), "must be a JSON list of rows")
        yield from ((f"{file}:{number}", row) for number, row in enumerate(rows, 1))
    else:
        for number, line in files.rows(file):
            where = f"{file}:{number}"
            try:
                yield where, json.loads(files.decode(line, str(file), number))
            except (ValueError, RecursionError):
                yield where, BadText(where, "must be JSON")
            except BadText as error:
                yield where, error


def _read_table(file: Path, kind: str) -> Iterator[tuple[str, Any]]:
    """The rows of a Parquet file or an Arrow stream, batch by batch."""
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(f"data.path={file}: needs pyarrow: pip install 'moetrain[parquet]'") from None
    number = 0
    try:
        with arrow.memory_map(str(file)) as source:
            is_parquet = kind == ".parquet"
            batches = parquet.ParquetFile(source).iter_batches(1024) if is_parquet else arrow.ipc.open_stream(source)
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}:{number}", row
    except (arrow.ArrowException, OSError) as error:
        raise BadText(str(file), f"cannot be read ({' '.join(str(error).split())[:MOST_SHOWN]})") from None
