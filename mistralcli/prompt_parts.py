"""Which part of a prompt each of its token ids is from: a message, the tools, or the chat format itself.

Formats do not say it, and a template can put a message anywhere. So it is seen from outside: ids that change with a
message are the message's, ids that only come with tools are the tools', and the rest is the format's.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mistralcli.conversation import ChatExtras, Conversation, Message, Role
from mistralcli.tokenizer import Tokenizer

Part = Role | Literal["tools", "template"]

_OTHERS = "a1z"
"""Texts to put in a message's place: of three, one begins and ends otherwise than the message."""


def prompt_parts(tokenizer: Tokenizer, conversation: Conversation, extras: ChatExtras) -> list[Part]:
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
        changed = Conversation((*messages[:index], _changed(message), *messages[index + 1 :]))
        _mark(parts, message.role, token_ids, tokenizer.encode_chat(changed, extras))
    return parts


def _changed(message: Message) -> Message:
    text = message.content.strip()
    return replace(message, content=next(one for one in _OTHERS if one not in (text[:1], text[-1:])))


def _mark(parts: list[Part], part: Part, token_ids: Sequence[int], others: Sequence[int]) -> None:
    """Call `part` what is in `token_ids` between where they begin and where they cease to differ from `others`."""
    n_shorter = min(len(token_ids), len(others))
    start = next((i for i in range(n_shorter) if token_ids[i] != others[i]), n_shorter)
    most = n_shorter - start
    n_after = next((i for i in range(most) if token_ids[-1 - i] != others[-1 - i]), most)
    end = len(token_ids) - n_after
    parts[start:end] = [part] * (end - start)
