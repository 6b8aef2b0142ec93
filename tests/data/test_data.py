"""Corpora, preparation, and the loader as a pure function of (seed, global sample index)."""

import bz2
import gzip
import itertools
import json
import lzma
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import config, runs
from moetrain.config import ConfigError, Data
from moetrain.data import corpus, prepare, sources, spool, tokenizer
from moetrain.data.bigram import Bigram
from moetrain.data.files import LeftOut
from moetrain.data.held_out import held_out_windows
from moetrain.data.loader import Corpus, DomainBlocks, Loader, Packed
from moetrain.data.opening import open_data, samples_of
from moetrain.distributed.mesh import Mesh
from moetrain.observe.scores import Score
from moetrain.observe.summary import bigram_scores
from moetrain.training.step import check_same_corpus
from tests.pool import Pool


@pytest.fixture(scope="module")
def small(data: list[str]) -> Corpus:
    return Corpus(prepare.ensure(config.load(data).data))


def test_both_splits_hold_every_domain_and_share_no_document(small: Corpus) -> None:
    assert small.domains == ["greek", "numbers"]
    texts = {}
    for split in prepare.SPLITS:
        table, tokens = small.documents(split), small.tokens(split)
        assert set(table[:, 2]) == {0, 1}
        assert table[:, 1].sum() == len(tokens)
        texts[split] = {small.tokenizer.decode(tokens[b : b + n - 1].tolist()) for b, n, _ in table}
        assert all(tokens[b + n - 1] == small.end_of_text for b, n, _ in table)
    assert not texts["train"] & texts["held_out"]
    assert sum(len(t) for t in texts.values()) == 48


def test_token_bytes_add_up_to_the_text(small: Corpus) -> None:
    tokens = np.asarray(small.tokens("held_out")).astype(int)
    assert small.token_bytes[tokens].sum() == small.manifest["splits"]["held_out"]["bytes"]


def test_every_token_is_predicted_once_an_epoch(small: Corpus) -> None:
    packed = Packed(small, "train", 16, seed=3)
    windows = packed.windows(list(range(packed.num_windows)))
    stream = np.concatenate([small.tokens("train")[b : b + n] for b, n, _ in packed.table]).astype(int)
    used = packed.num_windows * 16
    assert (windows.tokens[:, :-1].ravel() == stream[:used]).all()
    assert (windows.tokens[:, 1:].ravel() == stream[1 : used + 1]).all()
    labels = np.repeat(packed.table[:, 2], packed.table[:, 1])
    assert (windows.domain[:, 1:].ravel() == labels[1 : used + 1]).all()
    starts = np.flatnonzero(np.diff(windows.document.ravel()) > 0)
    assert len(starts) > 0


