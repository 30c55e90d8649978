"""What huggingface_hub and the network below it raise, as sentences of ours: one table, by exception name.

By name, because the HTTP library is httpx in huggingface_hub 1 and httpx2 in 2: the same names, two packages.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

from mistralcli.errors import (
    AccessError,
    DiskError,
    IntegrityError,
    MistralError,
    ModelNotFoundError,
    NetworkError,
    UsageError,
)
from mistralcli.hub_cache import HubModel, cache_directory

_FULL = (errno.ENOSPC, errno.EDQUOT)
_TOKEN_PAGE = "https://huggingface.co/settings/tokens"
_CHECK_CONNECTION = "check the network connection, and HF_ENDPOINT if it is set"
_MAX_QUOTE = 160
_PASSING = {"TimeoutException", "TransportError", "NetworkError", "ProtocolError"}
"""Kinds of exceptions after which it is worth trying again."""
_PASSING_STATUS = (408, 425, 429)
"""And answers, beside those from 500 on."""


@dataclass(frozen=True)
class HubRequest:
    """What is asked of whom. `token_source` says where the token came from, never what it is."""

    model: HubModel
    endpoint: str
    token_source: str | None

    @property
    def host(self) -> str:
        """Host and port of the endpoint, without a password that its address may hold."""
        return urlsplit(self.endpoint).netloc.rpartition("@")[2]

    @property
    def page(self) -> str:
        """The model's page, for a browser."""
        return f"{urlsplit(self.endpoint)._replace(netloc=self.host).geturl()}/{self.model.repo_id}"

    @property
    def token_note(self) -> str:
        """One clause about the token."""
        return f"the token came from {self.token_source}" if self.token_source else "no token was sent"


def hub_endpoint() -> str:
    """The Hub's address, by HF_ENDPOINT.

    Raises:
        UsageError: it is no address; with some of those even importing huggingface_hub fails.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        address = urlsplit(endpoint)
        is_address = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError("HF_ENDPOINT is no address", "write it as https://HOST or http://HOST:PORT")
    return endpoint


@contextmanager
def our_errors(request: HubRequest) -> Iterator[None]:
    """Turn what the block raises into errors of ours; what the table does not know passes unchanged."""
    try:
        yield
    except MistralError:
        raise
    except Exception as error:
        ours = translated(error, request)
        if ours is None:
            raise
        raise ours from error


def translated(error: Exception, request: HubRequest) -> MistralError | None:
    """The error of ours that says what `error` means for `request`, or None when it is not in the table."""
    for kind in type(error).__mro__:
        if kind.__name__ in _TABLE:
            return _TABLE[kind.__name__](error, request)
    return None


def is_passing(error: Exception) -> bool:
    """Whether what the network raised may be over in a while: no refusal, no certificate, no proxy's settings."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "HfHubHTTPError" in kinds:
        status = int(getattr(error, "response").status_code)  # noqa: B009 - its type is one of two packages'
        return status in _PASSING_STATUS or status >= 500
    untrusted = any(type(cause).__name__ == "SSLCertVerificationError" for cause in _chain(error))
    return bool(kinds & _PASSING) and "ProxyError" not in kinds and not untrusted


def retry_after_s(error: Exception) -> float | None:
    """How many seconds an answer asks to wait (Retry-After: seconds, or a date), if it does."""
    response = getattr(error, "response", None)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def not_the_hub(error: Exception | None, request: HubRequest) -> MistralError:
    """Something answered, but not in the Hub's protocol."""
    return NetworkError(
        f"{request.host} answered with something that is not the Hub",
        "if this network wants a login, log in with a browser; else check HF_ENDPOINT and the proxy settings",
    )


def _missing_model(error: Exception, request: HubRequest) -> MistralError:
    return ModelNotFoundError(
        f"{request.host} has no model {request.model.repo_id}, or it is private ({request.token_note})",
        "check the spelling of OWNER/NAME; a private model needs a token of an account that may read it",
    )


def _missing_revision(error: Exception, request: HubRequest) -> MistralError:
    return ModelNotFoundError(
        f"{request.model.repo_id} has no revision {request.model.revision or 'main'!r}",
        f"its branches and tags are listed at {request.page}/tree/main",
    )


def _missing_file(error: Exception, request: HubRequest) -> MistralError:
    return IntegrityError(
        f"a file that {request.model.repo_id} lists is not there", "pull again: it may have changed meanwhile"
    )


def _gated(error: Exception, request: HubRequest) -> MistralError:
    token = "" if request.token_source else f", put a token from {_TOKEN_PAGE} in HF_TOKEN"
    return AccessError(
        f"{request.model.repo_id} is gated: its owner asks that you accept conditions ({request.token_note})",
        f"accept them at {request.page}{token}, and pull again",
    )


def _disabled(error: Exception, request: HubRequest) -> MistralError:
    return AccessError(f"access to {request.model.repo_id} was disabled by the Hub", f"see {request.page}")


