"""From text to tokens, as lm-eval does it: where a continuation begins, and what is left out on the left."""

from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import Tokenizer


class EvalRequest(NamedTuple):
    """Tokens for the model, of which those from `begin` on are scored."""

    tokens: list[int]  # at least one more than the model reads: the last is a target alone
    begin: int
    is_cut: bool  # on the left: it was longer than the model's sequences


class Encoder:
    """Encodes texts for a model that reads `most` tokens at a time.

    What the tokenizer puts before a text, such as a token for its begin, goes before each request; a request without
    a context begins with the token `end_of_text` where the tokenizer puts nothing.
    """

    def __init__(self, tokenizer: Tokenizer, end_of_text: int, most: int) -> None:
        self.tokenizer, self.end_of_text, self.most = tokenizer, end_of_text, most
        plain, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
        self._prefix = whole[: max(0, len(whole) - len(plain))] if whole[-len(plain) :] == plain else whole[:1]
        if not set(self._prefix) <= {token for token, entry in tokenizer.get_added_tokens_decoder().items()}:
            self._prefix = []

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[EvalRequest]:
        """Encode contexts with their continuations: the tokens of both together, of which the continuation's are those
        that the context alone has not. White space at the end of a context belongs to the continuation.
        """
        moved = [len(context) - len(context.rstrip()) for context, _ in pairs]
        contexts = [context[: len(context) - spaces] for (context, _), spaces in zip(pairs, moved, strict=True)]
        wholes = self._encode([context + continuation for context, continuation in pairs])
        out = []
        for context, whole in zip(self._encode(contexts), wholes, strict=True):
            before = [*self._prefix, *context] or [self.end_of_text]
            tokens = [*before, *whole[len(context) :]]
            cut = max(0, len(tokens) - self.most - 1)
            out.append(EvalRequest(tokens[cut:], max(1, len(before) - cut), cut > 0))
        return out

    def encode_prompts(self, contexts: Sequence[str], room: int) -> list[EvalRequest]:
        """Encode contexts that the model continues by up to `room` tokens; half of its sequence is theirs anyhow."""
        most = max(self.most - room, self.most // 2, 1)
        out = []
        for context in self._encode(contexts):
            tokens = [*self._prefix, *context] or [self.end_of_text]
            out.append(EvalRequest(tokens[-most:], min(len(tokens), most), len(tokens) > most))
        return out

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
