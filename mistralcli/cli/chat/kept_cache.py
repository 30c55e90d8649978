"""The KV cache of a session, on disk between two chats, where reading it back is faster than computing it again."""

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mistralcli.cli.chat.sessions import cache_path
from mistralcli.cli.chat.state import Chat
from mistralcli.errors import MistralError

if TYPE_CHECKING:
    from mistralcli.engine import Engine
    from mistralcli.session import Session

MIN_TOKENS = 32
"""From there on reading back was faster at every length that was measured, 4 times and more (`docs/log.md`)."""

MAX_BYTES = 2**30
"""What the kept caches of all sessions may take; the oldest are removed."""

_ABANDONED_S = 3600.0


def keep_cache(chat: Chat) -> None:
    """Keep what the engine has computed beside the session's file. Where that cannot be, nothing is lost but time.

    In a session that was only looked at the engine holds what another one computed.
    """
    if chat.store.path is None or chat.store.is_untouched or not chat.model.ready():
        return
    from mistralcli.saved_cache import save_cache

    with suppress(MistralError, OSError):
        session = chat.session
        size_bytes = kept_bytes(session.engine)
        if not _is_worth_it(session.engine, len(session.engine.token_ids)) or size_bytes > MAX_BYTES:
            return
        make_room(chat.store.directory, size_bytes)
        if shutil.disk_usage(chat.store.directory).free > 2 * size_bytes:
            save_cache(cache_path(chat.store.path), session.engine, _digest(session))


def restore_cache(session: "Session", token_ids: list[int], path: Path) -> None:
    """Fill the cache from `path` when that has more of a prompt than the cache has, and enough to be worth it."""
    from mistralcli.saved_cache import load_cache, saved_ids

    with suppress(MistralError, OSError):
        engine, digest = session.engine, _digest(session)
        kept = saved_ids(path, digest)
        n_common = next(
            (i for i, (a, b) in enumerate(zip(kept, token_ids, strict=False)) if a != b), len(kept)
        )
        if _is_worth_it(engine, n_common - engine.n_reusable(token_ids)):
            load_cache(path, engine, digest, kept)


def _is_worth_it(engine: "Engine", n_tokens: int) -> bool:
    """On a GPU it is not: 40,000 tokens/s of pre-fill make 5 GB/s of a 7B's keys and values, and no disk gives that."""
    return engine.device.type == "cpu" and n_tokens >= MIN_TOKENS


def _digest(session: "Session") -> str:
    from mistralcli.saved_cache import model_digest

    return f"{model_digest(session.directory)} {session.computing}"


def kept_bytes(engine: "Engine") -> int:
    """What a saved cache takes."""
    n_positions = len(engine.token_ids)
    return sum(
        tensor[:1, :, : min(n_positions, layer.ring.capacity)].nbytes
        for layer in engine.cache.layers
        for tensor in layer.buffers().values()
    )


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
