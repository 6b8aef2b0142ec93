"""What the files of `data=folder` consist of: whole texts, JSONL, row groups of Parquet."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.data import files
from moetrain.data.files import PARQUET, ROW_SUFFIXES, BadText, Columns, LeftOut

PIECE_BYTES = 1 << 26  # of row groups that are read together
BATCH = 64  # rows of Parquet that are unpacked at a time


class FilePiece(NamedTuple):
    """A file, or some row groups of one."""

    file: Path
    domain: str  # of rows that name none
    size: int  # bytes on the disk
    groups: tuple[int, ...] | None = None  # None: all
    first_row: int = 0


def list_pieces(path: Path, left_out: LeftOut) -> Iterator[FilePiece]:
    """The pieces of all files below `path`, in order; files that are not read are counted."""
    for file in files.text_files(path, left_out):
        parts = file.relative_to(path).parts
        whole = FilePiece(file, parts[0] if len(parts) > 1 else "text", file.stat().st_size)
        if files.kind_of(file)[0] == PARQUET and whole.size > PIECE_BYTES:
            yield from _split_parquet(whole)
        else:
            yield whole


def read_pieces(
    pieces: Sequence[FilePiece], left_out: LeftOut, on_bad: str, columns: Columns
) -> Iterator[tuple[str, str, str]]:
    """(domain, text, name) of every document that is not empty. What is bad is counted or raises `ConfigError`."""
    for piece in pieces:
        suffix = files.kind_of(piece.file)[0]
        read = _read_parquet if suffix == PARQUET else _read_lines if suffix in ROW_SUFFIXES else _read_whole
        try:
            for domain, text, name in read(
                piece, columns, partial(files.refuse_or_skip, on_bad=on_bad, left_out=left_out)
            ):
                if text.strip():
                    yield domain, text, name
                else:
                    left_out.add("empty", name)
        except BadText as error:
            files.refuse_or_skip(error, on_bad, left_out)


def _read_whole(piece: FilePiece, columns: Columns, refuse: Any) -> Iterator[tuple[str, str, str]]:
    yield piece.domain, files.read_text(piece.file), str(piece.file)


def _read_lines(piece: FilePiece, columns: Columns, refuse: Any) -> Iterator[tuple[str, str, str]]:
    for number, line in files.rows(piece.file):
        try:
            text, label = files.row(line, str(piece.file), number, columns)
        except BadText as error:
            refuse(error)
        else:
            yield label or piece.domain, text, f"{piece.file}:{number}"


def _read_parquet(piece: FilePiece, columns: Columns, refuse: Any) -> Iterator[tuple[str, str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = piece.first_row
    try:
        with pq.ParquetFile(piece.file) as file:
            known = file.schema_arrow.names
            if columns.text not in known:
                raise BadText(
                    str(piece.file), f"must have the column {columns.text!r} (it has {', '.join(known)[:200]})"
                )
            wanted = [name for name in columns if name in known]
            for batch in file.iter_batches(BATCH, row_groups=piece.groups, columns=wanted, use_threads=False):
                for found in batch.to_pylist():
                    number += 1
                    place = f"{piece.file}:{number}"
                    try:
                        text, label = files.check_row(found[columns.text], found.get(columns.domain), place, columns)
                    except BadText as error:
                        refuse(error)
                    else:
                        yield label or piece.domain, text, place
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadText(str(piece.file), f"cannot be read as Parquet ({' '.join(str(error).split())[:200]})") from None


def _split_parquet(whole: FilePiece) -> Iterator[FilePiece]:
    """Row groups together as far as they stay below PIECE_BYTES; a file that cannot be opened as it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(whole.file) as file:
            facts = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, OSError):
        yield whole
        return
    groups: list[int] = []
    size = row = first_row = 0
    for number, group in enumerate(facts):
        if groups and size + group.total_byte_size > PIECE_BYTES:
            yield whole._replace(groups=tuple(groups), size=size, first_row=first_row)
            groups, size, first_row = [], 0, row
        groups.append(number)
        size, row = size + group.total_byte_size, row + group.num_rows
    yield whole._replace(groups=tuple(groups), size=size, first_row=first_row)
