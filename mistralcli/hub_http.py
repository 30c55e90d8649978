"""Ranges of one file on the Hub over HTTP: where it is redirected to, what came instead of it, and whom it may be told.

The client is huggingface_hub's, which has the settings of its user: proxies, certificates, hooks. Redirects are
followed by hand, for the token goes to no other host than the Hub's.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar
from urllib.parse import urljoin, urlsplit

from huggingface_hub import hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its table of lazy names is not read by mypy
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from mistralcli import __version__
from mistralcli.errors import IntegrityError, MistralError, NetworkError
from mistralcli.hub_body import Body, BrokenOffError
from mistralcli.hub_errors import HubRequest, is_passing, not_the_hub, retry_after_s, translated
from mistralcli.hub_files import RemoteFile

LIBRARY = "mistral-cli"
"""How we introduce ourselves to the Hub."""

_MOST_REDIRECTS = 5
_EXPIRED = (400, 401, 403, 404, 410)
"""What a host that the Hub sends to answers when the address that it was given holds no longer."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Patience:
    """How long a failing network is borne with.

    timeout_s: without data, or with hardly any, until a connection is given up. retries: failures in a row, without a
    byte gained, that are tried again. first_wait_s, longest_wait_s: before the first of them, doubled each time.
    """

    timeout_s: float = 30.0
    retries: int = 8
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0
    longest_asked_s: float = 600.0

    def wait_s(self, failures: int, asked_s: float | None) -> float:
        """How long to wait after so many failures in a row: at random, so that not all come back at once.

        asked_s: what the server asks for (Retry-After), of which nothing is taken off.
        """
        wait_s = min(self.longest_wait_s, self.first_wait_s * 2.0 ** (failures - 1)) * random.uniform(0.5, 1)
        return wait_s if asked_s is None else max(asked_s, wait_s)


DEFAULT_PATIENCE = Patience()


class TryAgainError(Exception):
    """Something that may pass. `final` is what to say if it does not, `after_s` what the server asks to wait."""

    def __init__(self, final: MistralError, after_s: float | None = None) -> None:
        super().__init__(final.message)
        self.final = final
        self.after_s = after_s


@contextmanager
def failures_that_pass(request: HubRequest) -> Iterator[None]:
    """Turn what the network raises in the block into TryAgainError, or an error of ours where trying is no use."""
    try:
        yield
    except (MistralError, TryAgainError):
        raise
    except Exception as error:
        ours = translated(error, request)
        if ours is None:
            raise
        if is_passing(error):
            raise TryAgainError(ours, retry_after_s(error)) from error
        raise ours from error


def patiently(action: Callable[[], _T], patience: Patience, on_note: Callable[[str], None]) -> _T:
    """What `action` gives, which is called again after failures that may pass; the last one is raised."""
    failures = 0
    while True:
        try:
            return action()
        except NetworkError as error:
            failures += 1
            cause = error.__cause__
            asked_s = retry_after_s(cause) if isinstance(cause, Exception) else None
            passes = isinstance(cause, Exception) and (isinstance(cause, BrokenOffError) or is_passing(cause))
            if failures > patience.retries or not passes:
                raise
            if type(cause).__name__ == "ConnectError" or (asked_s or 0) > patience.longest_asked_s:
                raise  # without a network at the very start, waiting for one is not what was asked
            wait_s = patience.wait_s(failures, asked_s)
            on_note(f"{error.message}; trying again in {wait_s:.0f} s")
            time.sleep(wait_s)


