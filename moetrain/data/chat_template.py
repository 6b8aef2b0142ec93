"""Conversations as tokens: the chat template of a tokenizer, and which of the tokens are the assistant's."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from moetrain.common import disk
from moetrain.config import ConfigError, Data
from moetrain.data import tokenizer
from moetrain.data.chat_rows import Conversation
from moetrain.data.files import BadText

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")  # that templates write
TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")  # beside a tokenizer.json
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
DEFAULT_TEMPLATE = """\
{%- for message in messages %}
    {{- ('' if loop.first else '\\n') + '<|' + message['role'] + '|>\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\\n<|assistant|>\\n' }}{%- endif %}
"""
DEFAULT_SAID = (
    "the tokenizer has no chat template: a plain one is used, with <|user|> or <|assistant|> before each turn"
)


class EncodedConversation(NamedTuple):
    """A conversation as the model sees it."""

    text: str
    tokens: NDArray[np.uint32]  # [n]
    target: NDArray[np.bool_]  # [n]: whether the token is to be predicted; never the first


class ChatTemplate:
    """A tokenizer and its chat template. `where`: the field and file the template is from, for messages."""

    def __init__(self, chosen: Tokenizer, template: str | None, where: str, special: dict[str, str]) -> None:
        """`template`: None for the plain default. `special`: text of the tokens that templates write."""
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError:
            raise ConfigError("data=chat: needs transformers: pip install 'moetrain[hf]'") from None
        self.text, self.where, self._chosen = template or DEFAULT_TEMPLATE, where, chosen
        self.notes = [] if template else [DEFAULT_SAID]
        self.is_marked = MARKED.search(self.text) is not None
        self.end = str(special.get("eos_token") or chosen.id_to_token(tokenizer.end_of_text(chosen)))
        if (end := chosen.token_to_id(self.end)) is None:
            raise ConfigError(f"data.tokenizer: has no token {self.end}, which its configuration ends texts by")
        self.end_token: int = end
        known = {name: token for name, token in special.items() if chosen.token_to_id(token) is not None}
        self._writer = PreTrainedTokenizerFast(tokenizer_object=chosen, **{**known, "eos_token": self.end})
        if self._writer.get_vocab() != chosen.get_vocab():
            raise ConfigError(f"data.tokenizer: transformers changes its vocabulary when it is told {known}")

    @classmethod
    def open(cls, options: Data, chosen: Tokenizer) -> "ChatTemplate":
        """`data.chat_template`, or that of the files beside `data.tokenizer`. Raises `ConfigError`."""
        own = getattr(options, "chat_template", None)
        folder = Path(options.tokenizer).parent if options.tokenizer is not None else None
        settings = read_tokenizer_config(folder) if folder is not None else {}
        special = {name: text for name in SPECIAL if (text := _token_text(settings.get(name)))}
        template, where = _template_of(settings), f"the chat template of data.tokenizer={options.tokenizer}"
        if folder is not None and (beside := folder / "chat_template.jinja").is_file():
            template, where = _read_template(beside, "data.tokenizer"), f"the chat template {beside}"
        if own is not None:
            template, where = _read_template(Path(own), "data.chat_template"), f"data.chat_template={own}"
        return cls(chosen, template, where, special)

    def encode(self, conversation: Conversation) -> EncodedConversation:
        """Raises `BadText` where the template refuses the conversation, `ConfigError` where nothing marks the turns."""
        if not conversation.messages:
            return self._encode_text(conversation)
        if self.is_marked:
            return self._encode_marked(conversation)
        text = self._render(conversation, len(conversation.messages))
        encoding = self._chosen.encode(text, add_special_tokens=False)
        begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        target = np.zeros(len(begins), bool)
        for number in range(conversation.first, len(conversation.messages)):
            if conversation.messages[number]["role"] == "assistant":
                before = self._prefix(conversation, number, text, True)
                target |= (ends > before) & (begins < self._prefix(conversation, number + 1, text, False))
        return _encoded(text, encoding.ids, target)

    def _encode_text(self, conversation: Conversation) -> EncodedConversation:
        """Text as it is, and the end of text behind it; no token spans the border of prompt and completion."""
        parts = conversation.text[: conversation.prompt], conversation.text[conversation.prompt :]
        asked, said = (self._chosen.encode(part, add_special_tokens=False).ids for part in parts)
        target = [*(False for _ in asked), *(True for _ in said), True]
        return _encoded(conversation.text, [*asked, *said, self.end_token], target)

    def _encode_marked(self, conversation: Conversation) -> EncodedConversation:
        """By the template's own marks of what the assistant says."""
        found = self._apply(conversation, len(conversation.messages), tokenize=True)
        target = np.array(found["assistant_masks"], bool)
        if conversation.first:  # the prompt's turns are not to be learned
            before = self._apply(conversation, conversation.first, tokenize=True)["input_ids"]
            if list(found["input_ids"][: len(before)]) != list(before):
                raise self._not_nested(conversation, conversation.first)
            target[: len(before)] = False
        return _encoded(self._render(conversation, len(conversation.messages)), found["input_ids"], target)

    def _prefix(self, conversation: Conversation, number: int, text: str, is_asked: bool) -> int:
        """Characters of `text` that the first `number` messages take, with the head of an answer if `is_asked`."""
        before = self._render(conversation, number, add_generation_prompt=is_asked)
        if not text.startswith(before):
            raise self._not_nested(conversation, number)
        return len(before)

    def _not_nested(self, conversation: Conversation, number: int) -> ConfigError:
        said = f"the first {number} of {len(conversation.messages)} messages of {conversation.where}"
        rule = "are not written as the whole conversation begins; mark what the assistant says by {% generation %}"
        return ConfigError(f"{self.where}: {said} {rule}")

    def _render(self, conversation: Conversation, number: int, **options: Any) -> str:
        text: str = self._apply(conversation, number, tokenize=False, **options)
        return text

    def _apply(self, conversation: Conversation, number: int, **options: Any) -> Any:
        """The template over the first `number` messages."""
        from jinja2 import TemplateError, TemplateSyntaxError

        if options["tokenize"]:
            options |= {"return_dict": True, "return_assistant_tokens_mask": True}
        messages = [dict(message) for message in conversation.messages[:number]]
        try:
            return self._writer.apply_chat_template(
                messages, tools=conversation.tools, chat_template=self.text, **options
            )
        except TemplateSyntaxError as error:
            raise ConfigError(f"{self.where}: must be a Jinja template; line {error.lineno}: {error.message}") from None
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            said = " ".join(str(error).split())[:200]
            raise BadText(conversation.where, f"the chat template cannot write it ({said})") from None


