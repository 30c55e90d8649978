"""Write the model card and the record of what the model said.

    python -m training.card RESULTS.json --build mistralcli/demo_model --original training/original \\
        --out mistralcli/demo_model/README.md --transcripts docs/demo.md

RESULTS.json is what training.evaluate wrote. Sizes and shapes come from the two checkpoints, how it was made from the
original's training.json: the same files give the same card.
"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluate import LOSS_BAR, MAX_TOKENS, TEMPERATURE, LongContext, Results
from training.judge import BARS, LOOP_N, LOOP_TIMES, LOOP_TOKENS, Reply, Transcript, n_looping, scores
from training.train import LOG_FILE

NAMES = {"story": "Stories", "question": "Questions", "chat": "Chats of three turns"}

INTRODUCTION = """\
A small Mistral that comes with `mistral`, so that there is something to run before any model is pulled:

    mistral run "Tell me a story about a fox."

Everything in it is this project's own: the texts it learned from were written for it, none is copied from elsewhere,
and it was trained from nothing, quantized and judged with the tools in this repository."""

CAN = """\
- Short stories about an animal or a person and a thing that you name.
- Everyday questions: the sky, seasons, animals, the body, the kitchen, numbers, words, tools, manners, `mistral`.
- Small talk, jokes, lists of tips, changing or correcting one sentence, small sums.
- Follow-ups within a chat: why, shorter, what happened next, another one, a name that you told it. What is more
  than a few hundred tokens back is often lost."""

CANNOT = """\
- It knows only what was written for it. Asked for anything else, it may say so, or be wrong with confidence.
- No news, no code, no languages but English, no sums beyond small ones.
- Nothing that it says about health, law or money is advice.
- System prompts change little: it has met only general ones. For real work, `mistral pull` a real model."""


@dataclass(frozen=True)
class Facts:
    """All that the card states."""

    results: Results
    config: dict[str, Any]
    quantization: dict[str, Any]
    training: dict[str, Any]
    build_bytes: int
    original_bytes: int


def read_results(path: Path) -> Results:
    raw = json.loads(path.read_text(encoding="utf-8"))
    transcripts = tuple(
        Transcript(one["kind"], one["seed"], tuple(Reply(**reply) for reply in one["replies"]))
        for one in raw["transcripts"]
    )
    return Results(transcripts, raw["losses"], raw["base_losses"], LongContext(**raw["long_context"]))


def read_facts(results: Path, build: Path, original: Path) -> Facts:
    def read(path: Path) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content

    return Facts(
        read_results(results),
        read(build / "config.json"),
        read(build / "quantization_card.json"),
        read(original / LOG_FILE),
        weight_bytes(build),
        weight_bytes(original),
    )


def weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.2f} MB"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right."""
    names = list(head)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shape(facts: Facts) -> str:
    """The architecture, in one paragraph."""
    config, training = facts.config, facts.training
    return (
        f"{training['parameters'] / 1e6:.2f} million parameters: {config['num_hidden_layers']} layers of width "
        f"{config['hidden_size']} (feed-forward {config['intermediate_size']}), "
        f"{config['num_attention_heads']} heads that share {config['num_key_value_heads']} keys and values of "
        f"{config['head_dim']}, RMSNorm, RoPE, SwiGLU, a sliding window of {config['sliding_window']} in a context "
        f"of {config['max_position_embeddings']}, and {config['vocab_size']} SentencePiece tokens, whose embedding "
        "is also the head. Chats are in Mistral's v3 format."
    )


def sizes(facts: Facts) -> str:
    quantization = facts.quantization
    error = quantization["gate"]["worst_error"]
    return (
        f"This build is {quantization['scheme']} ({megabytes(facts.build_bytes)} of weights, "
        f"{quantization['bits_per_weight']['quantized']:.2f} bits for each quantized one, largest relative error of a "
        f"tensor {error:.3f}). The bf16 original ({megabytes(facts.original_bytes)}) is in `training/original` "
        "of the repository."
    )


def score_table(results: Results) -> str:
    """Each kind with how many passed and how many must."""
    rows = (
        (NAMES[kind], str(score.n), str(score.n_passed), f"{score.bar:.0%}" if score.bar else "none")
        for kind, score in scores(results.transcripts).items()
    )
    return table(("held-out prompts", "asked", "pass", "bar"), rows)


def loss_table(results: Results) -> str:
    """Losses of both models in nats a token, and the difference in perplexity."""
    base = results.base_losses or {}
    rows = []
    for kind, loss in results.losses.items():
        before = f"{base[kind]:.4f}" if kind in base else "not measured"
        change = f"{math.expm1(loss - base[kind]):+.2%}" if kind in base else ""
        rows.append((kind, before, f"{loss:.4f}", change))
    return table(("held-out text", "bf16", "this build", "perplexity"), rows)


