"""Corpora, preparation, and the loader as a pure function of (seed, global sample index)."""

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import config
from moetrain.config import ConfigError
from moetrain.data import corpus, prepare
from moetrain.data.bigram import Bigram
from moetrain.data.loader import Corpus, DomainBlocks, Loader, Packed, samples_of


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
    assert {d.domain for d in corpus.documents(options)} == {"even", "text"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"txt": 1}\n', r'a\.jsonl:2: must be JSON with a "text" field'),
        ("a.jsonl", '{"text": 5}\n', r'a\.jsonl:1: "text" must be a string'),
        ("a.bin", "x", "must hold text files or JSONL"),
        ("a.txt", "only one", "at least two documents"),
    ],
)
def test_bad_corpora_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text(content)
    options = config.load(["data=folder", f"data.path={tmp_path}/in", f"data.dir={tmp_path}/out"]).data
    with pytest.raises(ConfigError, match=message):
        prepare.ensure(options)
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]


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


def test_a_tokenizer_of_your_own(data: list[str], small: Corpus) -> None:
    own = config.load([*data, f"data.tokenizer={small.folder}/tokenizer.json"]).data
    again = Corpus(prepare.ensure(own))
    assert again.folder != small.folder
    assert (np.asarray(again.tokens("train")) == np.asarray(small.tokens("train"))).all()


def test_the_local_corpus_has_four_domains(tmp_path: Path) -> None:
    options = config.load([f"data.dir={tmp_path}", "data.max_bytes_per_domain=150000", "data.vocab_size=512"]).data
    manifest = Corpus(prepare.ensure(options)).manifest
    assert manifest["domains"] == ["cpp", "data", "prose", "python"]
    for split in prepare.SPLITS:
        assert all(count > 100 for count in manifest["splits"][split]["tokens_per_domain"].values())


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
    assert bigram.nats(tokens[300:], bigram.tune(tokens[300:])).mean() < 0.85 * np.log(8)
