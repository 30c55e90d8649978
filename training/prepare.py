"""Sample the corpus and tokenize it, in parallel.

    python -m training.prepare TOKENIZER OUT_DIR --millions 300 --workers 16      a minute on 16 cores

writes OUT_DIR/train.npy and OUT_DIR/heldout.npy (uint16 token ids of whole conversations, one after the other), the
tokenizer, and corpus.json, which says how much it is. Each part is sampled with its own seed, so the same command gives
the same corpus; parts that are there already are kept, so start anew in an empty directory when the corpus changed.
"""

import argparse
import hashlib
import json
import multiprocessing
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from training.corpus import conversations, heldout_text
from training.encoding import BOS, CORPUS_FILE, TOKENIZER_FILE, encode

PART_TOKENS = 500_000
FIRST_SEED = 1000
"""Part p is sampled with seed FIRST_SEED + p."""
N_HELDOUT = 2000
MOST_REPEATS = 3


def save(path: Path, ids: list[int] | np.ndarray) -> None:
    """Write token ids as uint16; a file that is there is whole."""
    partial = path.with_suffix(".partial.npy")
    np.save(partial, np.asarray(ids, dtype=np.uint16))
    partial.rename(path)


def part_path(directory: Path, number: int) -> Path:
    return directory / f"part-{number:04}.npy"


def repeats_itself(ids: list[int]) -> bool:
    """Whether a run of 4 ids comes more than 3 times. A model repeats more than it has read, and 5 times are a loop."""
    return max(Counter(zip(ids, ids[1:], ids[2:], ids[3:], strict=False)).values(), default=0) > MOST_REPEATS


def write_part(job: tuple[Path, Path, int]) -> None:
    """Sample and tokenize one part into its file, unless it is there."""
    tokenizer, directory, number = job
    path = part_path(directory, number)
    if path.exists():
        return
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    ids: list[int] = []
    for one in conversations(FIRST_SEED + number):
        conversation = encode(processor, one.turns)
        if repeats_itself(conversation):
            continue
        ids += conversation
        if len(ids) >= PART_TOKENS:
            break
    save(path, ids)


def heldout_ids(tokenizer: Path, n_conversations: int) -> list[int]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    return [token for one in heldout_text(n_conversations) for token in encode(processor, one.turns)]


def prepare(
    tokenizer: Path, directory: Path, n_parts: int, n_workers: int, n_heldout: int = N_HELDOUT
) -> dict[str, Any]:
    """Write all files; returns what corpus.json says."""
    directory.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(n_workers) as pool:
        pool.map(write_part, [(tokenizer, directory, number) for number in range(n_parts)], chunksize=1)
    train = np.concatenate([np.load(part_path(directory, number)) for number in range(n_parts)])
    heldout = heldout_ids(tokenizer, n_heldout)
    save(directory / "train.npy", train)
    save(directory / "heldout.npy", heldout)
    shutil.copyfile(tokenizer, directory / TOKENIZER_FILE)
    facts = {
        "train_tokens": len(train),
        "train_conversations": int((train == BOS).sum()),
        "train_sha256": hashlib.sha256(train.tobytes()).hexdigest(),
        "heldout_tokens": len(heldout),
        "first_seed": FIRST_SEED,
        "n_parts": n_parts,
    }
    (directory / CORPUS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--millions", type=float, default=300, help="millions of tokens")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args()
    n_parts = max(1, round(options.millions * 1_000_000 / PART_TOKENS))
    facts = prepare(options.tokenizer, options.out, n_parts, options.workers)
    print(f"{facts['train_tokens'] / 1e6:.1f} million training tokens, {facts['heldout_tokens']} held-out")


if __name__ == "__main__":
    main()
