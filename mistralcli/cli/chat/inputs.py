"""What is typed: a command, or a message with or without quotes."""

QUOTES = '"""'


def message_in(text: str) -> str | None:
    '''The message in an input: as it is, or with one slash for `//`, or between `"""`; None for a command.'''
    start = text.lstrip()
    if start.startswith(QUOTES):
        return start.rstrip().removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    if start.startswith("//"):
        return start[1:]
    return None if start.startswith("/") else text.strip("\n")


def as_input(message: str) -> str:
    """What is typed for that message: `message_in` gives it back, but for line ends around it."""
    start = message.lstrip()
    if start.startswith(QUOTES) or (start.startswith("/") and start != message):
        return f"{QUOTES}\n{message}\n{QUOTES}"
    return f"/{message}" if start.startswith("/") else message


def is_open(text: str) -> bool:
    '''Whether an input goes on after Enter: it began with `"""` and has not ended with another.'''
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 2 * len(QUOTES) and text.endswith(QUOTES))
