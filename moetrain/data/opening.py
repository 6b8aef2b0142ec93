"""What a run reads: its corpus, opened, and the training sequences of whatever kind it is."""

from moetrain import runs
from moetrain.checkpoint.resume import continues_own
from moetrain.config import Config, ConfigError
from moetrain.data import prepare
from moetrain.data.conversations import ChatLoader
from moetrain.data.loader import Corpus, DomainBlocks, Loader, MixtureLoader, Samples
from moetrain.data.replay import ReplayLoader


def samples_of(corpus: Corpus, config: Config) -> Samples:
    """What a run trains on. Raises `ConfigError` where the corpus is too small for it."""
    seq_len, seed, block = config.train.seq_len, config.train.seed, config.data.domain_block
    if corpus.is_chat:
        return ChatLoader(corpus, config)
    if corpus.is_mixture:
        return MixtureLoader(corpus, config)
    return Loader(corpus, seq_len, seed) if block is None else DomainBlocks(corpus, seq_len, seed, block)


def open_data(config: Config, replays: bool = False) -> tuple[Corpus, Samples]:
    """The corpus and what to train on: that of the run where it goes on, else prepared now if it is not yet.

    `replays`: whether sequences come with the choices of `router.replay`, where it is set.

    Raises `ConfigError`; needs no process group.
    """
    folder = runs.folder_of(config) if config.run.name else None
    trained_on = runs.corpus_of(folder) if folder is not None and continues_own(config, folder) else None
    corpus = Corpus(prepare.ensure(config.data, trained_on))
    corpus.hold()
    if (size := config.model.vocab_size or corpus.vocab_size) < corpus.vocab_size:
        raise ConfigError(f"model.vocab_size={size}: must be at least the tokenizer's {corpus.vocab_size}")
    samples = samples_of(corpus, config)
    is_replayed = replays and config.router.replay is not None
    return corpus, ReplayLoader(samples, corpus, config) if is_replayed else samples
