"""A small file of text that is there whole or not at all, whenever the process or the machine ends."""

from pathlib import Path

from quant import whole_file


def write_whole(path: Path, content: str) -> None:
    """Put `content` in the place of `path`, readable by its owner alone. Raises OSError, and leaves nothing behind."""
    whole_file.write_whole(path, content.encode("utf-8"))
