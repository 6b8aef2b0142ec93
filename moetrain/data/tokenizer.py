"""The tokenizer of a corpus: a byte-level BPE trained on it, or one of the user's own from a `tokenizer.json`."""

import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moetrain.config import ConfigError, Data

END_OF_TEXT = "<|endoftext|>"
PIECE = 96  # bytes: no token spans more, so that text without spaces (DNA, CJK) is not one word of millions of letters
LONG = re.compile(rf"[^\W\d_]{{{PIECE},}}|\d{{{PIECE},}}|[^\w\s]{{{PIECE},}}")  # what the pre-tokenizer leaves in one
MOST_LONG = 1_000_000  # characters of such text that a vocabulary is learnt from: each is a word of its own, and slow
MOST_LEARNED = 1_000_000_000  # characters that a vocabulary is learned from
SLICE = 1_000_000  # characters: a longer document is encoded in parts
BATCH = 256  # such parts, or documents, at a time, and at most
BATCH_CHARACTERS = 4_000_000
MOST_TOKENS = 1 << 20
PROBE = "Aa é ß 中文\n\tx = a + b;  42 naïve"  # composed, so that NFC leaves it alone


def train(options: Data, texts: Iterable[str], count: int, characters: int, progress: Progress) -> Tokenizer:
    """A byte-level BPE of `options.vocab_size` tokens learned from `count` texts of so many characters together: from
    all of them, or from every n-th so that they are about MOST_LEARNED."""
    step = max(1, -(-characters // MOST_LEARNED))
    size = characters / step / 1e6
    task = progress.add_task(f"reading {size:.1f} million characters for a tokenizer", total=count // step)

    def fed() -> Iterator[str]:
        room = MOST_LONG
        for text in itertools.islice(texts, 0, None, step):
            for piece in slices(text):
                long = sum(len(run[0]) for run in LONG.finditer(piece))
                yield piece if long <= room else LONG.sub(" ", piece)
                room -= min(long, room)
            progress.update(task, advance=1)
        progress.update(task, total=None, description=f"learning {options.vocab_size:,} tokens")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.FixedLength(PIECE)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(fed(), trainer)
    progress.remove_task(task)
    return tokenizer


def read(path: str) -> Tokenizer:
    """The user's own. Raises `ConfigError` where it is damaged, or loses or changes text."""

    def refuse(rule: str) -> ConfigError:
        return ConfigError(f"data.tokenizer={path}: {rule}")

    try:
        found = Tokenizer.from_file(path)
        found.no_truncation()  # a file may carry both from where it was used last
        found.no_padding()
        vocabulary = found.get_vocab()
        ids = found.encode(PROBE, add_special_tokens=False).ids
        back = found.decode(ids)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and PanicException, which is none
        raise refuse(f"must be a tokenizer.json ({' '.join(str(error).split())[:200]})") from None
    if not set(pre_tokenizers.ByteLevel.alphabet()) <= vocabulary.keys():
        raise refuse("must be byte-level, so that bytes can be counted")
    if back != PROBE:
        raise refuse(f"must give text back as it was; {PROBE[:12]!r}... becomes {back[:12]!r}...")
    if max(vocabulary.values()) >= MOST_TOKENS:
        raise refuse(f"its tokens must be numbered below {MOST_TOKENS:,}, and one is {max(vocabulary.values()):,}")
    end_of_text(found)
    return found


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token: there may be gaps between them."""
    return max(tokenizer.get_vocab().values()) + 1


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token between documents, by the names that are in use for it. Raises `ConfigError`."""
    for name in (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"):
        if (token := tokenizer.token_to_id(name)) is not None:
            return token
    raise ConfigError(f"data.tokenizer: must have an end-of-text token, such as {END_OF_TEXT}")


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[NDArray[np.uint32]]:
    """Tokens of each text, without special ones of the tokenizer's own; worked on in bounded parts."""
    done: list[NDArray[np.uint32]] = []
    ends = ((part, last) for text in texts for part, last in _with_last(slices(text)))
    while batch := _take_batch(ends):
        found = tokenizer.encode_batch_fast([part for part, _ in batch], add_special_tokens=False)
        for encoding, (_, last) in zip(found, batch, strict=True):
            done.append(np.array(encoding.ids, np.uint32))
            if last:
                yield np.concatenate(done)
                done = []


def _take_batch(parts: Iterator[tuple[str, bool]]) -> list[tuple[str, bool]]:
    batch: list[tuple[str, bool]] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part[0])
        if len(batch) == BATCH or size >= BATCH_CHARACTERS:
            break
    return batch


def _with_last(parts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    before = next(parts)
    for part in parts:
        yield before, False
        before = part
    yield before, True


def slices(text: str) -> Iterator[str]:
    """The text in parts of at most `SLICE` characters, cut behind a line or a space where there is one."""
    begin = 0
    while len(text) - begin > SLICE:
        end = begin + SLICE
        at = max(text.rfind("\n", begin + SLICE // 2, end), text.rfind(" ", begin + SLICE // 2, end)) + 1
        yield text[begin : at or end]
        begin = at or end
    yield text[begin:]
