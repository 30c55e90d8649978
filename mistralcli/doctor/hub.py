"""Whether the Hub can be reached, and where the token for it comes from."""

import time
from collections.abc import Iterator

from mistralcli.doctor.findings import Context, Finding, guarded
from mistralcli.errors import NetworkError
from mistralcli.hub_cache import HubModel
from mistralcli.hub_errors import HubRequest, hub_endpoint, not_the_hub, our_errors

_TIMEOUT_S = 5.0


def check_hub(context: Context) -> Iterator[Finding]:
    hub_endpoint()  # with some bad addresses huggingface_hub cannot even be imported
    from huggingface_hub import is_offline_mode

    if context.offline or is_offline_mode():
        reason = "--offline" if context.offline else "HF_HUB_OFFLINE is set"
        yield Finding("hub", "note", f"not asked ({reason})")
    else:
        yield from guarded("hub", _reach)
    yield from guarded("token", _find_token)


def _reach() -> Iterator[Finding]:
    """Ask the Hub's API for nothing but an answer, without a token.

    Raises:
        NetworkError: there is none, or it is not the Hub's.
    """
    from huggingface_hub import get_session

    request = HubRequest(HubModel("models"), hub_endpoint(), token_source=None)
    started = time.perf_counter()
    with our_errors(request):
        answer = get_session().head(f"{request.endpoint}/api/models?limit=1", timeout=_TIMEOUT_S)
    seconds = time.perf_counter() - started
    if "html" in answer.headers.get("Content-Type", ""):  # what a login page or a wrong address sends
        raise not_the_hub(ValueError("a page"), request)
    if answer.status_code >= 500:
        raise NetworkError(
            f"{request.host} has trouble answering (status {answer.status_code})", "try again later"
        )
    yield Finding("hub", "ok", f"{request.host} answers in {seconds:.2f} s")


def _find_token() -> Iterator[Finding]:
    """Raises AccessError when there is a token that cannot be used."""
    from mistralcli.hub import find_token

    _, source = find_token(None)
    without = "none: gated and private models cannot be pulled"
    yield Finding("token", "ok", f"from {source}" if source else without)
