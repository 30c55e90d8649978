"""The sentences of a pull that fails, as a user meets them: one for each cause, with its exit code."""

import errno
import os
import resource
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hub_models import online, write_checkpoint
from hub_server import TOKEN, Access, Fault, HubServer
from program import MISTRAL, assert_one_sentence, environment, mistral

from mistralcli.errors import DiskError
from mistralcli.hub_cache import HubModel, cache_directory
from mistralcli.hub_errors import HubRequest, translated

MODEL = "mistralai/tiny"


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as running:
        yield running


Pull = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def pull(tmp_path: Path, server: HubServer) -> Pull:
    """Runs `mistral pull` with arguments and further variables."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return mistral("pull", *arguments, home=tmp_path, **online(tmp_path, server) | variables)

    return run


def check_failure(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """One sentence and one hint, and never the token."""
    assert_one_sentence(done, code, *parts)
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert TOKEN not in done.stderr


@pytest.mark.parametrize(
    ("model", "code", "parts"),
    [
        ("mistralai/missing", 3, ("no model mistralai/missing", "no token was sent")),
        (f"{MODEL}@v9", 3, ("no revision 'v9'",)),
        ("a/b/c", 2, ("'a/b/c'", "OWNER/NAME")),
        ("../../etc", 2, ("'../../etc'",)),
        (f"{MODEL}@../../x", 2, ("'../../x'",)),
        (f"{MODEL}@", 2, ("''",)),
        ("x\x1b[31m/y", 2, ("\\x1b",)),
    ],
)
def test_a_name_that_the_hub_does_not_have(
    pull: Pull,
    server: HubServer,
    tmp_path: Path,
    model: str,
    code: int,
    parts: tuple[str, ...],
) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    check_failure(pull(model), code, *parts)


@pytest.mark.parametrize(
    ("access", "flags", "variables", "token_file", "code", "parts"),
    [
        ("gated", [], {}, None, 4, ("gated", "no token was sent", "settings/tokens")),
        ("ungranted", ["--token", TOKEN], {}, None, 4, ("gated", "the token came from --token")),
        ("ungranted", [], {"HF_TOKEN": TOKEN}, None, 4, ("gated", "the token came from HF_TOKEN")),
        ("ungranted", [], {}, TOKEN, 4, ("gated", "the token came from the file", "/hf/token")),
        ("public", ["--token", "hf_wrong"], {}, None, 4, ("refused the token", "came from --token")),
        ("public", [], {"HF_TOKEN": "hf\twrong"}, None, 4, ("the token from HF_TOKEN has characters",)),
        ("private", [], {}, None, 3, ("or it is private", "no token was sent")),
        ("public", [], {"HF_TOKEN_PATH": "/"}, None, 4, ("the token cannot be read from the file /",)),
    ],
)
def test_refused_access_says_where_the_token_came_from(
    pull: Pull,
    server: HubServer,
    tmp_path: Path,
    access: Access,
    flags: list[str],
    variables: dict[str, str],
    token_file: str | None,
    code: int,
    parts: tuple[str, ...],
) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"), access=access)
    if token_file is not None:
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "token").write_text(token_file)
    done = pull(MODEL, *flags, **variables)
    check_failure(done, code, *parts)
    assert "wrong" not in done.stderr
    if "gated" in parts:
        assert f"{server.url}/{MODEL}" in done.stderr


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (Fault("status", 503), ("has trouble answering (status 503",)),
        (Fault("status", 429, {"Retry-After": "30"}), ("limits how often", "in 30 seconds")),
        (Fault("status", 418), ("refused to answer", "status 418")),
        (Fault("status", 404), ("refused to answer", "HF_ENDPOINT")),
        (Fault("html"), ("not the Hub", "log in with a browser")),
        (Fault("truncate"), ("broke off",)),
    ],
    ids=lambda value: f"{value.kind}-{value.status}" if isinstance(value, Fault) else "",
)
def test_a_hub_that_does_not_answer_properly(
    pull: Pull, server: HubServer, tmp_path: Path, fault: Fault, parts: tuple[str, ...]
) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    server.faults["/api/models/"] = fault
    check_failure(pull(MODEL, "--retries", "0"), 5, *parts)


def test_a_login_page_in_place_of_a_file_is_not_the_hub(
    pull: Pull, server: HubServer, tmp_path: Path
) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    server.faults["/resolve/"] = Fault("html")
    check_failure(pull(MODEL, "--retries", "1"), 5, "not the Hub")


def free_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    ("variables", "code", "parts"),
    [
        ({"HF_HUB_OFFLINE": "1"}, 5, (f"{MODEL} is not on this machine", "HF_HUB_OFFLINE")),
        ({"HF_ENDPOINT": "http://127.0.0.1:{port}"}, 5, ("127.0.0.1:{port} cannot be reached",)),
        ({"HF_ENDPOINT": "http://hub.invalid"}, 5, ("the name hub.invalid cannot be resolved",)),
        ({"HF_ENDPOINT": "http://me:secret@127.0.0.1:{port}"}, 5, ("127.0.0.1:{port} cannot be reached",)),
        ({"HF_ENDPOINT": "nonsense"}, 2, ("HF_ENDPOINT is no address",)),
        ({"HF_ENDPOINT": "http://hub:99999"}, 2, ("HF_ENDPOINT is no address",)),
        ({"http_proxy": "http://127.0.0.1:{port}"}, 5, ("through the proxy that http_proxy names",)),
    ],
)
def test_a_hub_that_cannot_be_reached(
    pull: Pull, variables: dict[str, str], code: int, parts: tuple[str, ...]
) -> None:
    port = free_port()
    filled = {name: value.format(port=port) for name, value in variables.items()}
    done = pull(MODEL, **filled)
    check_failure(done, code, *(part.format(port=port) for part in parts))
    assert "secret" not in done.stderr


def test_a_hub_that_accepts_and_says_nothing_times_out(pull: Pull) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = pull(MODEL, "--retries", "0", "--timeout", "1", HF_ENDPOINT=address)
    check_failure(done, 5, "did not answer in time")


class _RefusingProxy(BaseHTTPRequestHandler):
    def do_CONNECT(self) -> None:
        self.send_error(407)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nobody reads it."""


