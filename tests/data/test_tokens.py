"""`data=tokens`: sources that are tokens already, in proportions, as a pure function of (seed, global sample index)."""

import itertools
import json
import os
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moetrain import config
from moetrain.cli import main
from moetrain.config import ConfigError
from moetrain.data import mixture, prepare
from moetrain.data.held_out import held_out_windows
from moetrain.data.loader import Corpus, Packed
from moetrain.data.opening import open_data
from moetrain.data.token_files import DTYPES, open_megatron

CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


def write_megatron(prefix: Path, documents: list[list[int]], dtype: type = np.uint16, kind: str = "") -> None:
    """Megatron's two files by the layout in data/token_files.py. `kind`: "" with borders of documents; "early" without;
    "modes" with a mode for every sequence; "halves" with every document in two sequences."""
    sequences = (
        [half for d in documents for half in (d[: len(d) // 2], d[len(d) // 2 :])] if kind == "halves" else documents
    )
    lengths = np.array([len(s) for s in sequences], np.int32)
    size = np.dtype(dtype).itemsize
    index = b"MMIDIDX\0\0" + struct.pack("<QBQ", 1, CODES[np.dtype(dtype)], len(sequences))
    borders = np.arange(len(documents) + 1, dtype=np.int64) * (2 if kind == "halves" else 1)
    if kind != "early":
        index += struct.pack("<Q", len(borders))
    index += lengths.tobytes() + ((np.cumsum(lengths, dtype=np.int64) - lengths) * size).tobytes()
    index += b"" if kind == "early" else borders.tobytes()
    index += bytes(len(sequences)) if kind == "modes" else b""
    prefix.with_name(f"{prefix.name}.idx").write_bytes(index)
    prefix.with_name(f"{prefix.name}.bin").write_bytes(np.array([t for d in documents for t in d], dtype).tobytes())


@pytest.fixture(scope="module")
def prepared(data: list[str]) -> Path:
    """A folder made by `moetrain data`, of two domains."""
    return prepare.ensure(config.load(data).data)


@pytest.fixture
def documents(prepared: Path) -> list[list[int]]:
    """Forty documents of ten to forty-nine different tokens and the end-of-text token."""
    end, draw = Corpus(prepared).end_of_text, np.random.default_rng(0)
    return [[*draw.integers(1, 300, 10 + n).tolist(), end] for n in range(40)]


@pytest.fixture
def overrides(prepared: Path, tmp_path: Path) -> list[str]:
    words = ["data=tokens", f"data.dir={tmp_path}/corpora", f"data.tokenizer={prepared}/tokenizer.json"]
    return [*words, "model=tiny", "train.seq_len=16", "train.global_batch=8", f"run.dir={tmp_path}/runs"]


@pytest.mark.parametrize("kind", ["", "early", "modes", "halves"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_megatron_files_are_read_as_they_were_written(
    tmp_path: Path, documents: list[list[int]], dtype: type, kind: str, overrides: list[str]
) -> None:
    write_megatron(tmp_path / "web.v1", documents, dtype, kind)
    file = open_megatron(tmp_path / "web.v1.idx")
    assert file.tokens.tolist() == [t for d in documents for t in d]
    assert file.begins.read(0, 41).tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    corpus, samples = open_data(config.load([*overrides, f"data.sources.web.path={tmp_path}/web.v1"]))
    assert corpus.manifest["splits"]["train"]["documents"] == 38  # the last 5 % of the documents are held out
    found = samples.samples(0, 60)
    stream = [t for d in documents[:38] for t in d]
    numbers = np.repeat(np.arange(38), [len(d) for d in documents[:38]])
    seen = set()
    for tokens, numbered in zip(found.tokens.tolist(), found.document.tolist(), strict=True):
        (place,) = (n for n in range(0, len(stream) - 16, 16) if stream[n : n + 17] == tokens)
        assert numbers[place : place + 17].tolist() == numbered
        seen.add(place)
    windows = (len(stream) - 1) // 16
    assert len(seen) == min(60, windows)
    held_out = held_out_windows(corpus, config.load([*overrides, f"data.sources.web.path={tmp_path}/web.v1"]), 0)
    rest = [t for d in documents[38:] for t in d]
    assert held_out.tokens[0].tolist() == rest[:17]
    assert corpus.domains == ["web"]


def mixed(tmp_path: Path, prepared: Path, documents: list[list[int]], *more: str) -> list[str]:
    """Three sources: Megatron's of one file and of two, and a prepared folder."""
    write_megatron(tmp_path / "web", documents)
    (tmp_path / "code").mkdir(exist_ok=True)
    write_megatron(tmp_path / "code" / "a", documents[:15], np.int32)
    write_megatron(tmp_path / "code" / "b", documents[15:])
    places = {"web": "web.bin", "code": "code", "text": prepared}
    return [*(f"data.sources.{name}.path={tmp_path / place}" for name, place in places.items()), *more]


def count_sources(samples, number: int) -> list[int]:
    counts = Counter(samples.mixture.place(sample)[0] for sample in range(number))
    return [counts[n] for n in range(3)]


def test_samples_come_by_their_weights_in_every_stretch(
    tmp_path: Path, prepared: Path, documents: list[list[int]], overrides: list[str]
) -> None:
    weights = {"web": 5, "code": 3, "text": 2}
    words = mixed(tmp_path, prepared, documents, *(f"data.sources.{n}.weight={w}" for n, w in weights.items()))
    corpus, samples = open_data(config.load([*overrides, *words]))
    for number in (100, 1000, 5000):
        assert np.abs(np.array(count_sources(samples, number)) - np.array([0.5, 0.3, 0.2]) * number).max() <= 3
    assert corpus.domains == ["code", "greek", "numbers", "web"]
    found = samples.samples(0, 400)
    shares = np.bincount(found.domain.ravel(), minlength=4) / found.domain.size
    assert abs(shares[3] - 0.5) < 0.02
    assert abs(shares[0] - 0.3) < 0.02


def test_without_weights_samples_come_by_size_and_epochs(
    tmp_path: Path, prepared: Path, documents: list[list[int]], overrides: list[str]
) -> None:
    words = mixed(tmp_path, prepared, documents, "data.sources.web.epochs=2.5", "data.sources.text.epochs=0.5")
    _, samples = open_data(config.load([*overrides, *words]))
    web, code, text = samples.mixture.sources
    sizes = np.array([2.5 * web.num_windows, code.num_windows, 0.5 * text.num_windows])
    one_pass = round(float(sizes.sum()))
    assert np.abs(np.array(count_sources(samples, one_pass)) - sizes).max() <= 3
    places = [samples.mixture.place(sample) for sample in range(one_pass)]
    of_code = Counter(window for source, window in places if source == 1)
    assert set(of_code.values()) <= {1, 2}
    of_web = Counter(window for source, window in places if source == 0)
    assert len(of_web) == web.num_windows
    assert set(of_web.values()) <= {2, 3}


def test_a_pass_has_every_window_once_and_each_pass_another_order() -> None:
    for size in (1, 2, 3, 7, 64, 1000):
        orders = [[mixture.permute(place, size, key) for place in range(size)] for key in ("0/web/0", "0/web/1")]
        assert sorted(orders[0]) == sorted(orders[1]) == list(range(size))
    assert orders[0] != orders[1]
    places = [mixture.permute(place, 10**12, "key") for place in range(2000)]
    assert len(set(places)) == 2000
    assert abs(np.mean(places) / 10**12 - 0.5) < 0.03
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.08


def test_a_sample_does_not_depend_on_who_asks_when(
    tmp_path: Path, prepared: Path, documents: list[list[int]], overrides: list[str]
) -> None:
    settings = config.load([*overrides, *mixed(tmp_path, prepared, documents, "data.sources.web.epochs=3")])
    whole = open_data(settings)[1].samples(1000, 1064)
    for world in (1, 2, 3, 8):  # each rank asks for its part of a global batch, from another place on
        edges = [1000 + 64 * rank // world for rank in range(world + 1)]
        parts = [open_data(settings)[1].samples(*pair) for pair in itertools.pairwise(edges)]
        for name in ("tokens", "domain", "document", "sample"):
            assert (np.concatenate([getattr(part, name) for part in parts]) == getattr(whole, name)).all()
    assert open_data(settings)[1].samples(5, 5).tokens.shape == (0, 17)
    other = open_data(settings.model_copy(update={"train": settings.train.model_copy(update={"seed": 7})}))[1]
    assert not (other.samples(1000, 1064).tokens == whole.tokens).all()


def test_blocks_are_of_one_source(
    tmp_path: Path, prepared: Path, documents: list[list[int]], overrides: list[str]
) -> None:
    words = [*overrides, "data.domain_block=4", *mixed(tmp_path, prepared, documents)]
    with pytest.raises(
        ConfigError, match=r"data.domain_block=4: data.sources.text has several domains; data.sources.te"
    ):
        open_data(config.load(words))
    _, samples = open_data(config.load([*words, "data.sources.text.domain=text"]))
    found = samples.samples(0, 400).domain.reshape(100, 4, 17)
    assert (found == found[:, :1, :1]).all()
    assert set(found.ravel()) == {0, 1, 2}
    seen = Counter(samples.mixture.place(sample) for sample in range(400))
    assert set(seen.values()) == {1}


def test_held_out_text_of_a_prepared_folder_is_judged_as_alone(
    data: list[str], tmp_path: Path, prepared: Path, documents: list[list[int]], overrides: list[str]
) -> None:
    settings = config.load([*overrides, *mixed(tmp_path, prepared, documents)])
    corpus, _ = open_data(settings)
    alone = held_out_windows(Corpus(prepared), settings, Corpus(prepared).domains.index("numbers"))
    number = corpus.domains.index("numbers")
    found = held_out_windows(corpus, settings, number)
    assert (found.tokens == alone.tokens).all()
    assert (found.domain == number).all()
    write_megatron(tmp_path / "valid", documents[:3])
    words = mixed(tmp_path, prepared, documents, f"data.sources.web.held_out={tmp_path}/valid", "data.held_out=0.5")
    other, _ = open_data(config.load([*overrides, *words]))
    judged = held_out_windows(other, settings, other.domains.index("web"))
    assert judged.tokens[0].tolist() == [t for d in documents[:3] for t in d][:17]
    assert other.manifest["splits"]["train"]["documents"] == 40 + 7 + 13 + len(Corpus(prepared).documents("train"))


def test_a_run_goes_on_with_moved_files_but_not_with_changed_ones(
    tmp_path: Path, documents: list[list[int]], overrides: list[str]
) -> None:
    write_megatron(tmp_path / "web", documents)
    first = config.load([*overrides, f"data.sources.web.path={tmp_path}/web"]).data
    known = Corpus(prepare.ensure(first)).fingerprint
    for suffix in ("bin", "idx"):
        os.rename(tmp_path / f"web.{suffix}", tmp_path / f"moved.{suffix}")
    moved = config.load([*overrides, f"data.sources.web.path={tmp_path}/moved"]).data
    folder = prepare.ensure(moved)
    assert Corpus(folder).fingerprint == known
    assert prepare.ensure(moved, known) == folder
    raw = bytearray((tmp_path / "moved.bin").read_bytes())
    raw[2] ^= 1
    (tmp_path / "moved.bin").write_bytes(raw)
    with pytest.raises(
        ConfigError, match=r"^data\.sources: its files are not those it was made of: 1 changed \(.*moved"
    ):
        prepare.ensure(moved, known)
    again = prepare.ensure(moved)
    assert again != folder
    assert Corpus(again).fingerprint != known


def cut(path: Path, *, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def patch(path: Path, at: int, value: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[at : at + len(value)] = value
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("spoil", "more", "message"),
    [
        (
            lambda p: cut(p / "web.bin", by=2),
            "",
            r"web\.bin: has [\d,]+ bytes, but by its \.idx [\d,]+ tokens of uint16 ta",
        ),
        (
            lambda p: cut(p / "web.idx", by=3),
            "",
            r"web\.idx: is cut or damaged: has \d+ bytes, which 40 sequences do not",
        ),
        (lambda p: cut(p / "web.idx", by=520), "", r"web\.idx: is cut or damaged"),
        (lambda p: (p / "web.idx").write_bytes(b"MMIDIDX\0\0"), "", r"web\.idx: is cut: has 9 bytes, no whole header"),
        (lambda p: patch(p / "web.idx", 0, b"TNTIDX"), "", "must be Megatron's index, which begins with MMIDIDX"),
        (lambda p: patch(p / "web.idx", 9, b"\2"), "", "must be of version 1, not 2"),
        (lambda p: patch(p / "web.idx", 17, b"\7"), "", "its dtype has the code 7; tokens are integers"),
        (lambda p: patch(p / "web.idx", 17, b"\x63"), "", "its dtype has the code 99"),
        (lambda p: patch(p / "web.idx", 34 + 160 + 8, b"\0"), "", "the sequences 0 and 1 must lie back to back"),
        (
            lambda p: patch(p / "web.idx", 34 + 480 + 8, b"\x63"),
            "",
            "the borders of its documents must rise from 0 to 40",
        ),
        (
            lambda p: (p / "web.bin").unlink(),
            "",
            r"web\.bin: there is no such file; Megatron's tokens are a .bin and an",
        ),
        (lambda p: (p / "web.idx").unlink(), "", r"web\.idx: there is no such file"),
        (
            lambda p: patch(p / "web.bin", 0, b"\x2c\1"),
            "",
            r"data\.sources\.web=.*web\.bin: has the token 300, and the to",
        ),
        (
            lambda p: 0,
            "data.tokenizer=null",
            r"data\.tokenizer=null: must be the tokenizer\.json that made the tokens of",
        ),
        (
            lambda p: 0,
            "data.sources.b.path=/nowhere",
            r"data\.sources\.b\.path=/nowhere: must be a folder prepared by `mo",
        ),
        (
            lambda p: 0,
            "data.sources.b={path:x,weight:1}",
            r"data\.sources\.web\.weight=null: must be given, as that of b",
        ),
        (lambda p: 0, "data.sources.web.weight=-1", r"data\.sources\.web\.weight=-1\.0: must be above 0"),
        (
            lambda p: 0,
            "data.sources.web.wieght=1",
            r"data\.sources\.web\.wieght=1: a source has no such option; it has p",
        ),
        (lambda p: 0, "data.sources.b={weight:1}", r"data\.sources\.b\.path=: must be given"),
        (
            lambda p: 0,
            "train.seq_len=5000",
            r"train\.seq_len=5000: no file of data\.sources\.web has training documents",
        ),
        (
            lambda p: 0,
            "data.sources.web={weight:1,epochs:2}",
            r"sources\.web\.epochs=2: with its weight \d+ steps take \d",
        ),
        (lambda p: 0, "data.vocab_size=300", r"data\.vocab_size=300: has no effect with data=tokens"),
        (
            lambda p: write_megatron(p / "web", [[5, 6], [7, 6]]),
            "",
            r"every document ends in the token 6, and the tokeni",
        ),
        (
            lambda p: write_megatron(p / "web", [[5, 6] * 50]),
            "",
            r"must have at least two documents, the last of them he",
        ),
        (
            lambda p: 0,
            "data.sources.web.path=.",
            r"data\.sources\.web\.path=\.: must be a folder prepared by `moetrain d",
        ),
    ],
)
def test_what_a_source_must_not_be_is_one_line(
    tmp_path: Path, documents: list[list[int]], overrides: list[str], spoil, more: str, message: str, capsys
) -> None:
    write_megatron(tmp_path / "web", documents)
    spoil(tmp_path)
    words = [*overrides, f"data.sources.web.path={tmp_path}/web", *([more] if more else [])]
    with pytest.raises(ConfigError, match=message) as caught:
        open_data(config.load(words))
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.glob("corpora/.tokens-*.part")]


def test_the_command_line_says_so_too(
    tmp_path: Path, documents: list[list[int]], overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_megatron(tmp_path / "web", documents)
    words = [*overrides[:3], f"data.sources.web.path={tmp_path}/web"]
    assert main(["data", *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["splits"]["train"]["documents"] == 38
    assert not said["up_to_date"]
    cut(tmp_path / "web.bin", by=1)
    assert main(["data", *words]) == 2


def test_documents_without_an_end_are_told(tmp_path: Path, documents: list[list[int]], overrides: list[str]) -> None:
    write_megatron(tmp_path / "web", [d[:-1] for d in documents])
    corpus, _ = open_data(settings := config.load([*overrides, f"data.sources.web.path={tmp_path}/web"]))
    (note,) = prepare.news(corpus.manifest, settings.data)
    assert "40 of 40 documents do not end in the end-of-text token 0: nothing separates them" in note


def test_a_prepared_folder_alone_brings_its_tokenizer(prepared: Path, overrides: list[str]) -> None:
    words = [word for word in overrides if not word.startswith("data.tokenizer")]
    corpus, samples = open_data(config.load([*words, f"data.sources.text.path={prepared}"]))
    assert corpus.tokenizer.to_str() == Corpus(prepared).tokenizer.to_str()
    packed = Packed(Corpus(prepared), "train", 16, seed=0)
    found = samples.samples(0, samples.mixture.sources[0].num_windows)
    assert abs(len(found.tokens) - packed.num_windows) <= 1
    raw = np.asarray(Corpus(prepared).tokens("train")).astype(int)
    assert sorted(map(tuple, found.tokens.tolist())) == sorted(
        tuple(raw[n : n + 17].tolist()) for n in range(0, len(raw) - 16, 16)
    )


def test_options_of_tokens_are_refused_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^data\.sources={}: must name a source, such as data\.sources\.web\.path=PATH$"
    ):
        config.load(["data=tokens"])
    with pytest.raises(ConfigError, match=r"^data\.workers=2: the data local has no such option$"):
        config.load(["data.workers=2"])
    with pytest.raises(ConfigError, match=r"^data\.sources=.*: the data local has no such option$"):
        config.load(["data.sources.web.path=web"])
