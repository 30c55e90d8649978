"""The checks of `mistral doctor` that look at the machine: each in one that is as it should not be."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import TOKEN, Fault, HubServer
from program import environment

from mistralcli.doctor import Context, examine
from mistralcli.doctor.cuda import check_cuda
from mistralcli.doctor.findings import Check, Finding
from mistralcli.doctor.program import check_path
from mistralcli.doctor.settings import check_settings
from mistralcli.doctor.system import check_disk, examine_directory

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")

ONE_CHECK = """
import json, sys
from dataclasses import asdict
from mistralcli.doctor import CHECKS, Context, examine

wanted = [check for check in CHECKS if check.__name__ == sys.argv[1]]
found = examine(Context(offline="--offline" in sys.argv), wanted)
print(json.dumps([asdict(one) for one in found]))
"""


def alone(check: str, home: Path, *flags: str, **env: str) -> dict[str, dict[str, Any]]:
    """What one check finds, in a process of its own: the Hub's variables are read at its start."""
    command = [sys.executable, "-c", ONE_CHECK, check, *flags]
    done = subprocess.run(command, env=environment(home, **env), cwd=home, capture_output=True, check=True)
    return {found["name"]: found for found in json.loads(done.stdout)}


def here(check: Check) -> dict[str, Finding]:
    """What one check finds in this process."""
    return {one.name: one for one in examine(Context(offline=True), [check])}


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_what_may_be_another_program_of_the_name_is_noted_with_our_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openstack = executable(tmp_path / "openstack" / "mistral", "# from mistralclient.shell import main")
    shim = executable(tmp_path / "shims" / "mistral", 'exec pyenv exec mistral "$@"')
    ours = executable(tmp_path / "ours" / "mistral", "# from mistralcli.__main__ import main")
    executable(tmp_path / "ours" / "mistral-cli", "")
    for other in (openstack, shim):
        monkeypatch.setenv("PATH", f"{other.parent}:{ours.parent}")
        assert here(check_path)["mistral"] == Finding(
            "mistral",
            "note",
            f"{other} comes first on PATH and may be another program of that name",
            "if it is: mistral-cli is this program's other name",
        )
    monkeypatch.setenv("PATH", f"{ours.parent}:{tmp_path}:{openstack.parent}")
    assert here(check_path)["mistral"] == Finding("mistral", "ok", f"{ours}, before {openstack}")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not on PATH" in here(check_path)["mistral"].message


def test_a_program_that_may_be_run_but_not_read_may_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to other users
        Path(folder).chmod(0o755)
        program = executable(Path(folder) / "mistral", "# from mistralcli.__main__ import main")
        program.chmod(0o111)
        monkeypatch.setenv("PATH", folder)
        user = os.geteuid()
        if user == 0:  # who may read everything
            os.seteuid(65534)
        try:
            found = here(check_path)["mistral"]
        finally:
            os.seteuid(user)
    assert found.status == "note" and f"{program} comes first on PATH and may be" in found.message


@without_cuda
def test_a_driver_without_a_usable_device_is_a_problem_unless_it_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = executable(tmp_path / "nvidia-smi", "echo 999.10")
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = here(check_cuda)["cuda"]
    assert found.status == "problem" and "999.10" in found.message
    assert found.hint is not None and "torch" in found.hint
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert here(check_cuda)["cuda"].status == "note"


@without_cuda
def test_a_driver_that_does_not_work_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = executable(tmp_path / "nvidia-smi", "echo 'NVIDIA-SMI could not talk to the driver.'; exit 9")
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    found = here(check_cuda)["cuda"]
    assert found.status == "problem" and "could not talk to the driver" in found.message and found.hint
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert here(check_cuda)["cuda"].status == "note"


@without_cuda
def test_a_driver_without_a_device_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = executable(tmp_path / "nvidia-smi", "echo 'No devices were found'; exit 6")
    monkeypatch.setenv("PATH", str(tool.parent), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    expected = "the NVIDIA driver finds no device: models run on the CPU"
    assert here(check_cuda) == {"cuda": Finding("cuda", "note", expected)}


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 9", "#!/no/such/shell"], ids=["fails", "cannot be run"])
def test_a_device_that_torch_can_use_is_examined_though_nvidia_smi_fails(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "nvidia-smi", "").write_text(script)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    found = here(check_cuda)
    assert found["nvidia-smi"].status == "note" and "torch can use the devices" in found["nvidia-smi"].message
    assert "cuda:0" in found


def test_a_cache_that_cannot_be_made_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "hf"))
    found = here(check_disk)["cache"]
    assert found.status == "problem" and f"{tmp_path / 'file'} is a file" in found.message
    assert found.hint is not None and "HF_HOME" in found.hint


def test_too_little_room_for_a_model_is_noted_with_numbers(tmp_path: Path) -> None:
    found = examine_directory("cache", tmp_path / "not" / "yet", 5 * 10**17, "a model", "HF_HOME")
    assert found.status == "note" and "a model takes 500 PB" in found.message
    assert examine_directory("cache", tmp_path, 0, "a model", "HF_HOME").status == "ok"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert examine_directory("cache", tmp_path, 0, "a model", "HF_HOME").status == "problem"


def test_a_hub_that_answers_is_ok_and_gets_no_token(tmp_path: Path) -> None:
    with HubServer() as hub:
        found = alone("check_hub", tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)["hub"]
    assert found["status"] == "ok" and hub.url.removeprefix("http://") in found["message"]
    assert [(one.method, one.path, one.authorization) for one in hub.requests] == [
        ("HEAD", "/api/models", None)
    ]


