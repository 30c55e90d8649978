"""A small server that speaks the Hugging Face Hub's HTTP protocol on loopback, for tests.

It serves directories as repositories: the listing of a revision, files with ETag, Content-Length and ranges,
and large files by redirection to another host (another port here) that must never see a token, at an address that
holds until it expires. Refusals carry the Hub's status and X-Error-Code. Files are streamed, their bytes counted.
Faults can be put on any path.

    with HubServer({"mistralai/tiny": directory}) as hub:
        subprocess.run([..., "pull", "mistralai/tiny"], env={..., "HF_ENDPOINT": hub.url})
"""

import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aValidTokenOfTheTests"
"""The one token that the server accepts."""

Access = Literal["public", "gated", "private", "ungranted"]
"""Who may read: all; all may list, the token may read; the token alone; all may list, nobody may read."""

_LFS_SUFFIXES = {".safetensors", ".model", ".bin", ".gguf"}
_BLOCK_BYTES, _PACED_BLOCK_BYTES = 1 << 17, 1 << 15
"""Sent at once; when bytes are meant to come slowly, little is lost with a client that is gone."""


@dataclass(frozen=True)
class File:
    """A served file: `digest` is its SHA-256 when it is in LFS, else its git hash."""

    path: Path
    size_bytes: int
    digest: str
    is_lfs: bool

    @classmethod
    def of(cls, path: Path) -> Self:
        is_lfs, size_bytes = path.suffix in _LFS_SUFFIXES, path.stat().st_size
        if not is_lfs:
            git = hashlib.sha1(f"blob {size_bytes}\0".encode() + path.read_bytes())
            return cls(path, size_bytes, git.hexdigest(), is_lfs)
        with path.open("rb") as file:
            return cls(path, size_bytes, hashlib.file_digest(file, "sha256").hexdigest(), is_lfs)

    def listed_as(self, name: str) -> dict[str, Any]:
        """The entry of a revision's listing."""
        entry = {"rfilename": name, "size": self.size_bytes, "blobId": self._git_hash}
        lfs = {"sha256": self.digest, "size": self.size_bytes, "pointerSize": 134}
        return entry | ({"lfs": lfs} if self.is_lfs else {})

    def in_tree_as(self, name: str) -> dict[str, Any]:
        """The entry of a tree."""
        entry = {"type": "file", "path": name, "size": self.size_bytes, "oid": self._git_hash}
        lfs = {"oid": self.digest, "size": self.size_bytes, "pointerSize": 134}
        return entry | ({"lfs": lfs} if self.is_lfs else {})

    @property
    def _git_hash(self) -> str:
        """What git stores of a file in LFS is a pointer to it."""
        return hashlib.sha1(self.digest.encode()).hexdigest() if self.is_lfs else self.digest


@dataclass
class Repository:
    """A repository: commits by hash, branches and tags by name. `extra_entries` are listed as they are,
    `facts` are what else is said of it: cardData, gated."""

    access: Access = "public"
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    extra_entries: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def commit(self, directory: Path, ref: str) -> str:
        """Add the files of `directory` as a commit that `ref` is then at; returns its hash."""
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        files = {path.relative_to(directory).as_posix(): File.of(path) for path in paths}
        names = "".join(f"{name} {file.digest}\n" for name, file in files.items())
        commit = hashlib.sha1(names.encode()).hexdigest()
        self.commits[commit] = files
        self.refs[ref] = commit
        return commit


Kind = Literal[
    "corrupt",
    "cut",
    "drip",
    "etag",
    "expire",
    "html",
    "range",
    "short",
    "silence",
    "stall",
    "status",
    "truncate",
    "vanish",
    "whole",
]
_ON_HEAD = ("html", "status", "expire")
"""The faults that a request without a body meets too."""


@dataclass
class Fault:
    """What goes wrong on a path, the next `times` times, once `skip` requests have passed.

    `corrupt` changes the last byte; `truncate` closes the connection after half of the body, `cut` after `after` bytes,
    where `stall` sends nothing more and `drip` hardly anything; `silence` is no answer at all; `short` sends half of it
    as if that were all; `range` sends another range than was asked for, `whole` the whole file; `etag` names another
    ETag; `html` answers with a page; `status` refuses with that status; `expire` refuses, until the Hub is asked again
    where the file is, where `vanish` answers nothing.
    """

    kind: Kind
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    times: int = 1_000_000
    skip: int = 0
    after: int = 0


@dataclass(frozen=True)
class Request:
    """A request that came, as tests want to know it."""

    host: Literal["hub", "cdn"]
    method: str
    path: str
    range: str | None
    authorization: str | None


