"""Whether --memory-limit holds on this machine's GPU: a 7B int4 build answers a long prompt at 32k of context.

    python benchmarks/memory_limit.py [--limit 6GB] [--tokens 12000] [--where /dev/shm]

Run it on a GPU that nobody else uses: the whole device's use is watched from a second process while the first loads,
reads the prompt and answers, so the peak has the context, the kernels and the graphs in it. Then a limit that is too
small has to be refused, before loading, with exit code 7.
"""

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from random_build import write_build

from mistralcli.units import parse_size, size_text

RUN = """
import json, sys, time, torch
from pathlib import Path
from mistralcli.run_options import SamplingParams, SessionOptions
from mistralcli.session import open_session
from mistralcli.device import OUTSIDE_TORCH_BYTES, taken_bytes

directory, limit, n_tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
session = open_session(directory, SessionOptions(ctx=32768, memory_limit=limit), on_note=print)
cuda = session.engine.device
print("plan:", session.plan.describe(), f"loaded in {session.load_s:.2f} s", flush=True)
for n in (n_tokens, 700, n_tokens // 2, 700, n_tokens):
    ids = torch.randint(10, 4000, (n,)).tolist()
    completion = session.complete(ids, SamplingParams(temperature=0.7, seed=0), max_tokens=64)
    print(n, "tokens, answered", len("".join(completion)) > 0, "reserved", torch.cuda.memory_reserved(), flush=True)
print("peak allocated %d, reserved %d, driver or estimate %d" % (
    torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), taken_bytes(cuda)), flush=True)
"""


def used_bytes() -> int:
    """What the first device has in use, by all processes."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", default="6GB")
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--where", type=Path, default=Path("/dev/shm"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.where) as folder:
        write_build(Path(folder))
        before = used_bytes()
        seen, done = [before], threading.Event()

        def watch() -> None:
            while not done.is_set():
                seen.append(used_bytes())
                time.sleep(0.02)

        watcher = threading.Thread(target=watch)
        watcher.start()
        command = [sys.executable, "-c", RUN, folder, str(parse_size(options.limit)), str(options.tokens)]
        code = subprocess.run(command, check=False).returncode
        done.set()
        watcher.join()
        peak = max(seen) - before
        kept = code == 0 and peak <= parse_size(options.limit)
        print(
            f"the device's use grew by {size_text(peak)} at most; the limit of {options.limit} is "
            f"{'kept' if kept else 'BROKEN'}"
        )
        refused = [
            sys.executable,
            "-m",
            "mistralcli",
            "run",
            "hello",
            "-m",
            folder,
            "--memory-limit",
            "4.5GB",
        ]
        print(
            f"4.5GB is refused with exit code {subprocess.run(refused, check=False).returncode}; 7 is right"
        )


if __name__ == "__main__":
    main()
