"""One row of the files of `data=chat`: a conversation, or a pair of answers of which one is preferred."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moetrain.data.files import BadText

FORMS = '"messages", "prompt" and "completion", "chosen" and "rejected", or "text"'


@dataclass(frozen=True)
class Conversation:
    """One row: messages for the chat template, or text as it is."""

    where: str  # file:line, or file:row
    domain: str | None
    messages: tuple[dict[str, Any], ...] = ()
    first: int = 0  # message from which on the assistant's are to be learned: those before belong to the prompt
    tools: list[Any] | None = None
    text: str = ""  # where there are no messages
    prompt: int = 0  # characters of `text` that are not to be learned

    @property
    def learned_text(self) -> str:
        """What a tokenizer is trained on."""
        return "\n".join([self.text, *(message["content"] for message in self.messages)])


@dataclass(frozen=True)
class PreferencePair:
    """Two conversations that begin with the same prompt: their `first` or `prompt` says how far it goes."""

    chosen: Conversation
    rejected: Conversation

    @property
    def where(self) -> str:
        return self.chosen.where

    @property
    def domain(self) -> str | None:
        return self.chosen.domain

    @property
    def learned_text(self) -> str:
        """What a tokenizer is trained on."""
        return f"{self.chosen.learned_text}\n{self.rejected.learned_text}"

    @property
    def prompt_text(self) -> str:
        """What tells one prompt from another."""
        return self.chosen.text[: self.chosen.prompt] or repr(self.chosen.messages[: self.chosen.first])


def parse_row(where: str, row: Any, domain: str | None) -> Conversation | PreferencePair:
    """Returns what a row holds; `domain`: of rows that name none. Raises `BadText` where it is none of `FORMS`."""
    if not isinstance(row, Mapping):
        raise BadText(where, f"must be an object with {FORMS}")
    row = {name: value for name, value in row.items() if value is not None}
    label = row.get("domain", domain)
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise BadText(where, '"domain" must be a string')
    label = None if label in (None, "") else str(label)
    if "chosen" in row or "rejected" in row:
        return _parse_pair(where, row, label)
    if "messages" in row:
        messages = _parse_messages(where, "messages", row["messages"])
        return _check_assistant(Conversation(where, label, messages, tools=_parse_tools(where, row)))
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            if not completion:
                raise BadText(where, '"completion" must not be empty')
            return Conversation(where, label, text=_check_text(where, prompt + completion), prompt=len(prompt))
        before = _parse_messages(where, "prompt", prompt)
        after = _parse_messages(where, "completion", completion)
        tools = _parse_tools(where, row)
        return _check_assistant(Conversation(where, label, before + after, first=len(before), tools=tools))
    if "text" in row:
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise BadText(where, '"text" must be text')
        return Conversation(where, label, text=_check_text(where, row["text"]))
    raise BadText(where, f"must have {FORMS}")


def _parse_pair(where: str, row: Mapping[str, Any], label: str | None) -> PreferencePair:
    """Of strings or of messages; the prompt by itself, or at the beginning of both as in TRL's implicit form."""
    for name in ("chosen", "rejected"):
        if name not in row:
            raise BadText(where, f'must have "{name}" too: a pair is "chosen" and "rejected"')
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str | None):
        pair = _make_text_pair(where, label, prompt, chosen, rejected)
    else:
        pair = _make_message_pair(where, label, row)
    if pair.chosen == pair.rejected:
        raise BadText(where, '"chosen" and "rejected" must differ')
    return pair


def _make_text_pair(where: str, label: str | None, prompt: str | None, chosen: str, rejected: str) -> PreferencePair:
    if prompt is None:
        shared = _count_shared(chosen, rejected)
        shared -= chosen[:shared].endswith(" ")  # a space belongs to the word behind it
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise BadText(where, '"chosen" and "rejected" must begin with the same prompt, or have a "prompt" beside them')
    if not chosen or not rejected:
        raise BadText(where, '"chosen" and "rejected" must not be empty')
    texts = (_check_text(where, prompt + answer) for answer in (chosen, rejected))
    return PreferencePair(*(Conversation(where, label, text=text, prompt=len(prompt)) for text in texts))


def _count_shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    shortest = min(len(one), len(other))
    return next((n for n in range(shortest) if one[n] != other[n]), shortest)


def _make_message_pair(where: str, label: str | None, row: Mapping[str, Any]) -> PreferencePair:
    chosen, rejected = (_parse_messages(where, name, row[name]) for name in ("chosen", "rejected"))
    before: tuple[dict[str, Any], ...] = ()
    if isinstance(prompt := row.get("prompt"), str | None):
        first = _count_shared(chosen, rejected)
        if prompt is not None and not any(message["content"] == prompt for message in chosen[:first]):
            raise BadText(where, '"prompt" must be messages, or one of those that "chosen" and "rejected" begin with')
        if not first:
            raise BadText(where, '"chosen" and "rejected" must begin with the same messages, or have a "prompt"')
    else:
        before = _parse_messages(where, "prompt", prompt)
        first = len(before)
    tools = _parse_tools(where, row)
    answers = (Conversation(where, label, before + own, first=first, tools=tools) for own in (chosen, rejected))
    return PreferencePair(*map(_check_assistant, answers))


def _parse_messages(where: str, field: str, value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise BadText(where, f'"{field}" must be a list of messages, and beside one that is so')
    out = []
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadText(where, f'{place} must be an object with "role" and "content"')
        own = {name: part for name, part in message.items() if part is not None}
        if own.pop("weight", 1) != 1:
            raise BadText(where, f"{place}.weight must be 1: single messages cannot be left out of the loss")
        own["content"] = _check_text(where, _join_parts(where, place, own))
        out.append(own)
    return tuple(out)


def _join_parts(where: str, place: str, message: Mapping[str, Any]) -> str:
    """The text of a message, which may be a list of parts of text, or missing beside calls of tools."""
    content: Any = message.get("content", "" if "tool_calls" in message else None)
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        content = "".join(parts) if len(parts) == len(content) else None
    if not isinstance(content, str):
        raise BadText(where, f"{place}.content must be text, or a list of parts that are text")
    return content


def _parse_tools(where: str, row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # tables cannot hold schemas of many shapes, and have them as JSON
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadText(where, '"tools" must be a list, or JSON of one') from None
    if tools is not None and not isinstance(tools, list):
        raise BadText(where, '"tools" must be a list, or JSON of one')
    return tools or None


def _check_assistant(conversation: Conversation) -> Conversation:
    if not any(message["role"] == "assistant" for message in conversation.messages[conversation.first :]):
        raise BadText(conversation.where, "must have a message of the assistant to learn from")
    return conversation


def _check_text(where: str, text: str) -> str:
    if half := re.search("[\ud800-\udfff]", text):
        raise BadText(where, f"must be Unicode, not half a surrogate pair (here \\u{ord(half[0]):04x})")
    return text
