"""Preparation in parallel and larger than memory: Parquet, compressed rows, the same files however many processes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from moetrain import config
from moetrain.cli import main
from moetrain.config import ConfigError
from moetrain.data import encode, pieces, prepare, spool
from moetrain.data.loader import Corpus


@pytest.fixture
def overrides(data: list[str], tmp_path: Path) -> list[str]:
    known = prepare.ensure(config.load(data).data)
    own = [f"data.path={tmp_path}/in", f"data.dir={tmp_path}/out", f"data.tokenizer={known}/tokenizer.json"]
    (tmp_path / "in").mkdir()
    return ["data=folder", *own]


def texts(number: int) -> list[str]:
    return [f"row {n} of {number}: one two three alpha beta gamma " * (1 + n % 4) for n in range(number)]


def write_rows(folder: Path) -> None:
    """The same sixty texts in three kinds of files, of two domains and of none."""
    found, label = texts(60), ["one", "two", None]
    rows = [json.dumps({"body": t, "kind": label[n % 3]}) for n, t in enumerate(found[:20])]
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress("\n".join(rows).encode()))
    table = pa.table({"body": found[20:40], "kind": [label[n % 3] for n in range(20)], "other": range(20)})
    pq.write_table(table, folder / "b.parquet", row_group_size=3)
    pq.write_table(pa.table({"body": pa.array(found[40:], pa.large_string())}), folder / "C.PARQUET")


def decode(corpus: Corpus, split: str) -> list[str]:
    tokens = corpus.tokens(split)
    return [corpus.tokenizer.decode(tokens[b : b + n - 1].tolist()) for b, n, _ in corpus.documents(split)]


def test_rows_of_every_kind_are_read_by_the_names_of_their_columns(tmp_path: Path, overrides: list[str]) -> None:
    write_rows(tmp_path / "in")
    options = config.load([*overrides, "data.text_field=body", "data.domain_field=kind"]).data
    corpus = Corpus(prepare.ensure(options))
    assert corpus.domains == ["one", "text", "two"]
    assert sorted(decode(corpus, "train") + decode(corpus, "held_out")) == sorted(texts(60))
    assert prepare.current(options) == corpus.folder
    assert not (corpus.folder / "work").exists()


def test_files_are_the_same_however_the_work_is_cut_and_shared_out(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "in")
    words = [*overrides, "data.text_field=body", "data.domain_field=kind"]
    whole = prepare.ensure(config.load(words).data)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 200)
    monkeypatch.setattr("moetrain.data.corpus.PIECE_BYTES", 200)
    monkeypatch.setattr(encode, "JOB_BYTES", 300)
    monkeypatch.setattr(spool, "BUFFER", 3)
    words[2] = f"data.dir={tmp_path}/again"
    again = prepare.ensure(config.load([*words, "data.workers=2"]).data)
    assert again.name == whole.name
    for name in ("train.bin", "held_out.bin", "train.docs.npy", "held_out.docs.npy", "tokenizer.json", "manifest.json"):
        assert (again / name).read_bytes() == (whole / name).read_bytes(), name
    table = np.load(whole / "train.docs.npy")
    assert (table[1:, 0] == np.cumsum(table[:-1, 1])).all()


def test_copies_are_found_across_files_or_kept(tmp_path: Path, overrides: list[str]) -> None:
    for name in "ab":
        pq.write_table(pa.table({"text": texts(20)}), tmp_path / "in" / f"{name}.parquet")
    known = Corpus(prepare.ensure(config.load(overrides).data))
    place = tmp_path / "in"
    example = f"{place}/b.parquet:1, as {place}/a.parquet:1"
    assert known.manifest["left_out"] == {"copies of others": {"count": 20, "example": example}}
    kept = Corpus(prepare.ensure(config.load([*overrides, "data.dedup=none"]).data))
    assert sum(kept.manifest["splits"][split]["documents"] for split in prepare.SPLITS) == 40


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"body": ["x"]}, r"a\.parquet: must have the column 'text' \(it has body\); data\.on_bad=skip leaves it out"),
        ({"text": ["x", None]}, r'a\.parquet:2: "text" must be a string; data\.on_bad=skip leaves it out'),
        ({"text": [1, 2]}, r'a\.parquet:1: "text" must be a string'),
        ({"text": ["x"], "domain": [[1]]}, r'a\.parquet:1: "domain" must be a string'),
        (None, r"a\.parquet: cannot be read as Parquet \("),
    ],
)
def test_bad_parquet_is_one_line(tmp_path: Path, overrides: list[str], table: dict | None, message: str) -> None:
    place = tmp_path / "in" / "a.parquet"
    pq.write_table(pa.table(table or {"text": texts(300)}), place)
    if table is None:
        place.write_bytes(place.read_bytes()[:-20])
    (tmp_path / "in" / "b.txt").write_text("words of another file " * 30)
    with pytest.raises(ConfigError, match=message) as caught:
        prepare.ensure(config.load(overrides).data)
    assert "\n" not in str(caught.value)
    assert main(["data", *overrides]) == 2
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    found = Corpus(prepare.ensure(config.load([*overrides, "data.on_bad=skip"]).data))
    assert sum(entry["count"] for entry in found.manifest["left_out"].values()) == (
        2 if table == {"text": [1, 2]} else 1
    )


def test_a_bad_row_in_another_process_is_the_first_one(
    tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        rows = [json.dumps({"text": text}) for text in texts(10)]
        (tmp_path / "in" / f"{name}.jsonl").write_text("\n".join([*rows, "[]"] if name > "a" else rows))
    monkeypatch.setattr("moetrain.data.corpus.PIECE_BYTES", 1)
    with pytest.raises(ConfigError, match=r'b\.jsonl:11: must be JSON with a "text" field'):
        prepare.ensure(config.load([*overrides, "data.workers=2"]).data)