class HubServer:
    """The server; `url` is its endpoint while it is entered. `faults` maps a part of a path to a fault."""

    def __init__(self, repos: Mapping[str, Path] | None = None) -> None:
        self.repos: dict[str, Repository] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self.bytes_per_s: float | None = None
        self.sent_bytes = 0
        """Of files, in answers to GET: what the kernel took."""
        self.sent = threading.Condition()
        self.closing = threading.Event()
        self.signature = 0
        self.is_silent = False
        """Whether nothing is answered where an address has expired."""
        self._due_s = 0.0
        for repo_id, directory in (repos or {}).items():
            self.add(repo_id, directory)
        self._servers = {host: _server(self, host) for host in ("hub", "cdn")}

    def add(self, repo_id: str, directory: Path, *, ref: str = "main", access: Access = "public") -> str:
        """Serve `directory` as a commit of a repository; returns its hash."""
        repository = self.repos.setdefault(repo_id, Repository(access))
        return repository.commit(directory, ref)

    def file(self, repo_id: str, name: str, ref: str = "main") -> File:
        """A file that is served."""
        repository = self.repos[repo_id]
        return repository.commits[repository.refs[ref]][name]

    @property
    def url(self) -> str:
        return self.url_of("hub")

    def url_of(self, host: str) -> str:
        """Two names for one address: huggingface_hub 1 takes two ports of one name for one host."""
        name = {"hub": "127.0.0.1", "cdn": "localhost"}[host]
        return f"http://{name}:{self._servers[host].server_port}"

    def paths(self, method: str = "GET") -> list[str]:
        """The paths that were asked for, in order."""
        return [request.path for request in self.requests if request.method == method]

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault that hits a request for `path`, if any; one of the body needs a request that has one."""
        with self.sent:
            for part, fault in self.faults.items():
                if part in path and fault.times > 0 and (method == "GET" or fault.kind in _ON_HEAD):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def count(self, n_bytes: int) -> None:
        """Note that so many bytes were sent; waits as long as `bytes_per_s` demands."""
        with self.sent:
            self.sent_bytes += n_bytes
            self.sent.notify_all()
            if self.bytes_per_s is None:
                return
            self._due_s = max(self._due_s, time.monotonic()) + n_bytes / self.bytes_per_s
            wait_s = self._due_s - time.monotonic()
        time.sleep(max(0.0, wait_s))

    def wait_until_sent(self, n_bytes: int, timeout_s: float = 60) -> None:
        """Return when that many bytes were sent in all."""
        with self.sent:
            assert self.sent.wait_for(lambda: self.sent_bytes >= n_bytes, timeout_s), self.sent_bytes

    def __enter__(self) -> Self:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.closing.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()


def _server(hub: HubServer, host: Literal["hub", "cdn"]) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"hub": hub, "host": host})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    host: Literal["hub", "cdn"]
    fault: Fault | None = None
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """Let little wait in the kernel: what is counted as sent was, but for that, received."""
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        super().setup()

    def handle(self) -> None:
        with suppress(ConnectionError):  # clients are killed, and hang up
            super().handle()

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Tests look at `hub.requests` instead."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.host, self.command, path, self.headers.get("Range"), token))
        self.fault = self.hub.take_fault(self.command, path)
        if self.fault is not None and self.fault.kind == "status":
            return self._refuse(self.fault.status, headers=self.fault.headers)
        if self.fault is not None and self.fault.kind == "html":
            return self._send(b"<html>Please log in to this network.</html>", {"Content-Type": "text/html"})
        if self.fault is not None and self.fault.kind == "silence":
            return self._say_nothing()
        if self.fault is not None and self.fault.kind in ("expire", "vanish"):
            self.hub.signature += 1
            self.hub.is_silent = self.fault.kind == "vanish"
        if self.host == "cdn":
            if urlsplit(self.path).query != f"signature={self.hub.signature}":
                if self.hub.is_silent:
                    return self._say_nothing()
                return self._refuse(403, message="Request has expired")
            file = self._in_cdn(path)
            return self._send_file(file, {"ETag": f'"{path[1:33]}"'}) if file else self._refuse(404)
        if token not in (None, f"Bearer {TOKEN}"):
            return self._refuse(401, message="Invalid credentials in Authorization header")
        return self._answer_as_hub(path, has_token=token is not None)

    def _say_nothing(self) -> None:
        self.close_connection = self.hub.closing.wait()

    def _answer_as_hub(self, path: str, has_token: bool) -> None:
        listing = re.fullmatch(r"/api/models/((?:[^/]+/)?[^/]+?)(?:/(?:revision|tree)/(.+))?", path)
        resolved = re.fullmatch(r"/((?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)", path)
        match = listing or resolved
        if match is None:
            return self._refuse(404)
        repository = self.hub.repos.get(match[1])
        if repository is None or (repository.access == "private" and not has_token):
            return self._refuse(404 if has_token else 401, "RepoNotFound", "Repository not found")
        revision = match[2] or "main"
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if resolved is None:
            return self._send_listing(match[1], repository, commit, is_tree="/tree/" in path)
        if repository.access == "ungranted" or (repository.access == "gated" and not has_token):
            return self._refuse(
                403 if has_token else 401, "GatedRepo", f"Access to {match[1]} is restricted."
            )
        file = repository.commits[commit].get(resolved[3])
        if file is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        return self._resolve(file, commit)

    def _send_listing(self, repo_id: str, repository: Repository, commit: str, *, is_tree: bool) -> None:
        files = repository.commits[commit].items()
        entries = [file.listed_as(name) for name, file in files] + repository.extra_entries
        tree = [file.in_tree_as(name) for name, file in files]
        answer = (
            tree
            if is_tree
            else {"id": repo_id, "sha": commit, "tags": [], "siblings": entries} | repository.facts
        )
        self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _resolve(self, file: File, commit: str) -> None:
        """A file itself; or, for a large one, where it is, with the metadata that huggingface_hub reads."""
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.digest}"'}
        if not file.is_lfs:
            return self._send_file(file, headers)
        linked = {"X-Linked-Size": str(file.size_bytes), "X-Linked-Etag": f'"{file.digest}"'}
        location = {"Location": f"{self.hub.url_of('cdn')}/{file.digest}?signature={self.hub.signature}"}
        return self._send(b"", headers | linked | location, HTTPStatus.FOUND)

    def _in_cdn(self, path: str) -> File | None:
        commits = (files for repository in self.hub.repos.values() for files in repository.commits.values())
        found = (file for files in commits for file in files.values() if path == f"/{file.digest}")
        return next(found, None)

    def _send_file(self, file: File, headers: Mapping[str, str]) -> None:
        kind = self.fault.kind if self.fault is not None else None
        first, last, status = 0, file.size_bytes - 1, HTTPStatus.OK
        headers = {"Accept-Ranges": "bytes", **headers}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and kind != "whole":
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            if kind == "range":
                first, last = (first + 1, last) if first < last else (first - 1, last - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{file.size_bytes}"
            status = HTTPStatus.PARTIAL_CONTENT
        if kind == "etag":
            headers["ETag"] = '"of-another-version"'
        n_bytes = (last + 1 - first) // (2 if kind == "short" else 1)
        self._send_head({"Content-Length": str(n_bytes), **headers}, status)
        if self.command == "GET":
            self._stream(file.path, first, n_bytes)

    def _stream(self, path: Path, first: int, n_bytes: int) -> None:
        """Send bytes of a file as a body, as far as the fault lets them pass."""
        fault, end = self.fault or Fault("etag"), first + n_bytes
        limits = {"truncate": n_bytes // 2, "cut": fault.after, "stall": fault.after, "drip": fault.after}
        stop = first + min(n_bytes, limits.get(fault.kind, n_bytes)) - (fault.kind == "corrupt")
        block_bytes = _PACED_BLOCK_BYTES if self.hub.bytes_per_s else _BLOCK_BYTES
        with path.open("rb") as file:
            while first < stop and not self.hub.closing.is_set():
                sent = os.sendfile(
                    self.connection.fileno(), file.fileno(), first, min(stop - first, block_bytes)
                )
                self.hub.count(sent)
                first += sent
            if fault.kind == "corrupt":
                self.wfile.write(bytes([os.pread(file.fileno(), 1, stop)[0] ^ 1]))
            if fault.kind == "stall":
                self.hub.closing.wait()
            while fault.kind == "drip" and first < end and not self.hub.closing.wait(0.05):
                self.wfile.write(os.pread(file.fileno(), 1, first))
                first += 1
        if fault.kind in ("truncate", "cut", "stall"):
            self.close_connection = True

    def _refuse(
        self, status: int, code: str = "", message: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message}
        extra = {name: value for name, value in named.items() if value} | dict(headers or {})
        body = json.dumps({"error": message or HTTPStatus(status).phrase}).encode()
        self._send(body, {"Content-Type": "application/json", **extra}, status)

    def _send(self, body: bytes, headers: Mapping[str, str], status: int = HTTPStatus.OK) -> None:
        """Send an answer that is no file, with what the fault does to its body."""
        kind = self.fault.kind if self.fault is not None else None
        self._send_head({"Content-Length": str(len(body)), **headers}, status)
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if kind == "truncate" else body)
        if kind == "truncate":
            self.close_connection = True

    def _send_head(self, headers: Mapping[str, str], status: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()