@given(st.integers(0, 500), st.lists(st.integers(0, 9), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_sample_does_not_depend_on_who_asks(small: Corpus, begin: int, sizes: list[int]) -> None:
    loader = Loader(small, 16, seed=1)
    whole = loader.samples(begin, begin + sum(sizes))
    edges = begin + np.cumsum([0, *sizes])
    fresh = Loader(small, 16, seed=1)
    parts = [fresh.samples(int(a), int(b)) for a, b in itertools.pairwise(edges)]
    for name in ("tokens", "domain", "document"):
        assert (np.concatenate([getattr(p, name) for p in parts]) == getattr(whole, name)).all()


def test_epochs_and_seeds_differ(small: Corpus) -> None:
    loader = Loader(small, 16, seed=1)
    n = loader.num_windows
    first, second = loader.samples(0, n).tokens, loader.samples(n, 2 * n).tokens
    assert not (first == second).all()
    order = lambda tokens: sorted(map(tuple, tokens.tolist()))  # noqa: E731
    assert order(first) == order(second)
    assert not (Loader(small, 16, seed=2).samples(0, n).tokens == first).all()


@given(st.integers(0, 300), st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_blocks_are_of_one_domain_whoever_asks(small: Corpus, begin: int, sizes: list[int], block: int) -> None:
    whole = DomainBlocks(small, 16, 1, block).samples(begin, begin + sum(sizes))
    edges = begin + np.cumsum([0, *sizes])
    fresh = DomainBlocks(small, 16, 1, block)
    parts = [fresh.samples(int(a), int(b)) for a, b in itertools.pairwise(edges)]
    for name in ("tokens", "domain", "document"):
        assert (np.concatenate([getattr(p, name) for p in parts]) == getattr(whole, name)).all()
    numbers = np.arange(begin, begin + sum(sizes)) // block
    for number in set(numbers):
        assert len(set(whole.domain[numbers == number].ravel())) == 1


def test_an_epoch_of_blocks_has_every_window_once_and_domains_by_their_tokens(small: Corpus) -> None:
    block = 2
    loader = DomainBlocks(small, 16, 1, block)
    epoch = block * len(loader.blocks)
    first, second = loader.samples(0, epoch), loader.samples(epoch, 2 * epoch)
    for domain, packed in enumerate(loader.domains):
        here = first.domain[:, 0] == domain
        assert here.sum() == packed.num_windows // block * block
        windows = packed.windows(list(range(packed.num_windows)))
        rows = [*map(tuple, np.concatenate([windows.tokens, windows.document], axis=1).tolist())]
        found = [*map(tuple, np.concatenate([first.tokens, first.document], axis=1)[here].tolist())]
        assert not Counter(found) - Counter(rows)
    assert not (first.tokens == second.tokens).all()
    assert not (DomainBlocks(small, 16, 2, block).samples(0, epoch).tokens == first.tokens).all()


def test_a_block_larger_than_a_domain_is_refused(data: list[str], small: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"data.domain_block=100000: must be at most \d+, the sequences of"):
        samples_of(small, config.load([*data, "data.domain_block=100000"]))


def test_jsonl_with_and_without_domains(tmp_path: Path) -> None:
    rows = [
        {"text": f"words {n} " * 20, "domain": "even"} if n % 2 == 0 else {"text": f"other {n} " * 20}
        for n in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    options = config.load(["data=folder", f"data.path={tmp_path}/a.jsonl", f"data.dir={tmp_path}/out"]).data
    made = Corpus(prepare.ensure(options))
    assert made.domains == ["even", "text"]
    assert sum(made.manifest["splits"][split]["documents"] for split in prepare.SPLITS) == 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"txt": 1}\n', r'a\.jsonl:2: must be JSON with a "text" field'),
        ("a.jsonl", '{"text": 5}\n', r'a\.jsonl:1: "text" must be a string'),
        ("a.bin", "x", "must hold text files or JSONL"),
        ("a.txt", "only one", "at least two documents"),
        (
            "a.jsonl",
            '{"text": "fine"}\n\n{"text": "\\ud83d"}\n',
            r'a\.jsonl:3: "text" must be Unicode.*ud83d.*on_bad=skip',
        ),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', r"a\.jsonl:2: must be UTF-8 text \(here the byte 0xe9"),
        ("a.jsonl", '{"text": "x", "domain": ["a"]}', r'a\.jsonl:1: "domain" must be a string'),
        ("a.jsonl", "[" * 100_000, r'a\.jsonl:1: must be JSON with a "text" field'),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.txt", b"one\ntwo\ncaf\xe9", r"a\.txt:3: must be UTF-8 text \(here the byte 0xe9"),
        ("a.txt", "utf 16".encode("utf-16"), r"a\.txt: must be UTF-8 text, not binary data or UTF-16"),
    ],
)
def test_bad_corpora_are_named(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    options = config.load(["data=folder", f"data.path={tmp_path}/in", f"data.dir={tmp_path}/out"]).data
    with pytest.raises(ConfigError, match=message):
        prepare.ensure(options)
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]


def _documents(folder: Path, work: Path, *more: str) -> tuple[list[corpus.Document], LeftOut]:
    """The documents of a folder that are taken, in order."""
    left_out = LeftOut()
    options = config.load(["data=folder", f"data.path={folder}", *more]).data
    found = spool.collect(options, work, left_out, lambda number: None)
    documents = []
    for texts, splits, domains in zip(found.shards, found.splits, found.domains, strict=True):
        for row in np.flatnonzero(splits):
            documents.append(texts.read(int(row))._replace(domain=found.names[domains[row]]))
    return documents, left_out


@pytest.fixture
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def test_what_is_bad_is_skipped_and_counted_where_asked(tmp_path: Path, work: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.jsonl").write_bytes(
        b'{"text": "one"}\n{"text": "\\ud83d"}\n{"text": "caf\xe9"}\n{"text": "two"}\n5\n'
    )
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"three")[:-4])
    found, left_out = _documents(tmp_path, work, "data.on_bad=skip")
    assert [d.text for d in found] == ["one", "two"]
    assert {reason: n["count"] for reason, n in left_out.found.items()} == {
        "must be UTF-8 text": 2,
        '"text" must be Unicode, not half a surrogate pair': 1,
        'must be JSON with a "text" field': 1,
        "cannot be unpacked": 1,
    }


