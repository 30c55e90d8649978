"""The KV cache of a session, on disk between two chats, where reading it back is faster than computing it again."""

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mistralcli.cli.chat.sessions import cache_path
from mistralcli.cli.chat.state import Chat
from mistralcli.errors import MistralError
from mistralcli.sequences import common_length

if TYPE_CHECKING:
    from mistralcli.engine import Engine
    from mistralcli.session import Session

MIN_TOKENS = 32
"""From there on reading back was faster at every length that was measured, 4 times and more (`docs/log.md`)."""

MAX_BYTES = 2**30
"""What the kept caches of all sessions may take; the oldest are removed."""

QUICK_BYTES = 2**28
"""What a process that was told to end still keeps: 0.3 s at the 0.8 GB/s that were measured."""

_ABANDONED_S = 3600.0


def keep_cache(chat: Chat, most_bytes: int | None = None) -> None:
    """Keep what the engine has computed beside the session's file, up to so many bytes (without it, `MAX_BYTES`). Where
    that cannot be, nothing is lost but time.

    In a session that was only looked at the engine holds what another one computed.
    """
    if chat.store.path is None or chat.store.is_untouched or not chat.model.ready():
        return
    from mistralcli.saved_cache import digest_of, save_cache, saved_bytes

    most_bytes = MAX_BYTES if most_bytes is None else most_bytes
    with suppress(MistralError, OSError):
        session = chat.session
        size_bytes = saved_bytes(session.engine)
        if not _is_worth_it(session.engine, len(session.engine.token_ids)) or size_bytes > most_bytes:
            return
        make_room(chat.store.directory, size_bytes)
        if shutil.disk_usage(chat.store.directory).free > 2 * size_bytes:
            save_cache(cache_path(chat.store.path), session.engine, digest_of(session))


def restore_cache(session: "Session", token_ids: list[int], path: Path) -> None:
    """Fill the cache from `path` when that has more of a prompt than the cache has, and enough to be worth it."""
    from mistralcli.saved_cache import digest_of, load_cache, saved_ids

    with suppress(MistralError, OSError):
        engine, digest = session.engine, digest_of(session)
        kept = saved_ids(path, digest)
        if _is_worth_it(engine, common_length(kept, token_ids) - engine.n_reusable(token_ids)):
            load_cache(path, engine, digest, kept)


def _is_worth_it(engine: "Engine", n_tokens: int) -> bool:
    """On a GPU it is not: 40,000 tokens/s of pre-fill make 5 GB/s of a 7B's keys and values, and no disk gives that."""
    return engine.device.type == "cpu" and n_tokens >= MIN_TOKENS


def make_room(directory: Path, size_bytes: int) -> None:
    """Remove the oldest kept caches until so many bytes more are within the limit, and what a kill left of others."""
    for partial in directory.glob(".*.kv.*.partial"):
        if time.time() - partial.stat().st_mtime > _ABANDONED_S:
            partial.unlink(missing_ok=True)
    caches = sorted(directory.glob("*.kv"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in caches:
        size_bytes += path.stat().st_size
        if size_bytes > MAX_BYTES:
            path.unlink(missing_ok=True)
