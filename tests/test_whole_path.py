"""A real model through the whole program: served by a loopback Hub, pulled, quantized, asked in a pipe, and scored."""

import json
import math
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hub_server import HubServer
from models import load, mean_nll
from program import MISTRAL, environment, mistral

from mistralcli.tokenizer import load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BUILDS = {
    "smol-int8": (["--bits", "8"], 1.01),
    "smol-int4-g32": (["--bits", "4", "--group-size", "32"], 1.35),
    "smol-int4-g64": (["--bits", "4", "--group-size", "64"], 1.5),
}
"""Builds, their flags, and how much larger than the original's their perplexity may be."""

ASKED = {
    "What is the capital of France?": ("France", "Paris"),
    "How many days are in a week?": ("week", "seven|7"),
}
"""Questions, a word that every answer about them has, and one that a right answer has."""

FORGETFUL = "smol-int4-g64"
"""135 million weights of 4 bits in groups of 64 say that a week has 50 days, whatever activations are rounded to."""


@dataclass(frozen=True)
class Home:
    """A user's home with the real model pulled, and what that printed."""

    path: Path
    model: Path

    def run(self, model: str, prompt: str, *flags: str) -> subprocess.CompletedProcess[str]:
        return mistral(
            "run", "-m", model, "-t", "0", *flags, home=self.path, stdin=prompt + "\n", timeout_s=600
        )


@pytest.fixture(scope="module")
def home(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    path = tmp_path_factory.mktemp("home")
    with HubServer({MODEL: smollm2_dir}) as hub:
        done = mistral("pull", MODEL, home=path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0", timeout_s=300)
    assert done.returncode == 0, done.stderr
    yield Home(path, Path(done.stdout.strip()))


def test_the_pulled_model_answers_with_the_golden_ids_in_float32(home: Home, shared_dir: Path) -> None:
    golden = json.loads((shared_dir / "data" / "smollm2_golden.json").read_text())["greedy"]
    asked = 0
    for case in golden["cases"]:
        if [message["role"] for message in case["messages"]] == ["user"]:
            asked += 1
            flags = ("--json", "--kv", "float32", "-n")
            done = home.run(MODEL, case["messages"][0]["content"], *flags, str(golden["max_new_tokens"]))
            answer = json.loads(done.stdout)
            eos = [2] if answer["finish_reason"] == "stop" else []
            assert answer["token_ids"] + eos == case["output_ids"]
    assert asked >= 3


def ids_of(model: Path, text: Path) -> list[int]:
    return load_tokenizer(model).encode(text.read_text(encoding="utf-8")[:20_000])[:2048]


@pytest.mark.parametrize("name", BUILDS)
def test_a_build_is_small_answers_in_a_pipe_and_keeps_the_perplexity(
    name: str, home: Home, shared_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, limit = BUILDS[name]
    made = mistral("quantize", MODEL, "-o", name, *flags, home=home.path, timeout_s=600)
    assert made.returncode == 0, made.stderr
    answers = {prompt: home.run(name, prompt, "-n", "60", "-q").stdout for prompt in ASKED}
    text = shared_dir / "data" / "text" / "wikitext-2" / "test.txt"
    build = home.path / "data" / "mistral" / "models" / name
    original, quantized = (mean_nll(load(model), ids_of(model, text)) for model in (home.model, build))
    ratio = math.exp(quantized - original)
    with capsys.disabled():
        print(f"\n{name}: perplexity {math.exp(quantized):.3f}, {ratio:.4f} times the original's")
        print(f"  {made.stderr.splitlines()[-1]}")
        for prompt, answer in answers.items():
            print(f"  {prompt} {answer.strip()}")
    assert ratio < limit
    for prompt, (topic, right) in ASKED.items():
        expected = topic if name == FORGETFUL else right
        assert any(word in answers[prompt] for word in expected.split("|")), answers[prompt]


def test_an_answer_in_a_shell_pipe_can_be_cut_short(home: Home) -> None:
    script = f'echo "Tell me about the sea." | {" ".join(MISTRAL)} run -q -m {MODEL} | head -c 5'
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, env=environment(home.path), timeout=120
    )
    assert len(done.stdout) == 5 and done.stderr == b""
