"""How fast `mistral pull`'s transfer is on loopback, beside curl and huggingface_hub: the same files, the same server.

    python benchmarks/pull_throughput.py [--size 1.5GB] [--files 3] [--rounds 5] [--dir /dev/shm]

The server is processes that call sendfile, one for each connection, so that it is not what limits. In each round the
three take turns. curl fetches the files one after the other and checks nothing; huggingface_hub checks sizes; ours
checks SHA-256. Medians of the rounds, and of each round's ratio; processor time is that of the client alone.
"""

import argparse
import hashlib
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mistralcli.hub_cache import HubModel
from mistralcli.hub_errors import HubRequest
from mistralcli.units import parse_size, size_text

COMMIT = "0" * 40
REPO = "bench/mark"


def serve(listener: socket.socket, directory: Path) -> None:
    """Answer GET and HEAD for files of `directory` by their names, with ranges; a process for each connection."""
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            try:
                answer_all(connection, directory)
            finally:
                os._exit(0)
        connection.close()


def answer_all(connection: socket.socket, directory: Path) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    received = b""
    while True:
        while b"\r\n\r\n" not in received:
            if not (piece := connection.recv(65536)):
                return
            received += piece
        head, _, received = received.partition(b"\r\n\r\n")
        method, path = head.decode().split()[:2]
        name = path.rpartition("/")[2]
        size_bytes = (directory / name).stat().st_size
        asked = re.search(r"(?i)\r\nrange: bytes=(\d+)-(\d*)", head.decode())
        first, last = (int(asked[1]), int(asked[2] or size_bytes - 1)) if asked else (0, size_bytes - 1)
        lines = [
            f"HTTP/1.1 {'206 Partial Content' if asked else '200 OK'}",
            f"Content-Length: {last - first + 1}",
        ]
        lines += [f"Content-Range: bytes {first}-{last}/{size_bytes}"] if asked else []
        lines += [f'ETag: "{(directory / (name + ".sha256")).read_text()}"', f"X-Repo-Commit: {COMMIT}"]
        connection.sendall("\r\n".join([*lines, "Accept-Ranges: bytes", "", ""]).encode())
        with (directory / name).open("rb") as file:
            while method == "GET" and first <= last:
                first += os.sendfile(connection.fileno(), file.fileno(), first, last - first + 1)


def write_files(directory: Path, n_files: int, size_bytes: int) -> dict[str, str]:
    """Random files; gives SHA-256 by name."""
    digests = {}
    for number in range(n_files):
        path = directory / f"model-{number}.safetensors"
        data = np.random.default_rng(number).bytes(size_bytes // n_files)
        path.write_bytes(data)
        digests[path.name] = hashlib.sha256(data).hexdigest()
        (directory / f"{path.name}.sha256").write_text(digests[path.name])
    return digests


def by_curl(url: str, names: dict[str, str], target: Path) -> None:
    outputs = [
        word for name in names for word in ("-o", target / name, f"{url}/{REPO}/resolve/{COMMIT}/{name}")
    ]
    subprocess.run(["curl", "-sS", "--fail", *outputs], check=True)


def by_us(url: str, names: dict[str, str], target: Path) -> None:
    from mistralcli.hub_files import RemoteFile
    from mistralcli.hub_http import Patience, Remote
    from mistralcli.transfer import fetch

    request, patience = HubRequest(HubModel(REPO), url, None), Patience()
    for name, digest in names.items():
        file = RemoteFile(name, int(os.environ["BENCH_BYTES"]), digest)
        remote = Remote(request, False, COMMIT, file, patience.timeout_s)
        fetch(remote, target / digest, patience=patience, on_bytes=lambda _: None, on_note=print)


def by_huggingface_hub(url: str, names: dict[str, str], target: Path) -> None:
    from huggingface_hub import hf_hub_download

    for name in names:
        hf_hub_download(REPO, name, revision=COMMIT, cache_dir=target, endpoint=url, token=False)


def measured(
    fetch: Callable[[str, dict[str, str], Path], None], url: str, names: dict[str, str], place: Path
) -> tuple[float, float]:
    """Seconds, and those of processor time, with nothing there before; what was fetched is removed."""
    target = place / "target"
    target.mkdir()
    started, processor_s = time.perf_counter(), processor_seconds()
    fetch(url, names, target)
    seconds, processor_s = time.perf_counter() - started, processor_seconds() - processor_s
    shutil.rmtree(target)
    return seconds, processor_s


def processor_seconds() -> float:
    """Of this process and of those that it waited for: curl, and not the server."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=parse_size, default=parse_size("1.5GB"))
    parser.add_argument("--files", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    with tempfile.TemporaryDirectory(dir=options.dir) as directory:
        place = Path(directory)
        names = write_files(place, options.files, options.size)
        os.environ["BENCH_BYTES"] = str(options.size // options.files)
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if (server := os.fork()) == 0:
            serve(listener, place)
        listener.close()
        ways = {"curl": by_curl, "mistral": by_us, "huggingface_hub": by_huggingface_hub}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        used: dict[str, list[float]] = {name: [] for name in ways}
        try:
            for number in range(options.rounds + 1):
                for name, fetch in ways.items():
                    seconds, processor_s = measured(fetch, url, names, place)
                    if number:  # the first round imports and warms up
                        taken[name].append(seconds)
                        used[name].append(processor_s)
        finally:
            os.kill(server, 9)
    for name, all_seconds in taken.items():
        ratios = [ours / theirs for ours, theirs in zip(taken["curl"], all_seconds, strict=True)]
        rate = options.size / statistics.median(all_seconds) / 1e6
        print(
            f"{name:16} {rate:6.0f} MB/s, {statistics.median(ratios):.2f} of curl's speed "
            f"({min(ratios):.2f} to {max(ratios):.2f}), "
            f"{statistics.median(used[name]) / options.size * 1e9:.2f} s of processor time a GB"
        )
    print(
        f"{size_text(options.size)} in {options.files} files, {options.rounds} rounds, load {os.getloadavg()[0]:.1f}",
        f"on {os.cpu_count()} cores, python {sys.version.split()[0]}",
    )


if __name__ == "__main__":
    main()
