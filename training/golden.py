"""Write the golden completion of a model beside its weights, for `mistral doctor` to replay.

    python -m training.golden DIR      writes DIR/golden.json; a second or two on two cores

Greedy, in float32 on the CPU, by the reference operators: every kernel on every device is held to it. The end of the
answer, when it comes, is its last id.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mistralcli.conversation import Conversation
from mistralcli.doctor.golden import GOLDEN_FILE, Golden
from mistralcli.run_options import SessionOptions
from mistralcli.session import Session, open_session

PROMPT = "Tell me a story about a fox."
MAX_TOKENS = 96


def make_golden(session: Session, prompt: str = PROMPT, max_tokens: int = MAX_TOKENS) -> Golden:
    """The session's greedy answer, with how far each id's logit was above the second highest."""
    prompt_ids = session.tokenizer.encode_chat(Conversation().add("user", prompt))
    completion_ids: list[int] = []
    gaps: list[float] = []

    def choose(logits: torch.Tensor, so_far: Sequence[int]) -> int:
        (first, second), (token_id, _) = (part.tolist() for part in logits.topk(2))
        completion_ids.append(token_id)
        gaps.append(round(first - second, 4))
        return int(token_id)

    for _ in session.engine.generate(prompt_ids, choose, stop_ids=session.stop_ids, max_tokens=max_tokens):
        pass
    return Golden(prompt_ids, completion_ids, gaps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    os.environ["MISTRAL_CLI_KERNELS"] = "reference"  # read when an operator is first called
    session = open_session(options.directory, SessionOptions(device="cpu", dtype="float32"))
    golden = make_golden(session)
    (options.directory / GOLDEN_FILE).write_text(json.dumps(asdict(golden)) + "\n")
    print(session.tokenizer.decode(golden.completion_ids))


if __name__ == "__main__":
    main()
