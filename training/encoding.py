"""Conversations as token ids, and the files that one step leaves for the next."""

import sentencepiece

BOS, EOS = 1, 2
INST, END_INST = 3, 4
CORPUS_FILE = "corpus.json"
TOKENIZER_FILE = "tokenizer.model"


def encode(processor: sentencepiece.SentencePieceProcessor, turns: list[tuple[str, str]]) -> list[int]:
    """A conversation as Mistral's v3 instruct template has it."""
    ids = [BOS]
    for question, answer in turns:
        ids += [INST, *processor.encode(question), END_INST, *processor.encode(answer), EOS]
    return ids
