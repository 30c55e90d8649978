"""`mistral doctor`: what it prints, and what it finds in installations that are broken on purpose."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pexpect
import pytest
import torch
from conftest import REPOSITORY
from hub_server import TOKEN
from program import MISTRAL, environment, mistral

import mistralcli.ops
import quant.ops
from mistralcli.doctor import Context, examine
from mistralcli.doctor.bandwidth import TOKEN_BYTES_7B
from mistralcli.doctor.cases import cases
from mistralcli.doctor.findings import Finding, guarded
from mistralcli.doctor.golden import Golden, check_demo, examine_demo, judge, read_golden
from mistralcli.errors import IntegrityError
from quant.registry import all_ops
from quant.schemes.affine import Affine


def doctor(installation: Path, home: Path, *flags: str, **env: str) -> dict[str, dict[str, Any]]:
    """What `mistral doctor --json` prints, by name; the exit code agrees with it, and there is no traceback."""
    done = mistral("doctor", "--json", *flags, home=home, PYTHONPATH=str(installation), **env)
    found = by_name(done.stdout)
    assert done.returncode == any(one["status"] == "problem" for one in found.values())
    assert "Traceback" not in done.stderr
    return found


def by_name(printed: str | bytes) -> dict[str, dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(printed)
    named = {one["name"]: one for one in found}
    assert len(named) == len(found)
    return named


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def demo(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with its golden completion, made by the recipe; treat it as read-only."""
    directory = tmp_path_factory.mktemp("demo") / "demo_model"
    shutil.copytree(tiny_model_dir, directory)
    recipe = [sys.executable, "-m", "training.golden", str(directory)]
    subprocess.run(recipe, check=True, env=environment(directory), cwd=REPOSITORY, capture_output=True)
    return directory


