"""The body of an HTTP answer, received into buffers of the reader's.

The HTTP library gives 64 KiB at a time, for 1.9 s of processor time a GB. So what follows the first piece of a long
body is received from the connection itself, for 0.5 s: when that piece is here nothing else is buffered, and a body
with a length has no other bytes in between. Such a connection is not used again.
"""

import ssl
import time
from collections.abc import Iterator
from typing import Any

_LONG_BYTES = 1 << 20
"""Of the rest of a body that is worth a connection."""
_SLOWEST_BYTES_PER_S = 1024
"""A connection that brings less for a whole time-out is taken for a stalled one."""


class BrokenOffError(Exception):
    """A body does not come as it should; says how, as the end of a sentence."""


class Body:
    """Bytes of a file from `start` to `end`, as a server sends them: for one thread, and once."""

    def __init__(self, response: Any, start: int, end: int, timeout_s: float) -> None:
        self.start = start
        self.end = end
        self._timeout_s = timeout_s
        length = response.headers.get("Content-Length", "")
        self._missing = end - start
        self._coming = min(self._missing, int(length)) if length.isdigit() else self._missing
        self._socket = _socket_of(response) if length.isdigit() else None
        self._is_direct = False
        self._buffered: Iterator[bytes] = response.iter_raw()  # letting go of it closes the connection
        self._rest = memoryview(b"")
        self._counted_from, self._counted_bytes = time.monotonic(), 0

    def read_into(self, buffer: memoryview) -> int:
        """Fill a buffer as far as bytes are here, and wait for the first; returns how many, 0 at the end.

        Raises:
            BrokenOffError: fewer came than were promised, or none in time, or hardly any.
        """
        n_bytes = self._receive(buffer[: self._coming]) if self._coming else 0
        self._coming -= n_bytes
        self._missing -= n_bytes
        if not n_bytes and self._missing:
            raise BrokenOffError(f"{self._missing:,} bytes were missing")
        self._require_more_than_a_drip(n_bytes)
        return n_bytes

    def pieces(self) -> Iterator[memoryview]:
        """All of it, in one buffer that each piece lies in until the next is asked for."""
        buffer = memoryview(bytearray(min(_LONG_BYTES, self._coming)))
        while n_bytes := self.read_into(buffer):
            yield buffer[:n_bytes]

    def _receive(self, buffer: memoryview) -> int:
        if self._is_direct and not self._rest:
            return self._from_socket(buffer)
        if not self._rest:
            self._rest = memoryview(next(self._buffered, b""))
            self._is_direct = self._socket is not None and self._coming - len(self._rest) > _LONG_BYTES
        n_bytes = min(len(buffer), len(self._rest))
        buffer[:n_bytes], self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return n_bytes

    def _from_socket(self, buffer: memoryview) -> int:
        assert self._socket is not None
        try:
            self._socket.settimeout(self._timeout_s)
            return int(self._socket.recv_into(buffer))
        except TimeoutError as error:
            raise BrokenOffError(f"nothing came for {self._timeout_s:g} seconds") from error
        except OSError as error:
            raise BrokenOffError(error.strerror or type(error).__name__) from error

    def _require_more_than_a_drip(self, n_bytes: int) -> None:
        self._counted_bytes += n_bytes
        passed_s = time.monotonic() - self._counted_from
        if passed_s < self._timeout_s:
            return
        if self._missing and self._counted_bytes < _SLOWEST_BYTES_PER_S * passed_s:
            raise BrokenOffError(f"only {self._counted_bytes:,} bytes came in {passed_s:.0f} seconds")
        self._counted_from, self._counted_bytes = time.monotonic(), 0


def _socket_of(response: Any) -> Any:
    """The socket that the body comes from as it is, if there is one: TLS within TLS has none of its own."""
    stream = response.extensions.get("network_stream")
    if stream is None or response.http_version != "HTTP/1.1":
        return None
    is_within = isinstance(stream.get_extra_info("ssl_object"), ssl.SSLObject)
    return None if is_within else stream.get_extra_info("socket")