@pytest.fixture
def serve() -> Iterator[Callable[[HTTPServer], int]]:
    """Runs servers until the test is over; gives the port of each."""
    running: list[HTTPServer] = []

    def start(server: HTTPServer) -> int:
        running.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server.server_port

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_a_proxy_that_refuses_is_named_as_such(pull: Pull, serve: Callable[[HTTPServer], int]) -> None:
    port = serve(HTTPServer(("127.0.0.1", 0), _RefusingProxy))
    variables = {"HF_ENDPOINT": "https://hub.invalid", "HTTPS_PROXY": f"http://me:secret@127.0.0.1:{port}"}
    done = pull(MODEL, **variables)
    check_failure(done, 5, "proxy", "HTTPS_PROXY", "407")
    assert "secret" not in done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_a_certificate_that_is_not_trusted_is_named_as_such(
    pull: Pull, serve: Callable[[HTTPServer], int], tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-subj",
        "/CN=127.0.0.1",
        "-days",
        "1",
    ]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    done = pull(MODEL, HF_ENDPOINT=f"https://127.0.0.1:{serve(server)}")
    check_failure(done, 5, "certificate", "self-signed", "SSL_CERT_FILE")


def test_a_cache_that_cannot_be_written(pull: Pull, server: HubServer, tmp_path: Path) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    (tmp_path / "file").touch()
    done = pull(MODEL, HF_HUB_CACHE=str(tmp_path / "file" / "hub"))
    check_failure(done, 6, f"{tmp_path}/file", "HF_HOME")


@pytest.mark.parametrize("place", ["/dev/null/x", "/dev/null"])
def test_a_home_under_a_file_is_a_disk_error_and_not_the_tokens(pull: Pull, place: str) -> None:
    check_failure(
        pull(MODEL, HF_HOME=place), 6, f"{place}/hub cannot be made: /dev/null is no directory", "HF_HOME"
    )


def test_a_disk_that_takes_no_such_file_keeps_the_files_that_are_complete(
    server: HubServer, tmp_path: Path
) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))

    def limit_file_size() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    done = subprocess.run(
        [*MISTRAL, "pull", MODEL],
        env=environment(tmp_path, **online(tmp_path, server)),
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
    )
    check_failure(done, 6, "the disk takes no file of this size", "ulimit -f")
    kept = {path.name for path in (tmp_path / "hf").rglob("snapshots/*/*")}
    assert kept == {"config.json", "LICENSE", "tokenizer.model", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--dry-run", f"a plan for {MODEL} needs the Hub"),
        ("--quantize=4", f"the weights of {MODEL} come from"),
    ],
)
def test_offline_what_needs_the_hub_says_so_also_where_the_model_is_here(
    flag: str, said: str, pull: Pull, server: HubServer, tmp_path: Path
) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    assert pull(MODEL).returncode == 0
    server.requests.clear()
    check_failure(pull(MODEL, "--offline", flag), 5, said, "leave out --offline")
    assert not server.requests


def test_a_cache_that_is_removed_under_way_is_said_to_be(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    request = HubRequest(HubModel(MODEL), server.url, None)
    gone = str(cache_directory() / "blobs")
    found = translated(FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), gone), request)
    assert isinstance(found, DiskError) and found.message == f"{gone} was removed meanwhile"
    elsewhere = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(tmp_path / "authority.pem"))
    assert translated(elsewhere, request) is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_full_quota_are_said_to_be_that(number: int) -> None:
    request = HubRequest(HubModel(MODEL), "https://hub.test", None)
    found = translated(OSError(number, os.strerror(number)), request)
    assert isinstance(found, DiskError) and found.message == "the disk is full; what came so far was kept"


def test_a_damaged_file_exits_9_with_its_name(pull: Pull, server: HubServer, tmp_path: Path) -> None:
    server.add(MODEL, write_checkpoint(tmp_path / "source"))
    server.faults[server.file(MODEL, "model.safetensors").digest] = Fault("corrupt")
    check_failure(pull(MODEL), 9, "model.safetensors", "pull again")