@pytest.fixture(scope="module")
def installation(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the packages, with that model as the demo; treat it as read-only."""
    folder = tmp_path_factory.mktemp("site-packages")
    for package in ("mistralcli", "quant"):
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("demo_model"))
    shutil.copytree(demo, folder / "mistralcli" / "demo_model")
    return folder


@pytest.fixture
def own_installation(installation: Path, tmp_path: Path) -> Path:
    """A copy of it that may be broken."""
    return Path(shutil.copytree(installation, tmp_path / "site-packages"))


@pytest.fixture(scope="module")
def usual(installation: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What is found offline in an installation that is whole."""
    return doctor(installation, tmp_path_factory.mktemp("home"), "--offline")


def test_a_whole_installation_has_no_problem_and_every_finding_has_four_fields(
    usual: dict[str, dict[str, Any]],
) -> None:
    for finding in usual.values():
        assert set(finding) == {"name", "status", "message", "hint"}
        assert finding["status"] in ("ok", "note"), finding
    for name in ("python", "torch", "memory", "cache", "models", "mistral", "hub", "token", "demo (cpu)"):
        assert name in usual
    assert any(name.startswith("cuda") for name in usual)


def test_the_demo_says_its_golden_completion_again(usual: dict[str, dict[str, Any]]) -> None:
    assert re.match(r"9\d of 96 tokens as they should be", usual["demo (cpu)"]["message"])


def test_every_operator_is_examined_and_those_with_a_kernel_name_it_and_its_error(
    usual: dict[str, dict[str, Any]],
) -> None:
    assert mistralcli.ops and quant.ops
    for one in all_ops().values():
        message = usual[f"{one.name} (cpu)"]["message"]
        if "cpu" in one.kernels:
            assert re.match(rf"{one.kernels['cpu']}, max error [\d.e+-]+ \(at most 1e-05\)$", message)
        else:
            assert message.startswith("plain PyTorch")


def test_bandwidth_is_measured_and_gives_the_speed_it_allows(usual: dict[str, dict[str, Any]]) -> None:
    message = usual["bandwidth (cpu)"]["message"]
    parts = re.match(r"([\d.]+) GB/s .*: at most ([\d.e+]+) tokens/s .*\(3\.73 GB a token\)$", message)
    assert parts is not None, message
    assert float(parts[2]) == pytest.approx(float(parts[1]) * 1e9 / TOKEN_BYTES_7B, rel=0.02)


def test_the_bytes_of_a_7b_token_are_those_of_its_int4_build() -> None:
    def size(scheme: Affine, out_features: int, in_features: int) -> int:
        specs = scheme.specs(out_features, in_features, torch.bfloat16)
        return specs["weight_packed"].nbytes + specs["weight_scale"].nbytes

    query_and_out, key_and_value = [(4096, 4096)] * 2, [(1024, 4096)] * 2
    gate_up_and_down = [(14336, 4096)] * 2 + [(4096, 14336)]
    layers = 32 * sum(
        size(Affine(4, 128), *shape) for shape in query_and_out + key_and_value + gate_up_and_down
    )
    assert pytest.approx(layers + size(Affine(8), 32768, 4096), rel=2e-4) == TOKEN_BYTES_7B


def test_every_operator_has_cases() -> None:
    assert mistralcli.ops and quant.ops
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        made = cases(dtype)
        for name, one in all_ops().items():
            for case in made[name]:
                out = one.reference(*case)
                expected = torch.float32 if one.name == "tied_logits" else dtype  # as all logits
                assert isinstance(out, torch.Tensor) and out.dtype == expected and out.isfinite().all()


@pytest.mark.parametrize("wrong", ["2 * out", "out * float('nan')"])
def test_a_kernel_that_is_wrong_is_a_problem(wrong: str, own_installation: Path, tmp_path: Path) -> None:
    edit(
        own_installation / "mistralcli/kernels/sdpa.py",
        "out.masked_fill((seen.positions < 0)[:, None, :, None], 0.0)",
        wrong,
    )
    found = doctor(own_installation, tmp_path, "--offline")
    assert found["attention (cpu)"]["status"] == found["demo (cpu)"]["status"] == "problem"
    assert "MISTRAL_CLI_KERNELS=reference" in found["attention (cpu)"]["hint"]


def test_a_kernel_that_cannot_be_imported_is_a_problem_and_the_other_operators_are_examined(
    own_installation: Path, tmp_path: Path
) -> None:
    edit(
        own_installation / "mistralcli/kernels/sdpa.py",
        "import torch\n",
        "import no_such_compiler\nimport torch\n",
    )
    found = doctor(own_installation, tmp_path, "--offline")
    assert found["attention (cpu)"]["status"] == "problem"
    assert "no_such_compiler" in found["attention (cpu)"]["message"]
    assert found["swiglu (cpu)"]["status"] == "ok"


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda demo: (demo / "golden.json").unlink(), "golden.json missing"),
        (lambda demo: (demo / "golden.json").write_text("{"), "cannot be read as JSON"),
        (lambda demo: os.truncate(demo / "model.safetensors", 1000), "is not a whole safetensors file"),
    ],
    ids=["a file is missing", "golden.json is cut off", "the weights are cut off"],
)
def test_a_damaged_demo_is_a_problem(damage: Any, part: str, demo: Path, tmp_path: Path) -> None:
    own_demo = Path(shutil.copytree(demo, tmp_path / "demo_model"))
    damage(own_demo)
    found = list(guarded("demo", partial(examine_demo, own_demo)))
    assert found
    for one in found:
        assert one.status == "problem" and part in one.message and "reinstall" in str(one.hint)


def test_another_choice_is_a_problem_only_where_the_golden_lead_is_above_the_bound() -> None:
    golden = Golden([1], [5, 6, 7], [3.0, 0.0004, 0.2])
    assert judge("demo", golden, [5, 6, 7], 1e-3).status == "ok"
    close = judge("demo", golden, [5, 9, 7], 1e-3)
    assert close.status == "ok" and close.message.startswith("2 of 3 tokens")
    wrong = judge("demo", golden, [5, 9, 8], 1e-3)
    assert wrong.status == "problem" and "token 2: 8 instead of 7, which leads by 0.2" in wrong.message


