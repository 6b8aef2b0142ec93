"""Preference pairs of `data=chat`: their forms, what is refused, and how they become rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moetrain import config
from moetrain.config import ConfigError
from moetrain.data import prepare
from moetrain.data.conversations import ChatLoader
from moetrain.data.held_out import held_out_windows
from moetrain.data.opening import open_data
from moetrain.data.preview import read_documents

ASK, YES, NO = {"role": "user", "content": "Is 7 odd?"}, "Yes, it is.", "No."


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pair(number: int, length: int = 1) -> dict[str, Any]:
    ask = {"role": "user", "content": f"Count to {number}."}
    return {"prompt": [ask], "chosen": [say(f"{number} " * length)], "rejected": [say("no")]}


@pytest.fixture(scope="module")
def tokenizer_file(data: list[str]) -> Path:
    return prepare.ensure(config.load(data).data) / "tokenizer.json"


@pytest.fixture
def chat(tmp_path: Path, tokenizer_file: Path) -> Callable[..., list[str]]:
    """Writes rows into a file and returns overrides that read it."""

    def write(rows: list[Any], *more: str) -> list[str]:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        places = [f"data.path={path}", f"data.dir={tmp_path / 'corpora'}", f"data.tokenizer={tokenizer_file}"]
        return ["experiment=dpo", "model=tiny", *places, *more]

    return write


def shown(overrides: list[str], count: int = 100) -> list[tuple[str, str]]:
    """(half, text with what is learned in brackets) of the training documents."""
    found = read_documents(prepare.ensure(config.load(overrides).data), count)
    return [(d.half, "".join(f"[{p['text']}]" if p["learned"] else p["text"] for p in d.pieces)) for d in found]


FORMS = [
    {"prompt": [ASK], "chosen": [say(YES)], "rejected": [say(NO)]},
    {"chosen": [ASK, say(YES)], "rejected": [ASK, say(NO)]},
    {"prompt": ASK["content"], "chosen": [ASK, say(YES)], "rejected": [ASK, say(NO)], "messages": [ASK, say(YES)]},
]


@pytest.mark.parametrize("row", FORMS, ids=["explicit", "implicit", "with the prompt as text"])
def test_messages_go_through_the_template(chat, row: dict[str, Any]) -> None:
    asked = "<|user|>\nIs 7 odd?\n<|assistant|>\n"
    found = shown(chat([row, pair(1)], "data.held_out=0.0001"))
    assert ("chosen", f"{asked}[{YES}<|endoftext|>]") in found
    assert found[found.index(("chosen", f"{asked}[{YES}<|endoftext|>]")) + 1] == (
        "rejected",
        f"{asked}[{NO}<|endoftext|>]",
    )
    assert len(shown(chat([row, pair(1)], "data.held_out=0.0001"), 1)) == 2


def test_text_is_written_as_it_is(chat) -> None:
    explicit = {"prompt": "7 is", "chosen": " odd", "rejected": " even"}
    implicit = {"chosen": "8 is even", "rejected": "8 is odd"}
    found = shown(chat([explicit, implicit, {"chosen": "9 is odd", "rejected": "9 is so"}], "data.held_out=0.0001"))
    expected = [("chosen", "7 is[ odd<|endoftext|>]"), ("rejected", "7 is[ even<|endoftext|>]")]
    expected += [("chosen", "8 is[ even<|endoftext|>]"), ("rejected", "8 is[ odd<|endoftext|>]")]
    assert sum(each in found for each in expected) >= 2
    assert found[0][1].partition("[")[0] == found[1][1].partition("[")[0]


BAD = [
    ({"chosen": [ASK, say(YES)]}, 'must have "rejected" too'),
    ({"prompt": "x", "rejected": "y"}, 'must have "chosen" too'),
    ({"prompt": [ASK], "chosen": [say(YES)], "rejected": [say(YES)]}, '"chosen" and "rejected" must differ'),
    ({"prompt": "x", "chosen": "y", "rejected": "y"}, '"chosen" and "rejected" must differ'),
    ({"prompt": "x", "chosen": "", "rejected": "y"}, '"chosen" and "rejected" must not be empty'),
    ({"chosen": "a", "rejected": "b"}, "must begin with the same prompt"),
    ({"chosen": "ab", "rejected": "abc"}, "must not be empty"),
    ({"chosen": [say(YES)], "rejected": [say(NO)]}, "must begin with the same messages"),
    (
        {"prompt": "Is 8?", "chosen": [ASK, say(YES)], "rejected": [ASK, say(NO)]},
        '"prompt" must be messages, or one of',
    ),
    ({"prompt": [ASK], "chosen": [say(YES)], "rejected": [ASK]}, "must have a message of the assistant"),
    ({"prompt": [ASK], "chosen": [say(YES)], "rejected": "No."}, '"rejected" must be a list of messages'),
    ({"messages": [ASK, say(YES)]}, "rows must be pairs"),
]


def test_bad_pairs_are_named_or_counted(chat) -> None:
    for row, message in BAD:
        with pytest.raises(ConfigError, match=f"pairs.jsonl:2: .*{message}.*data.on_bad=skip leaves it out"):
            prepare.ensure(config.load(chat([pair(1), row, pair(2)])).data)
    overrides = chat([*(pair(n) for n in range(4)), *(row for row, _ in BAD)], "data.on_bad=skip")
    manifest = json.loads((prepare.ensure(config.load(overrides).data) / "manifest.json").read_text())
    assert sum(entry["count"] for entry in manifest["left_out"].values()) == len(BAD)
    assert sum(facts["documents"] for facts in manifest["splits"].values()) == 8


def test_the_template_may_make_them_equal(chat, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    overrides = chat([{"chosen": [ASK, say(YES)], "rejected": [ASK, say(NO)]}, pair(2)])
    with pytest.raises(ConfigError, match=r"pairs.jsonl:1: "):
        prepare.ensure(config.load([*overrides, f"data.chat_template={tmp_path / 't.jinja'}"]).data)


@pytest.mark.parametrize("packs", [True, False])
def test_halves_of_a_pair_are_neighbours(chat, packs: bool) -> None:
    """Rows 2n and 2n + 1 have the same pairs in one order; every pair comes once in a pass; of too long ones none."""
    rows = [*(pair(n, 1 + n % 4) for n in range(40)), pair(1000, 80)]
    overrides = chat(rows, "train.seq_len=96", f"data.pack={packs}", "data.too_long=skip", "train.global_batch=4")
    settings = config.load(overrides)
    corpus, loader = open_data(settings)
    assert isinstance(loader, ChatLoader)
    count, documents = 2 * loader.rows[0].num_windows, corpus.documents("train")
    found, seen = loader.samples(0, count), []
    for row in range(0, count, 2):
        numbers = [list(dict.fromkeys(n for n in found.document[row + half].tolist() if n >= 0)) for half in (0, 1)]
        assert numbers[0] == numbers[1]
        seen += numbers[0]
        for half in (0, 1):
            at = 0
            for number in numbers[half]:
                begin, size, _ = documents[2 * number + half]
                own = slice(begin, begin + size)
                assert (found.tokens[row + half, at : at + size] == corpus.tokens("train")[own]).all()
                assert (found.target[row + half, at : at + size] == corpus.targets("train")[own]).all()  # type: ignore[index]
                at += size
    short = np.flatnonzero((documents[:, 1].reshape(-1, 2) <= 97).all(1)).tolist()
    assert sorted(seen) == short
    assert packs == (count < 2 * len(short))
    assert loader.count_tokens(count) == found.num_tokens
    parts = [loader.samples(a, b).tokens for a, b in ((0, 1), (1, 6), (6, count))]
    assert (np.concatenate(parts) == found.tokens).all()
    assert len(held_out_windows(corpus, settings, 0).tokens) % 2 == 0
    with pytest.raises(ConfigError, match=r"data.too_long=error: 1 pairs are longer .*pairs.jsonl:41"):
        open_data(config.load([*overrides, "data.too_long=error"]))


def test_pairs_are_for_dpo_and_their_chosen_answers_for_sft(chat, tmp_path: Path) -> None:
    overrides = chat([pair(n) for n in range(12)])
    corpus, loader = open_data(config.load([*overrides, "experiment=sft"]))
    assert isinstance(loader, ChatLoader)
    assert any("their chosen conversations are learned" in line for line in loader.describe())
    chosen = corpus.documents("train")[::2]
    count = loader.rows[0].num_windows
    assert loader.samples(0, count).num_tokens == int((chosen[:, 1] - 1).sum())
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps({"text": f"{n} it is"}) + "\n" for n in range(9)))
    with pytest.raises(ConfigError, match=r'train.objective=dpo: needs rows with "chosen" and "rejected", and .*pairs'):
        open_data(config.load(overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.global_batch=7", "train.global_batch=7: must be even under train.objective=dpo"),
        ("train.micro_batch=3", "train.micro_batch=3: must be even under train.objective=dpo"),
        ("data.domain_block=3", "data.domain_block=3: must be even under train.objective=dpo"),
        ("dpo.loss=kto", "dpo.loss=kto: must be 'sigmoid'"),
        ("dpo.beta=0", "dpo.beta=0: must be greater than 0"),
        ("dpo.label_smoothing=0.5", "dpo.label_smoothing=0.5: must be less than 0.5"),
        ("data.attend_within_documents=false", "data.pack=True: must be false"),
        ("data=local", "train.objective=dpo: needs data=chat"),
        ("balance.coefficient=0.1", None),
    ],
)
def test_options_are_checked(chat, override: str, message: str | None) -> None:
    overrides = [*chat([pair(1), pair(2)]), override]
    if override == "data=local":
        overrides = ["experiment=dpo", override]
    if message is None:
        config.load(overrides)
        return
    with pytest.raises(ConfigError) as caught:
        config.load(overrides)
    assert message in str(caught.value)


def test_options_without_effect_are_refused(chat) -> None:
    for more, message in (
        (["dpo.loss=ipo", "dpo.label_smoothing=0.1"], "dpo.label_smoothing=0.1: has no effect with dpo.loss=ipo"),
        (["experiment=sft", "dpo.beta=0.2"], "dpo.beta=0.2: has an effect only with train.objective=dpo"),
    ):
        with pytest.raises(ConfigError) as caught:
            config.load([*chat([pair(1), pair(2)]), *more])
        assert message in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"train.global_batch=6: must be a multiple of 2 ranks × 2 sequences of a pair"
    ):
        config.resolve_early(config.load(chat([pair(1), pair(2)], "train.global_batch=6")), 2)
