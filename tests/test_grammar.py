"""Constrained decoding: whatever the model would rather say, the answer is a sentence of the grammar."""

import json
import re

import pytest
import torch
from tokenizer_files import official_file

from mistralcli.errors import UsageError
from mistralcli.grammar import compile_constraint
from mistralcli.mistral_tokenizer import MistralTokenizer
from mistralcli.run_options import SamplingParams
from mistralcli.sampling import Sampler

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "n": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["name", "n"],
    "additionalProperties": False,
}
NAMES = {"spm": "mistral_instruct_tokenizer_240323.model.v3", "tekken": "tekken_240911.json"}


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> MistralTokenizer:
    return MistralTokenizer(official_file(NAMES[request.param]))


def random_answer(
    tokenizer: MistralTokenizer, kind: str, source: str, seed: int, most: int = 200
) -> tuple[str, bool]:
    """What a model of random opinions says under the constraint, and whether that is whole."""
    constraint = compile_constraint(kind, source, tokenizer, tokenizer.eos_ids)  # type: ignore[arg-type]
    choose = constraint.around(Sampler(SamplingParams(temperature=1.0, seed=seed)))
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for _ in range(most):
        # The head is wider than the vocabulary, as some are.
        token_id = choose(torch.randn(tokenizer.vocab_size + 8, generator=generator), ids)
        if token_id in tokenizer.eos_ids:
            break
        ids.append(token_id)
    return tokenizer.stream(continues_text=True).decode(ids), constraint.is_complete


@pytest.mark.parametrize("seed", range(4))
def test_json_fits_its_schema(tokenizer: MistralTokenizer, seed: int) -> None:
    text, is_complete = random_answer(tokenizer, "schema", json.dumps(SCHEMA), seed)
    assert is_complete
    found = json.loads(text)
    assert set(found) == {"name", "n"} and len(found["name"]) <= 8 and found["n"] in range(10)


@pytest.mark.parametrize(
    "pattern", ["(yes|no)", "[A-Z][a-z]{2,5} [0-9]{2}", "é{1,3}ü?", "  two spaces first"]
)
def test_text_matches_its_expression_from_the_first_character_on(
    tokenizer: MistralTokenizer, pattern: str
) -> None:
    text, is_complete = random_answer(tokenizer, "regex", pattern, seed=1)
    assert is_complete and re.fullmatch(pattern, text)


def test_a_grammar_in_larks_notation_is_kept_to(tokenizer: MistralTokenizer) -> None:
    text, is_complete = random_answer(tokenizer, "grammar", 'start: "a" ("," "b"){2} /[0-9]/', seed=2)
    assert is_complete and re.fullmatch("a,b,b[0-9]", text)


def test_an_answer_that_is_cut_off_is_not_whole(tokenizer: MistralTokenizer) -> None:
    assert not random_answer(tokenizer, "regex", "[a-z]{300}", seed=1, most=5)[1]


@pytest.mark.parametrize(
    ("kind", "source"),
    [("schema", "{"), ("schema", '{"type": 3}'), ("regex", "[a-z"), ("grammar", "start: b")],
)
def test_what_is_no_grammar_is_refused_in_one_line(
    tokenizer: MistralTokenizer, kind: str, source: str
) -> None:
    with pytest.raises(UsageError, match=f"the {kind} cannot be") as refusal:
        compile_constraint(kind, source, tokenizer, tokenizer.eos_ids)  # type: ignore[arg-type]
    assert "\n" not in refusal.value.message
