"""How much faster `mistral run --batch -j 8` answers than `-j 1`, as a user runs both: start-up and loading included.

    python benchmarks/cpu_batch.py [MODEL] [--prompts 32] [--tokens 96] [--jobs 1 8] [--rounds 3] [--threads N]

Processes take turns. Shown are the medians of the seconds from start to end and of the processor's seconds, tokens/s,
how often more than the first, and how many answers are the same as the first's. Prompts are of different lengths, and
some answers end before --tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

from mistralcli.demo import demo_directory

FORMS = (
    "Write a short story about {}.",
    "Explain {} in simple words.",
    "List five facts about {} and say why they matter.",
    "You are writing for a school newspaper. Describe {} in a few paragraphs, with a first line that draws readers in.",
    "What would you ask somebody who knows all about {}?",
    "Compare {} with something from daily life, and then say where the comparison fails.",
)
TOPICS = (
    *("the sea", "a mountain village", "how bread is made", "why the sky is blue", "the history of printing"),
    *("a robot who dreams", "photosynthesis", "a lost dog", "how computers add numbers", "gravity", "rain"),
    *(
        "a letter to a friend",
        "jazz",
        "a fox and a crow",
        "prime numbers",
        "old maps",
        "the moon",
        "bicycles",
    ),
    *("a lighthouse", "tea", "clocks", "the desert", "snow", "a small theatre"),
)


def write_prompts(path: Path, n_prompts: int) -> None:
    texts = (form.format(topic) for topic, form in product(TOPICS, FORMS))
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in islice(texts, n_prompts)))


def run_batch(
    model: str, prompts: Path, output: Path, jobs: int, tokens: int, threads: int | None
) -> tuple[float, float]:
    """Seconds from start to end, and of all processors together."""
    command = [
        sys.executable,
        "-m",
        "mistralcli",
        "run",
        "-q",
        "-m",
        model,
        "--batch",
        str(prompts),
        "-n",
        str(tokens),
    ]
    command += ["-o", str(output), "-j", str(jobs)] + ([] if threads is None else ["--threads", str(threads)])
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True)
    after, elapsed_s = os.times(), time.perf_counter() - started
    taken = after.children_user + after.children_system - before.children_user - before.children_system
    return elapsed_s, taken


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default=str(demo_directory()))
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.prompts > len(FORMS) * len(TOPICS):
        parser.error(f"there are {len(FORMS) * len(TOPICS)} prompts")
    taken: dict[int, list[tuple[float, float]]] = {jobs: [] for jobs in given.jobs}
    answers: dict[int, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "in.jsonl"
        write_prompts(prompts, given.prompts)
        for _, jobs in product(range(given.rounds), given.jobs):
            output = Path(folder) / "out.jsonl"
            taken[jobs].append(run_batch(given.model, prompts, output, jobs, given.tokens, given.threads))
            answers[jobs] = [json.loads(line) for line in output.read_text().splitlines()]
            output.unlink()
    speeds: list[tuple[float, float]] = []
    for jobs, seconds in taken.items():
        elapsed_s, processor_s = (statistics.median(one) for one in zip(*seconds, strict=True))
        n_tokens = sum(one["usage"]["completion_tokens"] for one in answers[jobs])  # type: ignore[index]
        n_same = sum(one == other for one, other in zip(answers[jobs], answers[given.jobs[0]], strict=True))
        speeds.append((n_tokens / elapsed_s, n_tokens / processor_s))
        more, of_processor = (own / first for own, first in zip(speeds[-1], speeds[0], strict=True))
        print(
            f"-j {jobs}: {elapsed_s:.1f} s, processor {processor_s:.1f} s, {n_tokens} tokens, {speeds[-1][0]:.1f}/s,"
            f" {more:.2f} times (processor {of_processor:.2f}), {n_same} of {given.prompts} answers the same"
        )


if __name__ == "__main__":
    main()
