"""Train the demo's SentencePiece tokenizer on a sample of the corpus.

    python -m training.tokenizer OUT_DIR      writes OUT_DIR/tokenizer.model; 30 s on two cores

Byte-pair pieces with byte fallback, digits apart, the text as it is (no normalization), and the control tokens of
Mistral's v3 vocabulary behind <unk>, <s> and </s>, so that the v3 instruct template applies.
"""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import sentencepiece

from training.corpus import conversations
from training.encoding import TOKENIZER_FILE
from training.stories.words import kinds, things

VOCAB_SIZE = 4096
SEED = 1
N_CONVERSATIONS = 60_000
NAMED_TIMES = 1000
"""How often every hero and object is added, so that each of its words is one piece: a story names them often, and the
words that are in few conversations would else be three or four pieces each."""
CONTROL = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
CONTROL += ["[/TOOL_RESULTS]", "[IMG]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"]


def sampled_lines(n_conversations: int = N_CONVERSATIONS) -> Iterator[str]:
    """The lines of the first conversations of seed SEED, and the names of all that stories are about."""
    for one in islice(conversations(SEED), n_conversations):
        for turn in one.turns:
            for text in turn:
                yield from filter(None, text.split("\n"))
    for name in (*kinds(), *things()):
        yield from [f"the {name}"] * NAMED_TIMES


def train(lines: Iterator[str], directory: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """Train on `lines`; returns the path of the tokenizer.model that was written."""
    directory.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(directory / "tokenizer"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=CONTROL,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    return directory / TOKENIZER_FILE


if __name__ == "__main__":
    print(train(sampled_lines(), Path(sys.argv[1])))