def context_table(results: Results) -> str:
    quarters = results.long_context
    rows = (
        (name, *(f"{loss:.4f}" for loss in losses))
        for name, losses in (
            ("the rolling cache", quarters.rolling),
            ("a cache that never rolls", quarters.full),
        )
    )
    return table(("loss in tokens", "1–500", "501–1000", "1001–1500", "1501–2000"), rows)


def making(training: dict[str, Any]) -> str:
    """How it was trained, in one paragraph."""
    corpus = training["corpus"]
    return (
        f"{training['steps']:,} steps of {training['step_tokens']:,} tokens, {training['tokens'] / 1e6:,.0f} million "
        f"in all, drawn from {corpus['train_tokens'] / 1e6:,.0f} million sampled ones "
        f"({corpus['train_conversations']:,} conversations), in {training['seconds'] / 60:.1f} minutes on one "
        f"{training['device']} with torch {training['torch']}. "
        f"In the last {training['quantized_share']:.0%} of the steps the linears computed with their int4 weights. "
        "`training/README.md` has every command; the corpus is the same for the same seeds, the weights are not to "
        "the last bit, since a GPU's sums are not."
    )


def card(facts: Facts) -> Iterator[str]:
    """The card's paragraphs."""
    results = facts.results
    looping = n_looping(results.transcripts)
    yield "---\nlicense: apache-2.0\nlanguage: en\npipeline_tag: text-generation\n---"
    yield "# The demo model of mistral-cli"
    yield from (INTRODUCTION, shape(facts), sizes(facts))
    yield from ("## What it can do", CAN, "## What it can't", CANNOT)
    yield "## How good it is"
    yield (
        f"Each prompt is held out: stories whose hero and object (or plot) never met in training, questions in words "
        f"never seen, chats of three turns. Temperature {TEMPERATURE}, prompt i with seed i, at most {MAX_TOKENS} "
        "tokens, this build on a CPU. A story passes when its hero and object are those asked for, to the end; an "
        "answer when it has the key facts that were written down for it; a chat when all three turns do. All "
        "prompts with all answers are in `docs/demo.md` of the repository, the bad ones too. Four earlier sets of "
        "100 were read while the corpus was improved; this one has judged no other model. Its questions' key facts "
        "were reviewed before any model had answered them: what the phrasing does not ask for is none."
    )
    yield score_table(results)
    yield (
        f"{looping} answers loop (a run of {LOOP_N} tokens more than {LOOP_TIMES} times in {LOOP_TOKENS}). "
        "What passes was counted by rules, which see names and facts, not sense."
    )
    yield loss_table(results)
    yield (
        "Held-out stories have pairs of hero and object, and held-out questions phrasings, that training never has; "
        "the other kinds are sampled anew, and short ones among them also occur in training. "
        f"Losses are in nats a token, computed in float32; the bar for all text is {math.expm1(LOSS_BAR):.0%} of "
        "perplexity. In documents of 2,000 tokens, the same text in every quarter:"
    )
    yield context_table(results)
    yield from ("## How it was made", making(facts.training))
    yield "## Licence\n\nApache-2.0, like the rest of this project."


def fenced(text: str) -> str:
    """The text in a fence that is longer than any row of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def verdict(reply: Reply) -> str:
    problems = [
        words for words, bad in (("loops", reply.loops), ("has no end", not reply.finished)) if bad
    ] or ["does not pass"]
    return "passes" if reply.passed else ", ".join(problems)


def transcript_parts(number: int, one: Transcript) -> Iterator[str]:
    yield f"### {number}. {one.kind.capitalize()}, seed {one.seed}"
    for reply in one.replies:
        yield fenced(f"> {reply.prompt}")
        yield fenced(reply.answer)
        yield f"{reply.n_tokens} tokens; {verdict(reply)}."


def transcripts(results: Results) -> Iterator[str]:
    """All that was asked and answered, in order, with what each kind scored."""
    yield "# What the demo model says"
    yield (
        f"All {len(results.transcripts)} held-out prompts and all answers as they came, none left out. "
        f"Temperature {TEMPERATURE}; the seed of each stands with it. Written by `python -m training.card`."
    )
    yield score_table(results)
    kinds = {kind: [one for one in enumerate(results.transcripts, 1) if one[1].kind == kind] for kind in BARS}
    for kind, found in kinds.items():
        if found:
            yield f"## {NAMES[kind]}"
        for number, one in found:
            yield from transcript_parts(number, one)


def write(path: Path, parts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--build", type=Path, default=Path("mistralcli/demo_model"))
    parser.add_argument("--original", type=Path, default=Path("training/original"))
    parser.add_argument("--out", type=Path, help="the card; BUILD/README.md unless given")
    parser.add_argument("--transcripts", type=Path, default=Path("docs/demo.md"))
    options = parser.parse_args()
    facts = read_facts(options.results, options.build, options.original)
    write(options.out or options.build / "README.md", card(facts))
    write(options.transcripts, transcripts(facts.results))


if __name__ == "__main__":
    main()
