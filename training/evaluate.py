"""Judge a build of the demo model on everything that its card says.

    python -m training.evaluate MODEL_DIR --base BF16_DIR --out results.json      eight minutes on one core

1. The 100 held-out prompts at temperature 0.7, prompt i with seed i, by the code that `mistral chat` runs on.
2. With `--base`, the losses on held-out text of the build and of the model that it was made from.
3. The loss by position in documents of 2,000 tokens, with the rolling cache and with one that never rolls.

Every prompt and answer is in the results, as it came. Exits with 1 when a bar is missed.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mistralcli.conversation import Conversation
from mistralcli.model import Transformer
from mistralcli.run_options import SamplingParams, SessionOptions
from mistralcli.session import Session, open_session
from training.corpus import Prompt, heldout_prompts
from training.judge import Reply, Transcript, judged, n_looping, scores
from training.losses import losses_by_kind, losses_by_quarter, passages, texts_by_kind

TEMPERATURE = 0.7
MAX_TOKENS = 500
LOSS_BAR = math.log(1.02)
"""How much the build's loss may be above the base's: 2 % of perplexity."""
QUARTER_BAR = math.log(1.02)
"""How much the loss of any quarter of a long document may be above that of the first."""


@dataclass(frozen=True)
class LongContext:
    """Mean losses in the four quarters of documents of 2,000 tokens."""

    rolling: list[float]
    full: list[float]


@dataclass(frozen=True)
class Results:
    """All that was measured; `base_losses` is None where no base was given. Losses in nats a token, by kind."""

    transcripts: tuple[Transcript, ...]
    losses: dict[str, float]
    base_losses: dict[str, float] | None
    long_context: LongContext


def interview(session: Session, prompt: Prompt, seed: int) -> Transcript:
    """Hold the conversation of one prompt."""
    params = SamplingParams(temperature=TEMPERATURE, seed=seed)
    conversation, replies = Conversation(), list[Reply]()
    for text, check in prompt.turns:
        conversation = conversation.add("user", text)
        completion = session.complete_chat(conversation, params, max_tokens=MAX_TOKENS)
        answer = "".join(completion)
        replies.append(judged(text, check, answer, completion.token_ids, completion.finish_reason == "stop"))
        conversation = conversation.add("assistant", answer)
    return Transcript(prompt.kind, seed, tuple(replies))


def open_on_cpu(directory: Path) -> Session:
    return open_session(directory, SessionOptions(device="cpu", dtype="float32"))


def long_context(model: Transformer, parts: list[list[int]]) -> LongContext:
    n_tokens = model.config.max_seq_len
    return LongContext(losses_by_quarter(model, parts), losses_by_quarter(model, parts, slack=n_tokens))


def evaluate(directory: Path, base: Path | None, n_prompts: int) -> Results:
    session = open_on_cpu(directory)
    asked = enumerate(heldout_prompts(n_prompts))
    transcripts = tuple(interview(session, prompt, seed) for seed, prompt in asked)
    texts = texts_by_kind(directory / "tokenizer.model")
    model = session.engine.model
    base_losses = losses_by_kind(open_on_cpu(base).engine.model, texts) if base else None
    return Results(
        transcripts, losses_by_kind(model, texts), base_losses, long_context(model, passages(texts))
    )


def missed_bars(results: Results) -> Iterator[str]:
    """What is not good enough, in words."""
    if n := n_looping(results.transcripts):
        yield f"{n} answers loop"
    for kind, score in scores(results.transcripts).items():
        if score.n and score.share < score.bar:
            yield f"{kind}: {score.n_passed} of {score.n} pass, {score.bar:.0%} must"
    if results.base_losses and results.losses["all"] - results.base_losses["all"] > LOSS_BAR:
        yield f"loss {results.losses['all']:.4f} against {results.base_losses['all']:.4f} of the base"
    rolling, full = results.long_context.rolling, results.long_context.full
    if max(rolling) - rolling[0] > QUARTER_BAR:
        yield f"the loss grows with the position: {rolling}"
    if max(abs(a - b) for a, b in zip(rolling, full, strict=True)) > 1e-3:
        yield f"the rolling cache changes the loss: {rolling} against {full}"


def report(results: Results) -> Iterator[str]:
    """The numbers, one line each."""
    yield f"{n_looping(results.transcripts)} answers loop"
    for kind, score in scores(results.transcripts).items():
        yield f"{kind}: {score.n_passed} of {score.n} pass"
    base = results.base_losses or {}
    for kind, loss in results.losses.items():
        against = f", base {base[kind]:.4f}, {math.expm1(loss - base[kind]):+.2%} perplexity" if base else ""
        yield f"loss {kind}: {loss:.4f}{against}"
    for name, quarters in asdict(results.long_context).items():
        yield f"{name} cache, by quarter: " + " ".join(f"{loss:.4f}" for loss in quarters)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the build")
    parser.add_argument("--base", type=Path, help="the model that the build was made from")
    parser.add_argument("--out", type=Path, help="write the results there, as JSON")
    parser.add_argument("--n", type=int, default=100, help="only the first N prompts")
    options = parser.parse_args()
    results = evaluate(options.model, options.base, options.n)
    if options.out:
        options.out.write_text(json.dumps(asdict(results), indent=1) + "\n")
    missed = list(missed_bars(results))
    print("\n".join([*report(results), *(f"MISSED: {line}" for line in missed)]))
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
