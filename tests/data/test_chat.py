"""`data=chat`: conversations out of files, their masks, and rows of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain import config
from moetrain.config import ConfigError
from moetrain.data import prepare
from moetrain.data.chat_files import read_conversations
from moetrain.data.conversations import ChatLoader, pack
from moetrain.data.files import LeftOut
from moetrain.data.held_out import held_out_windows
from moetrain.data.loader import Corpus
from moetrain.data.manifest import problem
from moetrain.data.opening import open_data
from moetrain.data.preview import read_documents
from tests.training.test_train import rows_of, run

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
FORGETFUL = "{% for m in messages %}{{ m.role }}: {% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %};"
FORGETFUL += "{% endfor %}"
TURNS = [("user", "Is 7 odd?"), ("assistant", "Yes, é."), ("user", "And 8?"), ("assistant", "No.")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


def turn(number: int, length: int = 1) -> dict[str, Any]:
    """A conversation about a number, of so many words."""
    ask, say = f"Count to {number}.", " ".join(["one two three"] * length)
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": say}]}


@pytest.fixture(scope="module")
def tokenizer_file(data: list[str]) -> Path:
    return prepare.ensure(config.load(data).data) / "tokenizer.json"


@pytest.fixture
def chat(tmp_path: Path, tokenizer_file: Path) -> Callable[..., list[str]]:
    """Writes rows into a file and returns overrides that train on it."""

    def write(rows: list[Any], *more: str, name: str = "chat.jsonl") -> list[str]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        places = [f"data.path={path}", f"data.dir={tmp_path / 'corpora'}", f"data.tokenizer={tokenizer_file}"]
        return ["data=chat", *places, *more]

    return write


def masked(overrides: list[str]) -> list[str]:
    """The training documents, what is learned of them in brackets."""
    shown = read_documents(prepare.ensure(config.load(overrides).data), 100)
    return ["".join(f"[{p['text']}]" if p["learned"] else p["text"] for p in found.pieces) for found in shown]


def template_of(tmp_path: Path, text: str) -> str:
    (tmp_path / "template.jinja").write_text(text)
    return f"data.chat_template={tmp_path / 'template.jinja'}"


def test_only_the_assistant_is_learned(chat, tmp_path: Path) -> None:
    """By the marks of the plain template; by prefixes where a template has no marks; prompts never."""
    half = {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]}
    plain = {"prompt": "one t", "completion": "wo"}  # a token by itself, "two", would span both
    rows = [{"messages": MESSAGES}, half, plain, {"text": "as it is"}, turn(5)]
    share = "data.held_out=0.0001"
    marked = masked(chat(rows, share))
    asked = "<|user|>\nIs 7 odd?\n<|assistant|>\n"
    assert f"{asked}[Yes, é.<|endoftext|>]\n<|user|>\nAnd 8?\n<|assistant|>\n[No.<|endoftext|>]" in marked
    assert "one t[wo<|endoftext|>]" in marked
    assert any(text.startswith("a") and text.endswith("is<|endoftext|>]") for text in marked)
    asked = "<|im_start|>user\nIs 7 odd?<|im_end|>\n<|im_start|>assistant\n"
    and_8 = "<|im_start|>user\nAnd 8?<|im_end|>\n<|im_start|>assistant\n[No.<|im_end|>\n]"
    by_prefix = masked(chat([{"messages": MESSAGES}, turn(5)], share, template_of(tmp_path, CHATML)))
    assert f"{asked}[Yes, é.<|im_end|>\n]{and_8}" in by_prefix
    by_prefix = masked(chat([half, turn(5)], share, template_of(tmp_path, CHATML)))
    assert f"{asked}Yes, é.<|im_end|>\n{and_8}" in by_prefix


def test_the_template_beside_the_tokenizer_is_taken(chat, tmp_path: Path, tokenizer_file: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "bos_token": None}))
    overrides = chat([turn(1), turn(2), turn(3)], f"data.tokenizer={tmp_path / 'tokenizer.json'}")
    assert all(text.startswith("<|im_start|>user") for text in masked(overrides))
    (tmp_path / "chat_template.jinja").write_text(CHATML.replace("im_start", "begin"))  # another corpus
    assert all(text.startswith("<|begin|>user") for text in masked(overrides))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (FORGETFUL, r"template.jinja: the first 2 of 4 messages of .*chat.jsonl:1 are not written as the whole"),
        ("{% for m in messages %}", r"template.jinja: must be a Jinja template; line 1"),
        ("{{ raise_exception('no system') }}", r"chat.jsonl:1: the chat template cannot write it \(no system\)"),
        ("{{ messages[0].nothing + 1 }}", r"chat.jsonl:1: the chat template cannot write it"),
        ("{% generation %}{% endgeneration %}", r"chat.jsonl:1: the chat template marks nothing of it"),
    ],
)
def test_a_template_that_fails_is_named(chat, tmp_path: Path, template: str, message: str) -> None:
    overrides = chat([{"messages": MESSAGES}, turn(2)], template_of(tmp_path, template))
    with pytest.raises(ConfigError, match=message):
        prepare.ensure(config.load(overrides).data)


BAD = [
    ("{", "must be JSON"),
    ("[]", "must be an object with"),
    ({"conversations": []}, '"messages", "prompt" and "completion", "chosen" and "rejected", or "text"'),
    ({"messages": []}, '"messages" must be a list of messages'),
    ({"messages": [{"role": "user", "content": "?"}]}, "must have a message of the assistant"),
    ({"messages": [{"content": "?"}]}, r'messages\[0\] must be an object with "role"'),
    ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, r"messages\[0\].content must be text"),
    ({"messages": [{"role": "assistant", "content": "x", "weight": 0}]}, r"messages\[0\].weight must be 1"),
    ({"messages": [{"role": "assistant", "content": "\ud800"}]}, "must be Unicode"),
    ({"messages": MESSAGES, "tools": "{"}, '"tools" must be a list'),
    ({"messages": MESSAGES, "domain": True}, '"domain" must be a string'),
    ({"prompt": "x", "completion": ""}, '"completion" must not be empty'),
    ({"prompt": "x", "completion": MESSAGES[1:2]}, '"prompt" must be a list of messages'),
    ({"text": "  "}, '"text" must be text'),
]


def test_bad_rows_are_named_or_counted(chat) -> None:
    for row, message in BAD:
        overrides = chat([turn(1), row, turn(2)])
        with pytest.raises(ConfigError, match=f"chat.jsonl:2: .*{message}.*data.on_bad=skip leaves it out"):
            prepare.ensure(config.load(overrides).data)
    good = [turn(n) for n in range(4)]
    folder = prepare.ensure(config.load(chat([*good, *(row for row, _ in BAD)], "data.on_bad=skip")).data)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sum(entry["count"] for entry in manifest["left_out"].values()) == len(BAD)
    assert sum(facts["documents"] for facts in manifest["splits"].values()) == len(good)


def test_folders_are_domains_and_lists_are_read(chat, tmp_path: Path) -> None:
    chat([turn(n) for n in range(3)], name="rows/code/a.jsonl")
    (tmp_path / "rows" / "prose").mkdir()
    (tmp_path / "rows" / "prose" / "b.json").write_text(json.dumps([turn(n) for n in range(3, 6)]))
    (tmp_path / "rows" / "README.md").write_text("what this is")
    left_out = LeftOut()
    found = list(read_conversations(tmp_path / "rows", "error", left_out))
    assert [(Path(c.where).name, c.domain) for c in found] == [
        *((f"a.jsonl:{n}", "code") for n in (1, 2, 3)),
        *((f"b.json:{n}", "prose") for n in (1, 2, 3)),
    ]
    assert list(left_out.found) == ["the suffix .md is none of conversations"]


def test_tables_hold_the_same_rows(tmp_path: Path) -> None:
    """Parquet, and the folder that `datasets.Dataset.save_to_disk` writes."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([turn(1) | {"domain": None}, {"messages": MESSAGES, "domain": "odd"}])
    parquet.write_table(table, tmp_path / "rows.parquet")
    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    with pyarrow.ipc.new_stream(str(saved / "data-00000-of-00001.arrow"), table.schema) as out:
        out.write_table(table)
    for name in ("state.json", "dataset_info.json"):
        (saved / name).write_text("{}")
    for path in (tmp_path / "rows.parquet", saved):
        found = list(read_conversations(path, "error", LeftOut()))
        assert [list(c.messages) for c in found] == [turn(1)["messages"], MESSAGES]
        assert [c.domain for c in found] == [None, "odd"]
    (saved.parent / "dataset_dict.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is a dict of datasets; choose one, such as data.path=.*train"):
        list(read_conversations(saved.parent, "error", LeftOut()))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-9])
    with pytest.raises(ConfigError, match=r"cut.parquet: cannot be read"):
        list(read_conversations(tmp_path / "cut.parquet", "error", LeftOut()))


