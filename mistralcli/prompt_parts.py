"""Which part of a prompt each of its token ids is from: a message, the tools, or the chat format itself.

Formats do not say it, and a template can put a message anywhere. So it is seen from outside: ids that change with a
message are the message's, ids that only come with tools are the tools', and the rest is the format's.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from mistralcli.conversation import ChatExtras, Conversation, Message, Role
from mistralcli.sequences import common_length

if TYPE_CHECKING:
    from mistralcli.tokenizer import Tokenizer

Part = Role | Literal["tools", "template"]

_OTHERS = "a1z"
"""Texts to put in a message's place: of three, one begins and ends otherwise than the message."""


def prompt_parts(tokenizer: "Tokenizer", conversation: Conversation, extras: ChatExtras) -> list[Part]:
    """The part that each id of `tokenizer.encode_chat(conversation, extras)` is from.

    A token across a border counts to the message. Costs as many encodings as there are messages.
    """
    token_ids = tokenizer.encode_chat(conversation, extras)
    parts: list[Part] = ["template"] * len(token_ids)
    if extras.tools:
        without = tokenizer.encode_chat(conversation, replace(extras, tools=()))
        _mark(parts, "tools", token_ids, without)
    messages = conversation.messages
    for index, message in enumerate(messages):
        other = Conversation((*messages[:index], changed(message), *messages[index + 1 :]))
        _mark(parts, message.role, token_ids, tokenizer.encode_chat(other, extras))
    return parts


def changed(message: Message) -> Message:
    """The message with another text, which begins and ends otherwise."""
    text = message.content.strip()
    return replace(message, content=next(one for one in _OTHERS if one not in (text[:1], text[-1:])))


def _mark(parts: list[Part], part: Part, token_ids: Sequence[int], others: Sequence[int]) -> None:
    """Call `part` what is in `token_ids` between where they begin and where they cease to differ from `others`."""
    start = common_length(token_ids, others)
    end = len(token_ids) - common_length(token_ids[start:][::-1], others[start:][::-1])
    parts[start:end] = [part] * (end - start)
