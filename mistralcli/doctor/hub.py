"""Whether the Hub can be reached, and where the token for it comes from."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO

from mistralcli.doctor.findings import Context, Finding, guarded
from mistralcli.errors import NetworkError
from mistralcli.hub_cache import HubModel
from mistralcli.hub_errors import HubRequest, hub_endpoint, not_the_hub, our_errors

_TIMEOUT_S = 5.0


def check_hub(context: Context) -> Iterator[Finding]:
    yield from guarded("hub", partial(_examine_hub, context))
    yield from guarded("token", _find_token)


@contextmanager
def _import_of_huggingface_hub() -> Iterator[None]:
    """Some bad addresses in HF_ENDPOINT break it. Raises UsageError then, which names the variable."""
    try:
        with redirect_stdout(StringIO()):  # it prints why it fails, in the middle of our JSON
            yield
    except ValueError:
        hub_endpoint()
        raise


def _examine_hub(context: Context) -> Iterator[Finding]:
    """Raises UsageError or NetworkError when HF_ENDPOINT is no address, or not that of a Hub."""
    if context.offline:
        yield Finding("hub", "note", "not asked (--offline)")
        return
    with _import_of_huggingface_hub():
        from huggingface_hub import is_offline_mode
    if is_offline_mode():
        yield Finding("hub", "note", "not asked (HF_HUB_OFFLINE is set)")
    else:
        yield _reach()


def _reach() -> Finding:
    """Ask the Hub's API for nothing but an answer, without a token; without one, only pulls do not work.

    Raises:
        UsageError: HF_ENDPOINT is no address.
        NetworkError: what answers is not the Hub.
    """
    from huggingface_hub import get_session

    request = HubRequest(HubModel("any"), hub_endpoint(), token_source=None)  # no model is asked for
    started = time.perf_counter()
    try:
        with our_errors(request):
            answer = get_session().head(f"{request.endpoint}/api/models?limit=1", timeout=_TIMEOUT_S)
    except NetworkError as error:
        message = f"{error.message}: pulls will fail, models that are here run"
        return Finding("hub", "note", message, f"{error.hint}; `--offline` skips this check")
    seconds = time.perf_counter() - started
    if "html" in answer.headers.get("Content-Type", ""):  # what a login page or a wrong address sends
        raise not_the_hub(ValueError("a page"), request)
    if answer.status_code >= 500:
        message = f"{request.host} has trouble answering (status {answer.status_code}): pulls may fail"
        return Finding("hub", "note", message, "try again later")
    return Finding("hub", "ok", f"{request.host} answers in {seconds:.2f} s")


def _find_token() -> Iterator[Finding]:
    """Raises AccessError when there is a token that cannot be used."""
    with _import_of_huggingface_hub():
        from mistralcli.hub import find_token
    _, source = find_token(None)
    without = "none: gated and private models cannot be pulled"
    yield Finding("token", "ok", f"from {source}" if source else without)