def _http_status(error: Any, request: HubRequest) -> MistralError:
    """An answer that refuses, and that huggingface_hub has no name for."""
    status = int(error.response.status_code)
    said = f"status {status}" + (f": {_first_line(error.server_message)}" if error.server_message else "")
    if status in (401, 403):
        what = "refused the token" if request.token_source else "asks for a token"
        return AccessError(
            f"{request.host} {what} for {request.model.repo_id} ({said}; {request.token_note})",
            f"make a token that may read it at {_TOKEN_PAGE}, and give it in HF_TOKEN or with --token",
        )
    if status == 407:
        return _proxy(error, request)
    if status == 429:
        wait = error.response.headers.get("Retry-After", "")
        when = f"in {wait} seconds" if wait.isdigit() else "in a few minutes"
        return NetworkError(
            f"{request.host} limits how often it is asked ({said})",
            f"pull again {when}; with a token the limits are higher ({request.token_note})",
        )
    if status >= 500:
        return NetworkError(f"{request.host} has trouble answering ({said})", "pull again later")
    return NetworkError(
        f"{request.host} refused to answer for {request.model} ({said})",
        "check that HF_ENDPOINT, if it is set, is the address of a Hub",
    )


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:_MAX_QUOTE]


def _reason(error: Exception) -> str:
    """What the exception says, in one short line; its kind when it says nothing."""
    return _first_line(str(error)) or type(error).__name__


def _unreachable(error: Exception, request: HubRequest) -> MistralError:
    """No connection: the innermost cause tells whether it was the name, the certificate, or the way."""
    causes = {type(cause).__name__: cause for cause in _chain(error)}
    if "SSLCertVerificationError" in causes:
        reason = getattr(causes["SSLCertVerificationError"], "verify_message", "") or "unknown"
        return NetworkError(
            f"the certificate of {request.host} is not trusted: {reason}",
            "if this network inspects encrypted traffic, name the file of its authority in SSL_CERT_FILE",
        )
    proxy = _proxy_variable(request.endpoint)
    if proxy:
        return NetworkError(
            f"{request.host} cannot be reached through the proxy that {proxy} names: {_reason(error)}",
            f"check the address in {proxy}, or unset it",
        )
    if "gaierror" in causes:
        return NetworkError(f"the name {request.host} cannot be resolved", _CHECK_CONNECTION)
    return NetworkError(f"{request.host} cannot be reached: {_reason(error)}", _CHECK_CONNECTION)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _proxy_variable(endpoint: str) -> str | None:
    """The environment variable whose proxy serves `endpoint`, if there is one."""
    address = urlsplit(endpoint)
    if proxy_bypass(address.hostname or ""):
        return None
    names = (f"{address.scheme}_proxy", "all_proxy")
    return next((name for low in names for name in (low, low.upper()) if os.environ.get(name)), None)


def _proxy(error: Exception, request: HubRequest) -> MistralError:
    proxy = _proxy_variable(request.endpoint) or "the proxy settings"
    return NetworkError(
        f"the proxy on the way to {request.host} refused: {_reason(error)}",
        f"check the address, name and password in {proxy}",
    )


def _timeout(error: Exception, request: HubRequest) -> MistralError:
    return NetworkError(f"{request.host} did not answer in time", _CHECK_CONNECTION)


def _broken_off(error: Exception, request: HubRequest) -> MistralError:
    return NetworkError(
        f"the connection to {request.host} broke off: {_reason(error)}",
        "pull again: what came so far was kept",
    )


def _from_os(error: Any, request: HubRequest) -> MistralError | None:
    """Errors of the disk."""
    if error.errno in _FULL:
        return DiskError(
            "the disk is full; what came so far was kept",
            "free some space and pull again, or name a larger disk in HF_HOME",
        )
    if error.errno == errno.EFBIG:
        return DiskError(
            "the disk takes no file of this size; what came so far was kept",
            "raise the limit if `ulimit -f` shows one, or name a disk with another file system in HF_HOME",
        )
    if error.errno == errno.ENOENT and Path(error.filename or "").is_relative_to(cache_directory()):
        return DiskError(f"{error.filename} was removed meanwhile", "pull again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return DiskError(
            f"{error.filename} cannot be written: {error.strerror}", "name another directory in HF_HOME"
        )
    return None


_TABLE: dict[str, Callable[[Any, HubRequest], MistralError | None]] = {
    # huggingface_hub's
    "GatedRepoError": _gated,
    "RepositoryNotFoundError": _missing_model,
    "RevisionNotFoundError": _missing_revision,
    "RemoteEntryNotFoundError": _missing_file,
    "DisabledRepoError": _disabled,
    "HfHubHTTPError": _http_status,
    # httpx's and httpx2's
    "ProxyError": _proxy,
    "ConnectError": _unreachable,
    "TimeoutException": _timeout,
    "TransportError": _broken_off,
    "NetworkError": _broken_off,  # httpcore's, below both
    "ProtocolError": _broken_off,
    "TooManyRedirects": not_the_hub,
    "InvalidURL": not_the_hub,
    "DecodingError": not_the_hub,
    "JSONDecodeError": not_the_hub,
    # Python's
    "OSError": _from_os,
}