@pytest.mark.parametrize(
    ("fault", "status", "part"),
    [(Fault("html"), "problem", "not the Hub"), (Fault("status", 503), "note", "status 503")],
    ids=["page", "503"],
)
def test_an_answer_that_is_not_the_hubs_is_a_problem_and_trouble_of_the_hub_a_note(
    fault: Fault, status: str, part: str, tmp_path: Path
) -> None:
    with HubServer() as hub:
        hub.faults["/api/models"] = fault
        found = alone("check_hub", tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url)["hub"]
    assert found["status"] == status and part in found["message"] and found["hint"]


def test_an_unreachable_hub_is_a_note_that_names_the_flag_which_skips_it(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # and does not listen
        host = f"127.0.0.1:{server.getsockname()[1]}"
        env = {"HF_ENDPOINT": f"http://{host}", "HF_HUB_OFFLINE": "0"}
        found = alone("check_hub", tmp_path, **env)["hub"]
        by_flag = alone("check_hub", tmp_path, "--offline", **env)["hub"]
    assert found["status"] == "note" and f"{host} cannot be reached" in found["message"]
    assert "pulls will fail" in found["message"] and "`--offline` skips this check" in found["hint"]
    assert (by_flag["status"], by_flag["message"]) == ("note", "not asked (--offline)")
    by_variable = alone("check_hub", tmp_path, **env | {"HF_HUB_OFFLINE": "1"})["hub"]
    assert (by_variable["status"], by_variable["message"]) == ("note", "not asked (HF_HUB_OFFLINE is set)")


def test_a_bad_endpoint_is_a_problem_only_where_it_is_used_and_the_token_is_found_nevertheless(
    tmp_path: Path,
) -> None:
    env = {"HF_ENDPOINT": "huggingface", "HF_TOKEN": TOKEN}
    asked = alone("check_hub", tmp_path, **env, HF_HUB_OFFLINE="0")
    assert asked["hub"]["status"] == "problem" and "HF_ENDPOINT" in asked["hub"]["message"]
    not_asked = alone("check_hub", tmp_path, **env, HF_HUB_OFFLINE="1")
    assert not_asked["hub"]["status"] == "note"
    for found in (asked, not_asked):
        assert found["token"]["message"] == "from HF_TOKEN"
    env["HF_ENDPOINT"] = "http://[::1"  # with which huggingface_hub cannot be imported
    found = alone("check_hub", tmp_path, "--offline", **env)
    assert found["hub"]["status"] == "note"
    assert found["token"]["status"] == "problem" and "HF_ENDPOINT" in found["token"]["message"]


def test_where_the_token_comes_from_is_said_and_a_bad_one_is_a_problem(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    assert (
        alone("check_hub", tmp_path)["token"]["message"] == "none: gated and private models cannot be pulled"
    )
    assert (
        alone("check_hub", tmp_path, HF_TOKEN_PATH=str(file))["token"]["message"] == f"from the file {file}"
    )
    bad = alone("check_hub", tmp_path, HF_TOKEN="hf_two words")["token"]
    assert bad["status"] == "problem" and "HF_TOKEN" in bad["message"] and "words" not in str(bad)


def test_settings_are_listed_with_what_they_set_and_unknown_ones_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in here(check_settings):
        monkeypatch.delenv(name, raising=False)
    assert here(check_settings)["settings"].message == "no environment variable changes a setting"
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("MISTRAL_CLI_MODLE", "x")
    monkeypatch.setenv("MISTRAL_CLI_MODEL", "nowhere/to-be-found")
    found = here(check_settings)
    assert found["HF_HOME"].message == f"{tmp_path} (where Hugging Face's tools keep their files)"
    assert found["MISTRAL_CLI_MODLE"].status == "note"
    assert "MISTRAL_CLI_MODEL" in str(found["MISTRAL_CLI_MODLE"].hint)
    assert found["MISTRAL_CLI_MODEL"].status == "problem"
    assert found["MISTRAL_CLI_MODEL"].hint == "get it with: mistral pull nowhere/to-be-found"


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("XDG_DATA_HOME", "/data", "/data ("),
        ("XDG_STATE_HOME", "/state", "/state ("),
        ("CUDA_VISIBLE_DEVICES", "", "empty ("),
        ("HTTP_PROXY", "http://me:secretword@host:1", "http://host:1 ("),
        ("https_proxy", "me:secretword@host:1", "host:1 ("),
    ],
)
def test_what_others_read_is_listed_without_user_and_password(
    name: str, value: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    found = here(check_settings)[name]
    assert found.status == "ok" and found.message.startswith(shown)


def test_a_value_that_turns_no_kernel_off_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_CLI_KERNELS", "reference")
    assert here(check_settings)["MISTRAL_CLI_KERNELS"].status == "ok"
    monkeypatch.setenv("MISTRAL_CLI_KERNELS", "foo")
    found = here(check_settings)["MISTRAL_CLI_KERNELS"]
    assert found.status == "note" and found.message.startswith("foo has no effect: only `reference`")


def test_kernels_that_are_turned_off_are_noted(tmp_path: Path) -> None:
    found = alone("check_kernels", tmp_path, MISTRAL_CLI_KERNELS="reference")
    assert found["attention (cpu)"]["status"] == "note" and found["int4_matmul (cpu)"]["status"] == "ok"