def write_prompt(folder: Path, chosen: Tokenizer, message: str) -> list[int]:
    """Returns the tokens of a user's message in the chat template of a prepared corpus, ready to be answered."""
    path = folder / "chat_template.jinja"
    end = chosen.id_to_token(json.loads((folder / "manifest.json").read_text())["end_of_text"])
    template = ChatTemplate(chosen, path.read_text(encoding="utf-8"), str(path), {"eos_token": str(end)})
    asked = Conversation("generate.prompt", None, ({"role": "user", "content": message},))
    try:
        text = template._render(asked, 1, add_generation_prompt=True)
    except BadText as error:
        raise ConfigError(f"generate.prompt: {error.rule}") from None
    return chosen.encode(text, add_special_tokens=False).ids


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` of a folder; empty where there is none."""
    found = disk.read_json(folder / "tokenizer_config.json")
    return found if isinstance(found, dict) else {}


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _template_of(settings: dict[str, Any]) -> str | None:
    """The chat template in a tokenizer's settings: text, or a list of templates of which `default` is meant."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _read_template(path: Path, field: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field}={path}: must be a file with a Jinja template ({error})") from None
    if path.suffix == ".json":
        try:
            text = json.loads(text)["chat_template"]
        except (ValueError, TypeError, KeyError):
            raise ConfigError(f'{field}={path}: must have a "chat_template"') from None
    return text


def _encoded(text: str, tokens: Sequence[int], target: Any) -> EncodedConversation:
    mask = np.array(target, bool)
    mask[:1] = False  # nothing is before it to predict it from
    return EncodedConversation(text, np.array(tokens, np.uint32), mask)
