"""How fast a loaded model answers many prompts, by how many are decoded together: `complete_all` without start-up.

    python benchmarks/gpu_batch.py MODEL [--prompts 64] [--tokens 128] [--jobs 1 8 16] [--rounds 3] [--top-p 1]

Each number of sequences has a process of its own, and a first round that is not counted: it compiles and captures.
Shown are the medians: tokens/s and how often more than the first; milliseconds for a prompt, from a round whose answers
have one token; and how many answers are the same as the first's, which kernels for other numbers of rows round
differently.
"""

import argparse
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

from cpu_batch import FORMS, TOPICS

from mistralcli.batch import Answer, Job, complete_all
from mistralcli.conversation import parse_messages
from mistralcli.run_options import SamplingParams, SessionOptions
from mistralcli.session import Session, open_session


@dataclass(frozen=True)
class Task:
    """What one process measures. `top_p`: of the sampling, at temperature 0.7."""

    model: str
    n_seqs: int
    n_prompts: int
    n_tokens: int
    rounds: int
    top_p: float
    ctx: int


@dataclass(frozen=True)
class Measured:
    tokens_per_s: float
    prompt_ms: float
    answers: list[list[int]]


def jobs_of(session: Session, task: Task, n_tokens: int) -> list[Job]:
    texts = (form.format(topic) for topic, form in product(TOPICS, FORMS))
    return [
        Job(
            index,
            session.tokenizer.encode_chat(parse_messages([{"role": "user", "content": text}])),
            SamplingParams(0.7, top_p=task.top_p, seed=index),
            max_tokens=n_tokens,
        )
        for index, text in enumerate(islice(texts, task.n_prompts))
    ]


def timed(session: Session, jobs: list[Job]) -> tuple[float, list[Answer]]:
    """Seconds, and the answers in order."""
    started = time.perf_counter()
    found = list(complete_all(session, jobs))
    elapsed_s = time.perf_counter() - started
    for one in found:
        if one.error is not None:
            raise one.error
    return elapsed_s, sorted(found, key=lambda one: one.index)


def measure(task: Task) -> Measured:
    session = open_session(Path(task.model), SessionOptions(ctx=task.ctx, n_seqs=task.n_seqs))
    jobs, short = (jobs_of(session, task, n_tokens) for n_tokens in (task.n_tokens, 1))
    timed(session, jobs)
    speeds, prompt_s = [], []
    for _ in range(task.rounds):
        elapsed_s, answers = timed(session, jobs)
        speeds.append(sum(len(one.token_ids) for one in answers) / elapsed_s)
        prompt_s.append(timed(session, short)[0] / len(short))
    ids = [one.token_ids for one in answers]
    return Measured(statistics.median(speeds), statistics.median(prompt_s) * 1e3, ids)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--ctx", type=int, default=2048)
    given = parser.parse_args()
    if given.prompts > len(FORMS) * len(TOPICS):
        parser.error(f"there are {len(FORMS) * len(TOPICS)} prompts")
    tasks = [
        Task(given.model, n_seqs, given.prompts, given.tokens, given.rounds, given.top_p, given.ctx)
        for n_seqs in given.jobs
    ]
    first: Measured | None = None
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for task, own in zip(tasks, pool.imap(measure, tasks), strict=True):
            first = first or own
            n_same = sum(mine == other for mine, other in zip(own.answers, first.answers, strict=True))
            print(
                f"-j {task.n_seqs}: {own.tokens_per_s:.1f} tok/s, {own.tokens_per_s / first.tokens_per_s:.2f} times,"
                f" {own.prompt_ms:.1f} ms a prompt, {n_same} of {task.n_prompts} answers the same",
                flush=True,
            )


if __name__ == "__main__":
    main()