@pytest.mark.parametrize(
    "content",
    [
        {"prompt_ids": [1], "completion_ids": [2]},
        {"prompt_ids": [1], "completion_ids": [2], "gaps": []},
        {"prompt_ids": [1], "completion_ids": 2, "gaps": 3},
        {"prompt_ids": [1], "completion_ids": ["a"], "gaps": [0.5]},
        {"prompt_ids": [1.5], "completion_ids": [2], "gaps": [0.5]},
        {"prompt_ids": [1], "completion_ids": [2], "gaps": ["0.5"]},
    ],
)
def test_a_golden_completion_of_the_wrong_form_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "golden.json").write_text(json.dumps(content))
    with pytest.raises(IntegrityError):
        read_golden(tmp_path)


def test_the_demo_that_we_ship_says_its_golden_completion() -> None:
    found = list(examine(Context(offline=True), [check_demo]))
    assert found and {one.status for one in found} == {"ok"}, found


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables with which torch cannot be imported: the doctor then needs a second."""
    broken = tmp_path_factory.mktemp("broken") / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    return {"PYTHONPATH": f"{broken.parent}:{REPOSITORY}"}


def test_a_torch_that_cannot_be_imported_is_a_problem_and_the_rest_is_examined(
    without_torch: dict[str, str], tmp_path: Path
) -> None:
    done = mistral("doctor", "--json", home=tmp_path, **without_torch)
    found = by_name(done.stdout)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert found["torch"]["status"] == "problem" and "libcudart.so.12" in found["torch"]["message"]
    assert "reinstall" in found["torch"]["hint"]
    assert found["python"]["status"] == found["token"]["status"] == "ok"


def test_neither_a_token_nor_a_password_is_ever_shown(without_torch: dict[str, str], tmp_path: Path) -> None:
    env = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"} | without_torch
    env |= {"HF_ENDPOINT": "http://me:secretword@127.0.0.1:9", "HTTPS_PROXY": "me:secretword@127.0.0.1:8"}
    done = mistral("doctor", home=tmp_path, **env)
    assert TOKEN not in done.stdout + done.stderr and "secretword" not in done.stdout + done.stderr
    assert "from HF_TOKEN" in done.stdout and "http://127.0.0.1:9" in done.stdout
    assert "127.0.0.1:8 (the proxy on the way to the Hub)" in done.stdout


def test_a_check_that_fails_is_a_problem_with_its_error() -> None:
    def check() -> list[Finding]:
        raise ZeroDivisionError("by nought")

    (found,) = guarded("sums", check)
    assert found.status == "problem" and found.message == "the check failed: ZeroDivisionError: by nought"
    assert found.hint


def test_a_pipe_gets_aligned_plain_lines_and_problems_with_what_to_do_below(
    without_torch: dict[str, str], tmp_path: Path
) -> None:
    env = {"HF_ENDPOINT": "huggingface", "HF_HUB_OFFLINE": "0", "FORCE_COLOR": "1"} | without_torch
    done = mistral("doctor", home=tmp_path, **env)
    assert done.returncode == 1 and done.stderr == "" and "\x1b" not in done.stdout
    for line in done.stdout.splitlines():
        assert re.match(r"(ok|note|problem) +\S.{25} \S|" + " " * 36 + r"\S", line), line
    assert done.stdout.startswith("ok       python                     3.")
    shown = (
        f"problem  hub                        HF_ENDPOINT is no address\n{' ' * 36}write it as https://HOST"
    )
    assert shown in done.stdout


@pytest.mark.parametrize(("env", "colored"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_the_status_is_coloured_on_a_terminal_unless_no_color_is_set(
    env: dict[str, str], colored: bool, without_torch: dict[str, str], tmp_path: Path
) -> None:
    child = pexpect.spawn(
        MISTRAL[0],
        [*MISTRAL[1:], "doctor", "--offline"],
        env=environment(tmp_path, **without_torch, **env),
        cwd=str(tmp_path),
        encoding="utf-8",
        timeout=60,
        dimensions=(50, 200),
    )
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 1
    assert ("\x1b[32mok       \x1b[0mpython" in child.before) == colored
    assert ("\x1b[31mproblem  \x1b[0mtorch" in child.before) == colored
    assert ("\x1b" in child.before) == colored
