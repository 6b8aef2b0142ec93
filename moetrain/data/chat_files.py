"""Rows of conversations out of the user's files: JSONL, a JSON list, Parquet, or the folder of a `datasets.Dataset`."""

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.common.extensions import ChatSource, read_sources
from moetrain.config import ConfigError, Data
from moetrain.data import files
from moetrain.data.files import BadText, LeftOut

TABLE_SUFFIXES = {".parquet", ".arrow"}
FORMS = '"messages", "prompt" and "completion", or "text"'
MOST_SHOWN = 200  # characters of another library's message


@dataclass(frozen=True)
class Conversation:
    """One row: messages for the chat template, or text as it is."""

    where: str  # file:line, or file:row
    domain: str | None
    messages: tuple[dict[str, Any], ...] = ()
    first: int = 0  # message from which on the assistant's are to be learned: those before belong to the prompt
    tools: list[Any] | None = None
    text: str = ""  # where there are no messages
    prompt: int = 0  # characters of `text` that are not to be learned


def read_conversations(path: Path, on_bad: str, left_out: LeftOut) -> Iterator[Conversation]:
    """Yields the rows below `path` in a fixed order; a folder's subfolders are domains.

    Raises `ConfigError` with file and line for what is malformed, or with `on_bad` "skip" counts it in `left_out`.
    """
    for file, domain in _find_files(path, left_out):
        try:
            for where, row in _read_rows(file):
                try:
                    if isinstance(row, BadText):
                        raise row
                    yield _parse_row(where, row, domain)
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


def _parse_row(where: str, row: Any, domain: str | None) -> Conversation:
    """Raises `BadText` where the row is no conversation."""
    if not isinstance(row, Mapping):
        raise BadText(where, f"must be an object with {FORMS}")
    row = {name: value for name, value in row.items() if value is not None}
    label = row.get("domain", domain)
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise BadText(where, '"domain" must be a string')
    label = None if label in (None, "") else str(label)
    if "messages" in row:
        messages = _parse_messages(where, "messages", row["messages"])
        return _check_assistant(Conversation(where, label, messages, tools=_parse_tools(where, row)))
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion:
                raise BadText(where, '"completion" must not be empty')
            return Conversation(where, label, text=_check_text(where, prompt + completion), prompt=len(prompt))
        before = _parse_messages(where, "prompt", prompt)
        after = _parse_messages(where, "completion", completion)
        tools = _parse_tools(where, row)
        return _check_assistant(Conversation(where, label, before + after, first=len(before), tools=tools))
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise BadText(where, '"text" must be text')
        return Conversation(where, label, text=_check_text(where, row["text"]))
    raise BadText(where, f"must have {FORMS}")


def _parse_messages(where: str, field: str, value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadText(where, f'"{field}" must be a list of messages, and beside one that is so')
    out = []
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadText(where, f'{place} must be an object with "role" and "content"')
        own = {name: part for name, part in message.items() if part is not None}
        if own.pop("weight", 1) != 1:
            raise BadText(where, f"{place}.weight must be 1: single messages cannot be left out of the loss")
        own["content"] = _check_text(where, _join_parts(where, place, own))
        out.append(own)
    return tuple(out)


def _join_parts(where: str, place: str, message: Mapping[str, Any]) -> str:
    """The text of a message, which may be a list of parts of text, or missing beside calls of tools."""
    content: Any = message.get("content", "" if "tool_calls" in message else None)
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        content = "".join(parts) if len(parts) == len(content) else None
    if not isinstance(content, str):
        raise BadText(where, f"{place}.content must be text, or a list of parts that are text")
    return content


def _parse_tools(where: str, row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # tables cannot hold schemas of many shapes, and have them as JSON
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadText(where, '"tools" must be a list, or JSON of one') from None
    if tools is not None and not isinstance(tools, list):
        raise BadText(where, '"tools" must be a list, or JSON of one')
    return tools or None


def _check_assistant(conversation: Conversation) -> Conversation:
    if not any(message["role"] == "assistant" for message in conversation.messages[conversation.first :]):
        raise BadText(conversation.where, "must have a message of the assistant to learn from")
    return conversation


def _check_text(where: str, text: str) -> str:
    if half := re.search("[\ud800-\udfff]", text):
        raise BadText(where, f"must be Unicode, not half a surrogate pair (here \\u{ord(half[0]):04x})")
    return text
