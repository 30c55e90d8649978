"""The checks of `mistral doctor` that look at the machine: each in one that is as it should not be."""

import json
import os
import socket
import subprocess
import sys
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


def test_another_program_of_the_name_on_path_is_named_with_our_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = executable(tmp_path / "openstack" / "mistral", "echo workflows")
    ours = executable(tmp_path / "ours" / "mistral", "# from mistralcli.__main__ import main")
    monkeypatch.setenv("PATH", f"{other.parent}:{ours.parent}")
    found = here(check_path)["mistral"]
    assert found.status == "note" and found.hint is not None and "mistral-cli" in found.hint
    assert found.message == f"{other} is another program of that name on PATH and comes first"
    monkeypatch.setenv("PATH", f"{ours.parent}:{tmp_path}")
    assert here(check_path)["mistral"] == Finding("mistral", "ok", str(ours))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "not on PATH" in here(check_path)["mistral"].message


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
    ("fault", "part"),
    [(Fault("html"), "not the Hub"), (Fault("status", 503), "status 503")],
    ids=["page", "503"],
)
def test_an_answer_that_is_not_the_hubs_is_a_problem(fault: Fault, part: str, tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.faults["/api/models"] = fault
        found = alone("check_hub", tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url)["hub"]
    assert found["status"] == "problem" and part in found["message"] and found["hint"]


def test_an_unreachable_hub_is_a_problem_unless_nothing_may_be_asked_of_it(tmp_path: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # and does not listen
        host = f"127.0.0.1:{server.getsockname()[1]}"
        env = {"HF_ENDPOINT": f"http://{host}", "HF_HUB_OFFLINE": "0"}
        found = alone("check_hub", tmp_path, **env)["hub"]
        by_flag = alone("check_hub", tmp_path, "--offline", **env)["hub"]
    assert found["status"] == "problem" and host in found["message"] and found["hint"]
    assert (by_flag["status"], by_flag["message"]) == ("note", "not asked (--offline)")
    by_variable = alone("check_hub", tmp_path, **env | {"HF_HUB_OFFLINE": "1"})["hub"]
    assert (by_variable["status"], by_variable["message"]) == ("note", "not asked (HF_HUB_OFFLINE is set)")


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
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "MISTRAL_CLI_"))]:
        monkeypatch.delenv(name)
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


def test_kernels_that_are_turned_off_are_noted(tmp_path: Path) -> None:
    found = alone("check_kernels", tmp_path, MISTRAL_CLI_KERNELS="reference")
    assert found["attention (cpu)"]["status"] == "note" and found["swiglu (cpu)"]["status"] == "ok"