@given(st.lists(st.integers(2, 17), max_size=40))
@settings(max_examples=60, deadline=None)
def test_packing_loses_nothing_and_wastes_little(sizes: list[int]) -> None:
    rows = pack(sizes, 17)
    assert sorted(index for row in rows for index in row) == list(range(len(sizes)))
    filled = sorted(sum(sizes[index] for index in row) for row in rows)
    assert all(total <= 17 for total in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > 17  # no two rows fit into one


@pytest.mark.parametrize("packs", ["true", "false"])
def test_rows_hold_whole_conversations(chat, packs: str) -> None:
    rows = [turn(n, 1 + n % 5) for n in range(40)]
    overrides = ["experiment=sft", *chat(rows, "train.seq_len=96", f"data.pack={packs}", "model=tiny")]
    settings_ = config.load(overrides)
    corpus, loader = open_data(settings_)
    assert isinstance(loader, ChatLoader)
    count = loader.rows[0].num_windows
    found = loader.samples(0, count)
    documents, seen = corpus.documents("train"), []
    for row in range(count):
        at = 0
        while at < 97 and found.document[row, at] >= 0:
            size = int((found.document[row] == found.document[row, at]).sum()) + 1
            own = found.tokens[row, at : at + size]
            seen.append(own.tolist())
            assert found.document[row, at + size - 1] == -1  # predicted, and does not go in
            assert not found.target[row, at]  # type: ignore[index]
            at += size
        assert packs == "true" or at == size
        assert not found.target[row, at:].any()  # type: ignore[index]
    tokens = corpus.tokens("train")
    assert sorted(seen) == sorted(tokens[b : b + n].tolist() for b, n, _ in documents)
    assert found.num_targets == corpus.targets("train").sum()
    assert found.num_tokens == loader.count_tokens(count) == sum(n - 1 for _, n, _ in documents)
    assert (packs == "true") == (count < len(documents))
    again = ChatLoader(corpus, settings_)
    parts = [again.samples(a, b).tokens for a, b in ((0, 3), (3, 4), (4, count))]
    assert (np.concatenate(parts) == found.tokens).all()
    everything = ChatLoader(corpus, config.load([*overrides, "train.objective=lm"])).samples(0, count)
    assert everything.num_targets == everything.num_tokens == found.num_tokens
    held_out = held_out_windows(corpus, settings_, 0)
    assert held_out.num_targets == corpus.targets("held_out").sum()


def test_too_long_is_said(chat) -> None:
    rows = [*(turn(n, 2) for n in range(20)), *(turn(n, 30 + n) for n in range(6))]
    base = chat(rows, "train.seq_len=96", "model=tiny")
    documents = Corpus(prepare.ensure(config.load(base).data)).documents("train")
    num_long = int((documents[:, 1] > 97).sum())
    said = (
        rf"data.too_long=error: {num_long} conversations are longer .*chat.jsonl:2[1-6] with {documents[:, 1].max()};"
    )
    with pytest.raises(ConfigError, match=said):
        open_data(config.load(base))
    corpus = Corpus(prepare.ensure(config.load(base).data))
    longest = int(corpus.documents("held_out")[:, 1].max())
    assert longest > documents[:, 1].max()  # it would stop the run where it is evaluated
    with pytest.raises(ConfigError, match=rf"the longest .*chat.jsonl:26 with {longest};"):
        open_data(config.load([*base, f"train.seq_len={documents[:, 1].max()}"]))
    for what, said in (("cut", "longer than a row and cut"), ("skip", "longer than a row and left out")):
        _, loader = open_data(config.load([*base, f"data.too_long={what}"]))
        assert isinstance(loader, ChatLoader)
        assert any(said in line for line in loader.describe())
        assert loader.rows[0].num_documents == len(documents) - num_long * (what == "skip")


def test_a_damaged_mask_is_noticed(chat) -> None:
    folder = prepare.ensure(config.load(chat([turn(n) for n in range(8)])).data)
    assert problem(folder) is None
    (folder / "train.target.bin").write_bytes(b"\1")
    assert problem(folder) == "train.target.bin has not " + f"{len(Corpus(folder).tokens('train')):,} tokens"


def test_sources_come_by_weight(chat, tmp_path: Path) -> None:
    base = chat([turn(n) for n in range(30)], name="a.jsonl")
    chat([turn(n) for n in range(100, 140)], name="b.jsonl")
    places = [f"data.sources.{name}.path={tmp_path / f'{name}.jsonl'}" for name in "ab"]
    base = [item for item in base if not item.startswith("data.path")] + ["model=tiny", "train.seq_len=48"]
    mixed = [*base, *places, "data.sources.a.weight=3", "data.sources.b.weight=1", "data.sources.b.domain=beta"]
    corpus, loader = open_data(config.load(mixed))
    assert corpus.domains == ["a", "beta"]
    found = loader.samples(0, 1024).domain[:, 0]
    assert abs(int((found == 0).sum()) - 768) <= 1
    other, _ = open_data(config.load([*mixed, "data.sources.a.weight=1"]))
    assert other.folder == corpus.folder  # weights change the order alone
    with pytest.raises(ConfigError, match=r"data.sources.b.weight=null: must be given, as that of a is"):
        config.load([*base, *places, "data.sources.a.weight=3"])
    with pytest.raises(ConfigError, match=r"data.path=null: must be given for data=chat, or else data.sources"):
        config.load(base)
    with pytest.raises(ConfigError, match=r"data.path=.*: must be null where data.sources are given"):
        config.load([*base, *places, f"data.path={tmp_path / 'a.jsonl'}"])
    with pytest.raises(ConfigError, match=r"data.sources.a.path=none.jsonl: there is no such file or folder"):
        open_data(config.load([*base, "data.sources.a.path=none.jsonl"]))


def test_the_objective_needs_conversations_and_leaves_the_router_alone(chat) -> None:
    with pytest.raises(ConfigError, match=r"train.objective=sft: needs data=chat"):
        config.load(["train.objective=sft", "balance.coefficient=0"])
    with pytest.raises(
        ConfigError, match=r"train.objective=sft: would balance the router with .*=0.01; experiment=sft"
    ):
        config.load([*chat([turn(1), turn(2)]), "train.objective=sft"])
    found = config.load(["experiment=sft", *chat([turn(1), turn(2)])])
    assert (found.balance.coefficient, found.balance.z_coefficient, found.router.freeze) == (0, 0, True)


def test_the_loss_falls_on_every_layout(chat, pool, tmp_path: Path) -> None:
    """Evaluated before the first step and after the last, on the assistant's tokens alone; tokens are counted without
    padding; the curve is that of any layout, and a run that goes on counts on."""
    rows = [turn(n, 1 + n % 3) for n in range(60)]
    base = ["experiment=sft", "model=tiny", *chat(rows), "train.dtype=fp32", "train.seq_len=64", "train.steps=6"]
    base += ["train.global_batch=8", "track.wandb=false", f"run.dir={tmp_path / 'runs'}", "optim.lr=0.02"]
    base += ["generate.tokens=4", "eval.tokens_per_domain=512", "checkpoint.every=3"]
    one = rows_of(pool.run(run, 1, [*base, "run.name=one", "train.micro_batch=2"])[0])
    two = rows_of(
        pool.run(run, 2, [*base, "run.name=two", "train.micro_batch=2", "recovery.snapshot_every=0"], ep=2)[0]
    )
    evaluated = [row for row in one if "eval/loss" in row]
    assert [row["step"] for row in evaluated] == [0, 6]
    said = f"held-out loss {evaluated[0]['eval/loss']:.3f} → {evaluated[1]['eval/loss']:.3f} nats"
    assert said in (tmp_path / "runs" / "one" / "log.txt").read_text()
    assert evaluated[1]["eval/loss"] < 0.7 * evaluated[0]["eval/loss"]
    losses = [[row["train/lm_loss"] for row in found if "train/lm_loss" in row] for found in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    tokens = [row["train/tokens"] for row in one if "train/tokens" in row]
    _, loader = open_data(config.load(base))
    assert tokens == [loader.samples(0, 8 * step).num_tokens for step in range(1, 7)]
    assert tokens[-1] < 6 * 8 * 64
    assert "train/balance_loss" in one[1]
    more = [*base, "run.name=one", "train.micro_batch=2", "train.steps=7"]
    assert rows_of(pool.run(run, 1, more)[0])[-2]["train/tokens"] == loader.samples(0, 56).num_tokens