class Remote:
    """One file on the Hub, at one commit. Threads may open it at the same time."""

    def __init__(
        self,
        request: HubRequest,
        token: str | Literal[False],
        commit: str,
        file: RemoteFile,
        timeout_s: float,
    ) -> None:
        self.request = request
        self.file = file
        self._token = token
        self._timeout_s = timeout_s
        self._url = hf_hub_url(request.model.repo_id, file.name, revision=commit, endpoint=request.endpoint)
        self._lock = threading.Lock()
        self._found: str | None = None

    @contextmanager
    def open(self, start: int, end: int) -> Iterator[Body]:
        """Ask for the bytes from `start` to `end`. The answer may be all of the file: its `start` is then 0.

        BrokenOffError in the block, while the body is read, becomes TryAgainError as well.

        Raises:
            TryAgainError: the network failed, or what came is not the file.
            MistralError: trying again is no use.
        """
        found = self._found
        url = found or self._url
        for _ in range(_MOST_REDIRECTS + 1):
            with self._failures_at(url), self._ask(url, start, end) as response:
                if not response.is_redirect:
                    self._accept(response, url, was_found=found is not None)
                    yield self._body(response, start, end)
                    return
                url = self._next_url(url, response.headers.get("Location", ""))
        raise TryAgainError(
            NetworkError(
                f"{self.request.host} redirects more than {_MOST_REDIRECTS} times", "try again later"
            )
        )

    @contextmanager
    def _failures_at(self, url: str) -> Iterator[None]:
        """Name the host that fails; after any failure the Hub is asked again where the file is."""
        request = self.request if self._is_hub(url) else replace(self.request, endpoint=_origin(url))
        try:
            with failures_that_pass(request):
                yield
        except (BrokenOffError, TryAgainError) as error:
            if self._found == url:
                self._found = None
            if isinstance(error, TryAgainError):
                raise
            how = f"the transfer of {self.file.name} from {request.host} broke off: {error}"
            raise TryAgainError(
                NetworkError(how, "check the network connection, or pull again later")
            ) from error

    def _ask(self, url: str, start: int, end: int) -> Any:
        headers = build_hf_headers(
            token=self._token if self._is_hub(url) else False,
            library_name=LIBRARY,
            library_version=__version__,
            headers={"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"},
        )
        return get_session().stream(
            "GET", url, headers=headers, follow_redirects=False, timeout=self._timeout_s
        )

    def _is_hub(self, url: str) -> bool:
        return _host(url) == _host(self.request.endpoint)

    def _next_url(self, url: str, location: str) -> str:
        """Where a redirect leads: never from an encrypted connection to one that is not."""
        try:
            target = urljoin(url, location)
            scheme = urlsplit(target).scheme
        except ValueError:
            target = scheme = ""
        allowed = ("https",) if urlsplit(url).scheme == "https" else ("http", "https")
        if scheme not in allowed:
            raise NetworkError(
                f"{self.request.host} redirects to what is no safe address",
                "check HF_ENDPOINT and the proxy settings",
            )
        return target

    def _accept(self, response: Any, url: str, *, was_found: bool) -> None:
        """Note where the file was found, or that it is there no longer, or raise for an answer that refuses."""
        if response.status_code in (200, 206):
            self._found = url
            return
        if response.status_code == 416:
            raise TryAgainError(self._other_length())
        is_elsewhere = url != self._url and (was_found or not self._is_hub(url))
        if is_elsewhere and response.status_code in _EXPIRED:
            gone = NetworkError(
                f"{self.request.host} sends to a place that refuses {self.file.name} (status {response.status_code})",
                "pull again later",
            )
            raise TryAgainError(gone, 0.0 if was_found else None)
        if response.headers.get("X-Error-Code") == "RevisionNotFound":
            raise IntegrityError(
                f"{self.request.model} has changed on {self.request.host}: the commit that it was at is gone",
                "pull again",
            )
        hf_raise_for_status(response)
        raise TryAgainError(not_the_hub(None, self.request))

    def _other_length(self) -> IntegrityError:
        return IntegrityError(
            f"{self.file.name} of {self.request.model} has another length than {self.request.host} lists",
            "pull again: it may have changed meanwhile",
        )

    def _body(self, response: Any, start: int, end: int) -> Body:
        """The answer's body, when its headers fit what was asked for."""
        length = response.headers.get("Content-Length")
        size, encoding = self.file.size_bytes, response.headers.get("Content-Encoding", "identity")
        if response.status_code == 206:
            first, last, total = self._content_range(response)
            if first != start or not start < last + 1 <= end or total not in (size, None):
                raise TryAgainError(self._wrong_range(response))
            start, end = first, last + 1
        elif length == str(size) or (length is None and not _is_page(response)):
            start, end = 0, size
        else:
            raise TryAgainError(not_the_hub(None, self.request))
        if encoding != "identity":
            raise TryAgainError(not_the_hub(None, self.request))
        return Body(response, start, end, self._timeout_s)

    def _content_range(self, response: Any) -> tuple[int, int, int | None]:
        match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if match is None:
            raise TryAgainError(self._wrong_range(response))
        return int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])

    def _wrong_range(self, response: Any) -> NetworkError:
        said = repr(response.headers.get("Content-Range", ""))[:80]
        return NetworkError(
            f"{self.request.host} sent another part of {self.file.name} than was asked for ({said})",
            "pull again later, or check HF_ENDPOINT and the proxy settings",
        )


def _is_page(response: Any) -> bool:
    return str(response.headers.get("Content-Type", "")).lower().startswith("text/html")


def _origin(url: str) -> str:
    return "{}://{}".format(*_host(url))


def _host(url: str) -> tuple[str, str]:
    address = urlsplit(url)
    return address.scheme, address.netloc.rpartition("@")[2].lower()