def test_documents_that_differ_are_kept_and_copies_counted(tmp_path: Path, work: Path) -> None:
    texts = ["x = a + b\n", "x = a - b\n", "x = a * b\n", "x = a + b\r\n", "  x = a + b  ", "X = a + b"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.py").write_bytes(text.encode())
    found, left_out = _documents(tmp_path, work)
    assert [d.text for d in found] == [texts[n] for n in (0, 1, 2, 5)]
    assert left_out.found == {"copies of others": {"count": 2, "example": f"{tmp_path}/3.py, as {tmp_path}/0.py"}}
    near, left_out = _documents(tmp_path, work, "data.dedup=near")
    assert [d.text for d in near] == texts[:3]
    assert left_out.found["near-copies of others (data.dedup=near)"]["count"] == 3


def test_files_are_read_by_kind_whatever_their_case_and_packing_and_the_others_counted(
    tmp_path: Path, work: Path
) -> None:
    row = lambda text: json.dumps({"text": text}).encode()  # noqa: E731
    contents = {
        "1.jsonl": row("one"),
        "2.JSONL": row("two"),
        "3.jsonl.gz": gzip.compress(row("three")),
        "4.txt.xz": lzma.compress(b"four"),
        "5.TXT.BZ2": bz2.compress(b"five"),
        "6.rs": b"six",
        "7.HTML": b"seven",
        "8.tex": b"\xef\xbb\xbfeight",
        "README": b"nine",
        "a.png": b"no",
        "b.png": b"no",
        "c.empty.txt": b" \n",
        ".DS_Store": b"\0\0",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("not this")
    (tmp_path / "link.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    found, left_out = _documents(tmp_path, work)
    assert [d.text for d in found] == ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert {d.domain for d in found} == {"text"}
    assert {reason: n["count"] for reason, n in left_out.found.items()} == {
        "hidden": 2,
        "the suffix .png is none of text": 2,
        "empty": 1,
        "link to nothing": 1,
        "not a regular file": 1,
    }


def test_domains_get_names_that_are_words(tmp_path: Path, work: Path) -> None:
    for label in ("My Books", "all", "книги"):
        (tmp_path / "in" / label).mkdir(parents=True)
        (tmp_path / "in" / label / "a.txt").write_text(label)
    found, _ = _documents(tmp_path / "in", work)
    assert sorted(d.domain for d in found) == ["My_Books", "all_", "книги"]
    (tmp_path / "in" / "My_Books").mkdir()
    (tmp_path / "in" / "My_Books" / "b.txt").write_text("another")
    with pytest.raises(ConfigError, match="'My Books' and 'My_Books' would both be named My_Books"):
        _documents(tmp_path / "in", work)


def test_a_single_file_is_cut_and_its_end_held_out(tmp_path: Path) -> None:
    lines = [f"line {n} of a play" for n in range(400)]
    (tmp_path / "input.txt").write_text("\n".join(lines))
    overrides = [f"data.path={tmp_path}/input.txt", f"data.dir={tmp_path}/out", "data.vocab_size=300"]
    made = Corpus(prepare.ensure(config.load(["data=folder", *overrides, "data.held_out=0.1"]).data))
    train, held_out = ("".join(made.tokenizer.decode(made.tokens(s)[:-1].tolist())) for s in prepare.SPLITS)
    assert train + held_out == "\n".join(lines)
    assert held_out.startswith("line ")
    assert 0.08 < len(held_out) / len(train + held_out) <= 0.1
    assert list(prepare.news(made.manifest, config.load(["data=folder", *overrides, "data.held_out=0.1"]).data)) == [
        "the domain text is one document: its last 10% are held out"
    ]


def test_text_without_spaces_is_learnt_from_in_bounded_pieces(tmp_path: Path) -> None:
    draw = random.Random(0)
    for number in range(3):
        (tmp_path / f"{number}.fasta").write_text("".join(draw.choices("ACGT", k=200_000)))
    options = config.load(["data=folder", f"data.path={tmp_path}", f"data.dir={tmp_path}/out", "data.vocab_size=400"])
    made = Corpus(prepare.ensure(options.data))
    assert made.token_bytes.max() <= tokenizer.PIECE
    assert sum(s["bytes"] for s in made.manifest["splits"].values()) == 600_000
    assert made.token_bytes[np.asarray(made.tokens("train"))].sum() == made.manifest["splits"]["train"]["bytes"]


def test_a_long_document_is_encoded_in_parts(small: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one two three four\nfive six", "a" * 50, "x", "one two"]
    monkeypatch.setattr(tokenizer, "SLICE", 10)
    encoded = [ids.tolist() for ids in tokenizer.encode(small.tokenizer, texts)]
    assert [small.tokenizer.decode(ids) for ids in encoded] == texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t["model"].update(vocab={**t["model"]["vocab"], "gap": 1 << 30}),
            "must be numbered below 1,048,576",
        ),
        (lambda t: t["added_tokens"].clear() or t["model"]["vocab"].pop("<|endoftext|>"), "an end-of-text token"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "must give text back as it was"),
        (lambda t: t["model"]["merges"].insert(0, ["no", "where"]), "must be a tokenizer.json"),
        (lambda t: t.clear(), "must be a tokenizer.json"),
        (lambda t: t.update(decoder=None), "must give text back as it was"),
    ],
)
def test_a_tokenizer_that_cannot_serve_is_refused(small: Corpus, tmp_path: Path, change, message: str) -> None:
    found = json.loads((small.folder / "tokenizer.json").read_text())
    change(found)
    (tmp_path / "own.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=message) as caught:
        tokenizer.read(str(tmp_path / "own.json"))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_truncates_is_made_to_read_all(small: Corpus, tmp_path: Path) -> None:
    found = json.loads((small.folder / "tokenizer.json").read_text())
    found["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "own.json").write_text(json.dumps(found))
    (ids,) = tokenizer.encode(tokenizer.read(str(tmp_path / "own.json")), ["one two three four five six"])
    assert small.tokenizer.decode(ids.tolist()) == "one two three four five six"


def _prepare_slowly(overrides: list[str], started: str) -> None:
    def stall(*args: object) -> None:
        Path(started).touch()
        time.sleep(60)

    prepare._write = stall  # type: ignore[assignment]
    prepare.ensure(config.load(overrides).data)


def test_a_killed_preparation_leaves_nothing_half_made(corpus_text: Path, tmp_path: Path) -> None:
    overrides = ["data=folder", f"data.path={corpus_text}", f"data.dir={tmp_path}/out", "data.vocab_size=300"]
    started = tmp_path / "started"
    process = multiprocessing.get_context("spawn").Process(target=_prepare_slowly, args=(overrides, str(started)))
    process.start()
    while not started.exists():
        assert process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    options = config.load(overrides).data
    assert not prepare.folder_of(options).exists()
    folder = prepare.ensure(options)
    assert sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) == [folder.name]


def _text(folder: Path, number: int = 12) -> Data:
    """Settings of a corpus of that many short texts in `folder`/in."""
    (folder / "in").mkdir(exist_ok=True)
    for n in range(number):
        (folder / "in" / f"{n}.txt").write_text(f"text number {n} of some\n")
    return config.load(["data=folder", f"data.path={folder}/in", f"data.dir={folder}/out", "data.vocab_size=300"]).data


def test_changed_text_is_prepared_again_beside_what_was(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    options = _text(tmp_path)
    first = prepare.ensure(options)
    assert prepare.current(options) == prepare.ensure(options) == first
    os.utime(tmp_path / "in" / "3.txt", (1, 1))  # another time, the same content
    assert prepare.current(options) == first
    assert sources.change(first, options) is None

    def changed(said: str) -> Path:
        assert sources.change(first, options) == f"its files are not those it was made of: {said}"
        assert prepare.current(options) is None
        folder = prepare.ensure(options)
        assert "prepared again, and it stays as it is" in capsys.readouterr().out
        assert prepare.current(options) == folder
        return folder

    (tmp_path / "in" / "3.txt").write_text("text number 9 of same\n")  # the same size
    second = changed("1 changed (3.txt)")
    (tmp_path / "in" / "3.txt").write_text("text number 3 of some\n")
    assert prepare.current(options) == first  # back again
    (tmp_path / "in" / "12.txt").write_text("one more\n")
    (tmp_path / "in" / "13.txt").write_text("and another\n")
    (tmp_path / "in" / "0.txt").unlink()
    third = changed("2 new (12.txt, ...), 1 gone (0.txt)")
    assert prepare.prepared(options) == [third, second, first]
    keep = options.model_copy(update={"on_change": "keep"})
    shutil.rmtree(tmp_path / "in")
    assert sources.change(first, options) == f"{tmp_path}/in is gone"
    assert prepare.ensure(keep) == third
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        prepare.ensure(options)


def test_a_run_goes_on_with_its_own_corpus_or_is_refused(tmp_path: Path) -> None:
    options = _text(tmp_path)
    first = prepare.ensure(options)
    known = Corpus(first).fingerprint
    assert prepare.ensure(options, known) == first
    (tmp_path / "in" / "3.txt").write_text("text number 9 of same\n")
    rule = r"its files .* 1 changed \(3.txt\); data.on_change=keep goes on .*; another run.name starts anew"
    with pytest.raises(ConfigError, match=rule):
        prepare.ensure(options, known)
    keep = options.model_copy(update={"on_change": "keep"})
    second = prepare.ensure(options)
    assert second != first
    assert Corpus(second).fingerprint != known
    assert prepare.ensure(keep, known) == first
    assert prepare.ensure(keep) == second

    words = ["data=folder", f"data.path={tmp_path}/in", f"data.dir={tmp_path}/out", "data.vocab_size=300"]
    words += ["model=tiny", "train.seq_len=4", f"run.dir={tmp_path}", "run.name=mine"]
    (tmp_path / "mine").mkdir()
    runs.keep_corpus(tmp_path / "mine", known)
    with pytest.raises(ConfigError, match=rule):
        open_data(config.load(words))
    assert open_data(config.load([*words, "data.on_change=keep"]))[0].folder == first
    assert open_data(config.load([*words, "checkpoint.resume=none"]))[0].folder == second
    for damaged in ("", "[1]", "{}", '{"tokens": 5}', "[" * 5000):
        (tmp_path / "mine" / "corpus.json").write_text(damaged)
        assert open_data(config.load(words))[0].folder == second


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.bin", b"short"),
        ("held_out.docs.npy", b""),
        ("manifest.json", b'{"vocab_size": 300, "spli'),
        ("manifest.json", b"[]"),
        ("tokenizer.json", None),
    ],
)
def test_a_damaged_corpus_is_prepared_again(tmp_path: Path, name: str, content: bytes | None) -> None:
    options = _text(tmp_path)
    first = prepare.ensure(options)
    before = Corpus(first).fingerprint
    (first / name).unlink() if content is None else (first / name).write_bytes(content)
    assert prepare.current(options) is None
    assert Corpus(prepare.ensure(options)).fingerprint == before


def test_a_corpus_of_an_earlier_version_is_prepared_again(tmp_path: Path) -> None:
    options = _text(tmp_path)
    first = prepare.ensure(options)
    manifest = json.loads((first / "manifest.json").read_text())
    del manifest["splits"]["train"]["sha256"]  # 0.1 kept none
    (first / "manifest.json").write_text(json.dumps(manifest))
    assert prepare.current(options) is None
    assert Corpus(prepare.ensure(options)).fingerprint["tokens"]


def test_no_room_for_a_corpus_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    options = _text(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # of a file: the tokenizer's takes more
    try:
        with pytest.raises(ConfigError, match=r"data\.dir=.*/out: must have room for the corpus \(File too large\)"):
            prepare.ensure(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    assert prepare.ensure(options).is_dir()


def another_corpus_on_rank_1(mesh: Mesh, folder: str) -> str:
    corpus = Corpus(Path(folder))
    check_same_corpus(corpus, mesh)
    if mesh.rank == 1:
        corpus.fingerprint["tokens"] = "others"
    try:
        check_same_corpus(corpus, mesh)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_with_different_corpora_are_refused_on_all_of_them(pool: Pool, small: Corpus) -> None:
    said = pool.run(another_corpus_on_rank_1, 2, str(small.folder))
    line = f"data: ranks have different corpora (rank 0 {small.folder} and rank 1 {small.folder}); set data.dir to a f"
    assert [words.startswith(line) for words in said] == [True, True]


def test_a_corpus_deleted_under_a_run_stays_readable(tmp_path: Path) -> None:
    options = _text(tmp_path)
    opened = Corpus(prepare.ensure(options))
    opened.hold()
    shutil.rmtree(opened.folder)
    for split in prepare.SPLITS:
        assert Packed(opened, split, 4, seed=0).windows([0]).tokens.shape == (1, 5)
    assert opened.tokenizer.decode(opened.tokens("train")[:4].tolist()).startswith("text")


def test_a_tokenizer_of_your_own(data: list[str], small: Corpus) -> None:
    words = [word for word in data if not word.startswith("data.vocab_size")]  # the tokenizer's counts
    own = config.load([*words, f"data.tokenizer={small.folder}/tokenizer.json"]).data
    again = Corpus(prepare.ensure(own))
    assert again.folder != small.folder
    assert (np.asarray(again.tokens("train")) == np.asarray(small.tokens("train"))).all()


def test_the_local_corpus_has_four_domains(tmp_path: Path) -> None:
    options = config.load([f"data.dir={tmp_path}", "data.max_bytes_per_domain=150000", "data.vocab_size=512"]).data
    manifest = Corpus(prepare.ensure(options)).manifest
    assert manifest["domains"] == ["cpp", "data", "prose", "python"]
    for split in prepare.SPLITS:
        assert all(count > 100 for count in manifest["splits"][split]["tokens_per_domain"].values())


def test_text_that_does_not_fill_a_sequence_is_judged_as_one_of_its_own(small: Corpus, data: list[str]) -> None:
    """Each domain's held-out text is a few documents, shorter together than a sequence of 4,096 tokens."""
    settings = config.load([*data, "train.seq_len=4096"])
    for number, name in enumerate(small.domains):
        windows = held_out_windows(small, settings, number)
        tokens = small.manifest["splits"]["held_out"]["tokens_per_domain"][name]
        assert windows.tokens.shape == (1, tokens)
        assert (windows.domain == number).all()
    loader = Loader(small, 32, 0)
    shorter = settings.model_copy(update={"train": settings.train.model_copy(update={"seq_len": 32})})
    for found in (bigram_scores(settings, small, loader, 4), bigram_scores(shorter, small, loader, 4)):
        assert found is not None
        assert set(found) == {*small.domains, "all"}
        assert all(bits is not None and 0 < bits < 10 for bits in found.values())


def test_a_score_of_nothing_is_no_number() -> None:
    nothing = Score(0.0, 0, 0)
    assert np.isnan([nothing.loss, nothing.perplexity, nothing.bits_per_byte]).all()
    assert Score(2.0, 1, 1).loss == 2.0


def test_the_bigram_is_a_distribution_and_learns() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 6, 400)
    tokens[1::2] = (tokens[::2] + 1) % 8  # half of the tokens follow from the one before
    bigram = Bigram(8)
    bigram.see(tokens[:300])
    bigram.fit()
    for before in range(8):
        pairs = np.stack([np.full(8, before), np.arange(8)], axis=1)
        assert np.exp(-bigram.nats(pairs, 0.5)).sum() == pytest.approx(1.0)
    assert bigram.nats(tokens[300:], bigram.tune([tokens[300:]])).mean() < 0.85 * np.log(8)
