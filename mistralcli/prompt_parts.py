"""Which part of a prompt each of its token ids is from: a message, the tools, or the chat format itself.

Formats do not say it, and a template can put a message anywhere. So it is seen from outside: ids that change with a
message are the message's, ids that only come with tools are the tools', and the rest is the format's.
"""

from collections.abc import Callable, Iterable, Sequence
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

    A token across a border counts to the message. Costs as many encodings as there are messages, short ones if each
    message's ids do not depend on the others.
    """

    def encode(messages: Iterable[Message]) -> list[int]:
        return tokenizer.encode_chat(Conversation.of(messages), extras)

    messages = conversation.messages
    token_ids = encode(messages)
    parts: list[Part] = ["template"] * len(token_ids)
    if extras.tools:
        start, end = _differing(token_ids, tokenizer.encode_chat(conversation, replace(extras, tools=())))
        parts[start:end] = ["tools"] * (end - start)
    spans = _spans_among_short_ones(encode, messages, token_ids) or [
        _differing(token_ids, encode((*messages[:i], changed(message), *messages[i + 1 :])))
        for i, message in enumerate(messages)
    ]
    for message, (start, end) in zip(messages, spans, strict=True):
        parts[start:end] = [message.role] * (end - start)
    return parts


def _spans_among_short_ones(
    encode: Callable[[Iterable[Message]], list[int]], messages: Sequence[Message], token_ids: Sequence[int]
) -> list[tuple[int, int]] | None:
    """Where each message is in `token_ids`: seen in prompts in which all others are short.

    None where these do not make up `token_ids`, as with a template that writes a message twice.
    """
    short_ones = [changed(message) for message in messages]
    short = encode(short_ones)
    put_in = []
    for i, message in enumerate(messages):
        prompt = encode((*short_ones[:i], message, *short_ones[i + 1 :]))
        start, end = _differing(prompt, short)
        put_in.append((start, len(short) - (len(prompt) - end), prompt[start:end], i))
    together: list[int] = []
    spans = [(0, 0)] * len(messages)
    at = 0
    for start, end, ids, i in sorted(put_in):
        together += short[at:start]
        spans[i] = len(together), len(together) + len(ids)
        together += ids
        at = end
    return spans if together + short[at:] == token_ids else None


def changed(message: Message) -> Message:
    """The message with another text, which begins and ends otherwise."""
    text = message.content.strip()
    return replace(message, content=next(one for one in _OTHERS if one not in (text[:1], text[-1:])))


def _differing(token_ids: Sequence[int], others: Sequence[int]) -> tuple[int, int]:
    """From where to where `token_ids` differ from `others`."""
    start = common_length(token_ids, others)
    return start, len(token_ids) - common_length(token_ids[start:][::-1], others[start:][::-1])
