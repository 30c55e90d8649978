"""Models on this machine: what a name means, what is listed, and what is removed."""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import REPOSITORY
from hub_models import PARAMS, online, write_checkpoint, write_weights
from hub_server import HubServer
from hypothesis import given
from hypothesis import strategies as st
from program import MISTRAL, assert_one_sentence, environment, mistral

from mistralcli import disk_usage, hub_cache, inventory, stamps, store
from mistralcli.cli.commands.du import du
from mistralcli.cli.commands.list_models import as_dict, row
from mistralcli.errors import IntegrityError, ModelNotFoundError, QualityError, UsageError
from mistralcli.hub_cache import HubModel, parse_hub_model
from mistralcli.units import size_text

MODEL = "mistralai/tiny"
OLD, NEW = "0" * 39 + "1", "1" + "0" * 39


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Store and cache of this process are under the test's directory, which is also the working directory."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(tmp_path).items():
        if name.startswith("XDG_"):
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add_build(name: str, *, card: dict[str, Any] | None = None) -> Path:
    directory = write_checkpoint(store.models_directory() / name)
    if card is not None:
        (directory / "quantization_card.json").write_text(json.dumps(card))
    return directory


def add_pulled(
    repo_id: str = MODEL, *, commit: str = NEW, ref: str | None = "main", n_shards: int = 1, seed: int = 0
) -> Path:
    """A snapshot as huggingface_hub lays it out: links into blobs that are named by their content."""
    repo = hub_cache.repo_directory(repo_id)
    snapshot = repo / "snapshots" / commit
    for directory in (repo / "blobs", repo / "refs", snapshot):
        directory.mkdir(parents=True, exist_ok=True)
    source = write_checkpoint(repo.parent / "source", n_shards=n_shards, seed=seed)
    for path in source.iterdir():
        blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    source.rmdir()
    if ref is not None:
        (repo / "refs" / ref).write_text(commit)
    return snapshot


def test_finding_a_model_does_not_wait_for_heavy_packages(home: Path) -> None:
    command = (
        "import sys, mistralcli.inventory; print(sorted({'torch', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], env=environment(home), capture_output=True, text=True
    )
    assert done.stdout == "[]\n"


# What a name means


def test_a_path_to_a_directory_comes_before_everything_else(home: Path) -> None:
    add_pulled(MODEL)
    assert store.resolve(str(write_checkpoint(home / "checkpoint"))) == home / "checkpoint"
    assert store.resolve("./checkpoint") == Path("checkpoint")
    write_checkpoint(home / MODEL)
    assert store.resolve(MODEL) == Path(MODEL)


def test_a_directory_s_bare_name_is_not_a_path(home: Path) -> None:
    write_checkpoint(home / "tiny")
    with pytest.raises(ModelNotFoundError):
        store.resolve("tiny")


def test_a_build_comes_before_a_pulled_model_of_the_same_name() -> None:
    add_pulled("tiny")
    build = add_build("tiny")
    assert store.resolve("tiny") == build
    shutil.rmtree(build)
    assert store.resolve("tiny") == hub_cache.repo_directory("tiny") / "snapshots" / NEW


@pytest.mark.parametrize("damage", ["missing", "config.json", "model.safetensors"])
def test_a_demo_that_is_not_in_the_package_is_an_incomplete_installation(
    damage: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = home / "mistralcli" / "demo_model"
    if damage != "missing":
        write_checkpoint(demo)
        (demo / damage).unlink()
    monkeypatch.setattr(store, "demo_directory", lambda: demo)
    with pytest.raises(IntegrityError, match="the installation is incomplete") as caught:
        store.resolve("demo")
    assert str(demo) in caught.value.message and "reinstall mistral-cli" in str(caught.value.hint)


def test_a_revision_is_a_branch_a_tag_a_commit_or_its_beginning() -> None:
    old, new = add_pulled(commit=OLD, ref="v1.0", seed=1), add_pulled(commit=NEW, seed=2)
    assert store.resolve(MODEL) == new
    assert store.resolve(f"{MODEL}@main") == new
    for revision in ("v1.0", OLD, OLD[:7]):
        assert store.resolve(f"{MODEL}@{revision}") == old
    for revision in ("v2", OLD[:6], "0" * 40):
        with pytest.raises(ModelNotFoundError):
            store.resolve(f"{MODEL}@{revision}")


def test_without_main_the_only_commit_is_meant_and_of_two_none() -> None:
    only = add_pulled(commit=OLD, ref="v1.0")
    assert store.resolve(MODEL) == only
    add_pulled(commit=NEW, ref="v2.0", seed=2)
    with pytest.raises(ModelNotFoundError):
        store.resolve(MODEL)


def test_mistral_s_own_layout_is_a_model(home: Path) -> None:
    (home / "own").mkdir()
    (home / "own" / "params.json").write_text(json.dumps(PARAMS))
    write_weights(home / "own" / "consolidated.safetensors")
    assert store.resolve("./own") == Path("own")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (MODEL, f"get it with: mistral pull {MODEL}"),
        (f"{MODEL}@v1", f"get it with: mistral pull {MODEL}@v1"),
        ("tiny", "mistral list"),
        ("./tiny", "mistral list"),
        ("not a name", "mistral list"),
        ("", "mistral list"),
    ],
)
def test_a_missing_model_says_how_to_get_it(name: str, hint: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        store.resolve(name)
    assert hint in (caught.value.hint or "")


def test_a_file_among_the_builds_is_no_model_and_never_the_nearest() -> None:
    store.models_directory().mkdir(parents=True)
    (store.models_directory() / "notes").touch()
    with pytest.raises(ModelNotFoundError) as caught:
        store.resolve("notes")
    assert "did you mean" not in (caught.value.hint or "")


def test_a_missing_model_names_the_nearest_that_is_here() -> None:
    add_build("mistral-7b-int4")
    with pytest.raises(ModelNotFoundError) as caught:
        store.resolve("mistral-7b-in4")
    assert "did you mean mistral-7b-int4?" in (caught.value.hint or "")


def test_a_directory_without_a_configuration_is_not_a_model(home: Path) -> None:
    (home / "empty").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"neither config\.json nor params\.json"):
        store.resolve("./empty")


@pytest.mark.parametrize("lost", ["model-00002-of-00003.safetensors", "model.safetensors.index.json"])
def test_a_checkpoint_without_all_its_weights_is_never_resolved(lost: str) -> None:
    snapshot = add_pulled(n_shards=3)
    (snapshot / "model-00002-of-00003.safetensors").resolve().unlink()
    (snapshot / lost).unlink()
    with pytest.raises(IntegrityError, match=r"1 of 3 weight files are missing, first model-00002-of-00003"):
        store.resolve(MODEL)


def test_an_index_that_is_not_an_index_is_an_integrity_error() -> None:
    index = add_pulled(n_shards=2) / "model.safetensors.index.json"
    index.resolve().write_text("{")
    with pytest.raises(IntegrityError, match=r"model\.safetensors\.index\.json"):
        store.resolve(MODEL)


def test_a_half_made_build_is_never_resolved(home: Path) -> None:
    add_build("tiny.partial")
    write_checkpoint(home / "other.partial")
    (store.models_directory() / "begun.partial").mkdir()
    for name in ("tiny.partial", "./other.partial", "begun.partial"):
        with pytest.raises(IntegrityError, match="half-made"):
            store.resolve(name)


# Names that become paths


def test_a_build_s_name_is_a_directory_of_the_store_and_a_path_is_itself(home: Path) -> None:
    assert store.build_directory("tiny-int4") == home / "data" / "mistral" / "models" / "tiny-int4"
    assert store.build_directory("./tiny") == Path("tiny")
    assert store.build_directory("/somewhere/tiny") == Path("/somewhere/tiny")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a@b",
        "a b",
        "x.partial",
        "-x",
        "a..b",
        "a\nb",
        "a\x1b",
        "ä",
        "x" * 200,
        "./" + "x" * 300,
        "./" + "x" * 255 + "/y",
    ],
)
def test_a_build_s_name_that_could_be_mistaken_is_refused(name: str) -> None:
    with pytest.raises(UsageError):
        store.build_directory(name)


@given(st.text(st.sampled_from("ab/.-@_\\ \0~"), max_size=12) | st.text(max_size=8))
def test_no_name_from_outside_leaves_the_cache(text: str) -> None:
    try:
        model = parse_hub_model(text)
    except UsageError:
        return
    assert str(model) == text
    cache = hub_cache.cache_directory()
    assert hub_cache.repo_directory(model.repo_id).parent == cache
    ref = Path(
        os.path.normpath(hub_cache.repo_directory(model.repo_id) / "refs" / (model.revision or "main"))
    )
    assert hub_cache.repo_directory(model.repo_id) / "refs" in ref.parents


@pytest.mark.parametrize(
    "text", ["mistralai/Mistral-7B-Instruct-v0.3", "gpt2", "a/b@main", "a/b@refs/pr/1", "a_b/c.d@v1.0-rc+1"]
)
def test_real_names_are_names(text: str) -> None:
    repo_id, _, revision = text.partition("@")
    assert parse_hub_model(text) == HubModel(repo_id, revision or None)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HF_HOME": "/hf"},
        {"HF_HOME": "~/hf"},
        {"HF_HOME": "$HOME/hf"},
        {"XDG_CACHE_HOME": "/cache"},
        {"HF_HUB_CACHE": "/hub", "HF_HOME": "/hf"},
        {"HUGGINGFACE_HUB_CACHE": "/hub"},
    ],
)
def test_the_cache_is_where_huggingface_hub_has_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    theirs_environment = {**environment(home), **variables}
    command = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    theirs = subprocess.run(
        [sys.executable, "-c", command], env=theirs_environment, capture_output=True, text=True
    )
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
        if name in theirs_environment:
            monkeypatch.setenv(name, theirs_environment[name])
    assert str(hub_cache.cache_directory()) == theirs.stdout.strip()


# What is listed


def test_builds_and_pulled_models_are_listed_with_what_they_are() -> None:
    card = {"scheme": "int4-g128", "source": {"name": "o/n", "revision": NEW}}
    build = add_build("tiny-int4", card=card)
    snapshot = add_pulled(commit=OLD, ref="v1.0")
    by_name = {model.name: model for model in inventory.list_models()}
    assert set(by_name) == {"tiny-int4", MODEL}
    listed, pulled = by_name["tiny-int4"], by_name[MODEL]
    assert (listed.kind, listed.scheme, listed.path, listed.broken) == ("build", "int4-g128", build, None)
    assert (pulled.kind, pulled.scheme, pulled.path, pulled.broken) == ("hub", "bfloat16", snapshot, None)
    assert (pulled.source, pulled.revision, pulled.refs) == (MODEL, OLD, ("v1.0",))
    assert (listed.source, listed.revision, listed.used) == ("o/n", NEW, None)
    assert pulled.size_bytes == sum(path.stat().st_size for path in snapshot.iterdir())


def test_what_is_broken_is_listed_as_such() -> None:
    add_build("half.partial")
    add_build("poor", card={"gate": {"passed": False}})
    (add_build("empty") / "model.safetensors").unlink()
    (add_pulled(n_shards=2) / "model-00001-of-00002.safetensors").unlink()
    (add_build("unread") / "config.json").write_text("{")
    (add_build("unrun") / "config.json").write_text('{"model_type": "mixtral"}')
    (store.models_directory() / "gone").symlink_to("/nowhere/at/all")
    add_build("begun.partial")
    (store.models_directory() / "begun.partial" / "journal.jsonl").touch()
    os.truncate(add_build("cut") / "model.safetensors", 100_000)
    (add_build("text") / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (add_build("nothing") / "config.json").unlink()
    (add_build("blotted", card={}) / "quantization_card.json").write_text("not JSON")
    broken = {model.name: model.broken for model in inventory.list_models()}
    expected = {
        "half.partial": ("half-made", "mistral rm half.partial"),
        "begun.partial": ("half-made", "mistral quantize --resume"),
        "poor": ("failed its quality gate", "more bits"),
        "empty": ("its weights are missing", "mistral rm empty"),
        "unread": ("cannot be read as JSON", "mistral quantize"),
        "unrun": ("'mixtral' are not supported", "mistral rm unrun"),
        "gone": ("a link to /nowhere/at/all", "mistral rm gone"),
        "cut": ("model.safetensors has 100,000 bytes instead of 200,", "mistral rm cut"),
        "text": ("model.safetensors is no safetensors file", "mistral rm text"),
        "nothing": ("neither config.json nor params.json", "mistral rm nothing"),
        "blotted": ("its quantization_card.json cannot be read", "mistral rm blotted"),
        MODEL: ("1 of 2 weight files are missing", f"mistral pull {MODEL}"),
    }
    assert broken.keys() == expected.keys()
    for name, (reason, remedy) in expected.items():
        found = broken[name]
        assert found is not None and reason in found.reason and remedy in found.remedy


def test_what_is_broken_is_never_run(home: Path) -> None:
    add_build("half.partial")
    add_build("poor", card={"gate": {"passed": False}})
    (add_build("empty") / "model.safetensors").unlink()
    (store.models_directory() / "gone").symlink_to("/nowhere/at/all")
    (add_build("nothing") / "config.json").unlink()
    for name in ("half.partial", "empty", "gone", "nothing"):
        with pytest.raises(IntegrityError):
            store.resolve_to_run(name)
    with pytest.raises(QualityError):
        store.resolve_to_run("poor")
    (add_build("unread") / "config.json").write_text("{")
    assert_one_sentence(mistral("run", "-m", "unread", "Hello.", home=home), 9, "config.json")


def test_a_download_that_was_interrupted_is_listed_as_half_pulled_and_its_part_is_a_leftover() -> None:
    snapshot = add_pulled()
    weights = (snapshot / "model.safetensors").resolve()
    part = weights.rename(weights.with_name(f"{weights.name}{hub_cache.PART_SUFFIX}"))
    (snapshot / "model.safetensors").unlink()
    (model,) = inventory.list_models()
    assert model.broken is not None
    assert model.broken.reason == "half-pulled" and f"mistral pull {MODEL}" in model.broken.remedy
    (leftovers,) = (usage for usage in disk_usage.disk_usage() if usage.kind == "leftovers")
    assert (leftovers.paths, leftovers.size_bytes) == ((part,), part.stat().st_size)
    disk_usage.remove(leftovers)
    assert not part.exists()


def test_a_snapshot_that_we_pulled_is_listed_however_broken_it_is() -> None:
    snapshot = add_pulled()
    (snapshot / "config.json").resolve().unlink()
    assert inventory.list_models() == []
    stamps.leave("pulled", snapshot)
    (model,) = inventory.list_models()
    assert model.broken is not None and "neither config.json nor params.json" in model.broken.reason


def test_models_of_other_kinds_in_the_shared_cache_are_left_out() -> None:
    (add_pulled("openai/whisper") / "config.json").resolve().write_text('{"model_type": "whisper"}')
    (add_pulled("someone/notes") / "config.json").unlink()
    for number, kind in enumerate(("[]", "{}", "null", "7")):
        config = add_pulled(f"someone/odd{number}") / "config.json"
        config.unlink()
        config.write_text(f'{{"model_type": {kind}}}')
    assert inventory.list_models() == []


def test_the_list_is_a_table_or_json(home: Path) -> None:
    without, as_json = mistral("list", home=home), mistral("list", "--json", home=home)
    assert without.stdout == "" and "built-in `demo`" in without.stderr and "mistral pull" in without.stderr
    assert json.loads(as_json.stdout) == [] and as_json.stderr == ""
    add_build("tiny-int4", card={"scheme": "int4-g128"})
    add_build("half.partial")
    add_pulled()

    table = mistral("list", home=home).stdout.splitlines()
    assert [line.split()[0] for line in table] == ["NAME", "half.partial", "tiny-int4", MODEL]
    assert "broken: half-made; make it again with `mistral quantize`" in table[1]
    assert [line.split()[2:4] for line in table[2:]] == [["-", "-"], ["-", "main"]]

    (_, build, pulled) = json.loads(mistral("list", "--json", home=home).stdout)
    assert (build["name"], build["kind"], build["scheme"], build["broken"]) == (
        "tiny-int4",
        "build",
        "int4-g128",
        None,
    )
    assert (pulled["name"], pulled["revision"], pulled["refs"]) == (MODEL, NEW, ["main"])


def test_a_name_with_escape_bytes_is_listed_without_them(home: Path) -> None:
    write_checkpoint(store.models_directory() / "evil\x1b[2J")
    for flags in ([], ["--json"]):
        listed = mistral("list", *flags, home=home)
        assert listed.returncode == 0 and "evil" in listed.stdout and "\x1b" not in listed.stdout


# What is removed


def test_removing_a_revision_keeps_what_another_one_shares() -> None:
    old, new = add_pulled(commit=OLD, ref="v1.0", seed=1), add_pulled(commit=NEW, seed=2)
    gone, kept = (old / "model.safetensors").resolve(), (old / "tokenizer.model").resolve()
    (model,) = inventory.find(f"{MODEL}@v1.0")
    inventory.remove(model)
    assert not old.exists() and not gone.exists() and kept.exists()
    assert store.resolve(MODEL) == new
    assert hub_cache.refs(MODEL) == {"main": NEW}
    assert not huggingface_hub.scan_cache_dir(hub_cache.cache_directory()).warnings


def test_removing_all_revisions_leaves_nothing_of_the_model_and_all_of_its_copies() -> None:
    add_pulled(commit=OLD, ref="v1.0", seed=1)
    add_pulled(commit=NEW, seed=2)
    copies = {f"copy{number}/tiny": add_pulled(f"copy{number}/tiny", commit=NEW) for number in range(5)}
    for model in inventory.find(MODEL):
        inventory.remove(model)
    assert not hub_cache.repo_directory(MODEL).exists()
    assert {name: store.resolve(name) for name in copies} == copies


def test_a_broken_pulled_model_can_be_removed() -> None:
    snapshot = add_pulled(n_shards=2)
    (snapshot / "model-00001-of-00002.safetensors").resolve().unlink()
    (hub_cache.repo_directory(MODEL) / "refs" / "gone").write_text(OLD)
    (model,) = inventory.find(MODEL)
    inventory.remove(model)
    assert not hub_cache.repo_directory(MODEL).exists()


def test_a_build_that_is_a_link_is_unlinked_and_its_target_stays(home: Path) -> None:
    target = write_checkpoint(home / "elsewhere")
    store.models_directory().mkdir(parents=True)
    (store.models_directory() / "linked").symlink_to(target)
    (model,) = inventory.find("linked")
    inventory.remove(model)
    assert target.is_dir() and inventory.list_models() == []


@pytest.mark.parametrize("name", ["tiny-int4", "half.partial"])
def test_a_build_is_removed_by_name_once_it_is_confirmed(home: Path, name: str) -> None:
    directory = add_build(name)

    refused = mistral("rm", name, home=home)
    assert (refused.returncode, refused.stdout) == (2, "") and "--yes" in refused.stderr
    assert directory.exists()

    removed = mistral("rm", name, "--yes", home=home)
    assert (removed.returncode, removed.stdout) == (0, "") and "removed" in removed.stderr
    assert not directory.exists()

    again = mistral("rm", name, "--yes", home=home)
    assert again.returncode == 3 and "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("answer", "is_removed"), [("y\n", True), ("yes\n", True), ("\n", False), ("n\n", False)]
)
def test_on_a_terminal_rm_asks_and_only_yes_is_yes(home: Path, answer: str, is_removed: bool) -> None:
    directory = add_build("tiny-int4")
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [*MISTRAL, "rm", "tiny-int4"],
        env=environment(home),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        os.write(ours, answer.encode())
        printed, said = process.communicate()
    os.close(ours)
    os.close(theirs)
    assert printed == b"" and b"remove tiny-int4 (200 kB)? [y/N]" in said
    assert directory.exists() is not is_removed
    assert process.returncode == (0 if is_removed else 1)


def test_rm_says_by_which_other_names_the_revision_goes(home: Path) -> None:
    snapshot = add_pulled(commit=OLD, ref="v1.0")
    (hub_cache.repo_directory(MODEL) / "refs" / "main").write_text(OLD)
    removed = mistral("rm", f"{MODEL}@v1.0", "--yes", home=home)
    assert removed.stderr.endswith(f", which is also {MODEL}@main\n") and not snapshot.exists()


@pytest.mark.parametrize("name", ["./checkpoint", "..", "/", "mistralai/missing", ""])
def test_rm_removes_nothing_that_is_not_listed(home: Path, name: str) -> None:
    directory = write_checkpoint(home / "checkpoint")
    assert mistral("rm", name, "--yes", home=home).returncode == 3
    assert directory.exists()


def test_rm_says_that_the_demo_is_built_in_and_that_a_name_is_empty(home: Path) -> None:
    assert_one_sentence(mistral("rm", "demo", "--yes", home=home), 2, "demo is built in")
    assert_one_sentence(mistral("rm", "", "--yes", home=home), 3, "the model's name is empty")
    add_build("demo")
    assert mistral("rm", "demo", "--yes", home=home).returncode == 0


def test_rm_says_what_becomes_free_not_what_another_revision_shares(home: Path) -> None:
    """The two revisions share all files but their weights."""
    old, _ = add_pulled(commit=OLD, ref="v1.0", seed=1), add_pulled(commit=NEW, seed=2)
    weights = (old / "model.safetensors").stat().st_size
    all_files = sum(path.stat().st_size for path in old.iterdir())
    assert disk_usage.freed_bytes(inventory.find(f"{MODEL}@v1.0")) == weights < all_files
    assert disk_usage.freed_bytes(inventory.find(MODEL)) == all_files + weights
    linked = store.models_directory() / "linked"
    linked.parent.mkdir(parents=True)
    linked.symlink_to(old)
    assert disk_usage.freed_bytes(inventory.find("linked")) == 0
    assert disk_usage.freed_bytes(inventory.find(MODEL)) == all_files + weights


def test_what_is_there_of_an_unfinished_file_goes_with_the_last_revision_and_holes_do_not_count() -> None:
    old, new = add_pulled(commit=OLD, ref="v1.0", seed=1), add_pulled(commit=NEW, seed=2)
    part = hub_cache.repo_directory(MODEL) / "blobs" / f"{'0' * 64}{hub_cache.PART_SUFFIX}"
    with part.open("wb") as file:
        file.write(b"x" * 8192)
        file.truncate(10**9)
    weights = (old / "model.safetensors").stat().st_size
    others = sum(path.stat().st_size for path in new.iterdir())
    assert disk_usage.freed_bytes(inventory.find(f"{MODEL}@v1.0")) == weights
    assert disk_usage.freed_bytes(inventory.find(MODEL)) == weights + others + 8192
    (leftovers,) = (usage for usage in disk_usage.disk_usage() if usage.kind == "leftovers")
    assert leftovers.size_bytes == 8192


def test_a_link_in_the_store_takes_no_room(home: Path) -> None:
    store.models_directory().mkdir(parents=True)
    (store.models_directory() / "linked").symlink_to(write_checkpoint(home / "elsewhere"))
    (usage,) = (usage for usage in disk_usage.disk_usage() if usage.kind == "build")
    assert usage.size_bytes == 0


def test_what_another_process_fetches_is_not_removed(home: Path) -> None:
    snapshot, other = add_pulled(), add_pulled("o/other")
    stamps.leave("pulled", snapshot)
    stamps.leave("pulled", other)
    lock = hub_cache.lock_path(MODEL, "0" * 64)
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        one = mistral("rm", MODEL, "--yes", home=home)
        assert_one_sentence(one, 2, f"{MODEL} is being pulled by another process")
        every = mistral("rm", "--all", "--yes", home=home, PYTHONPATH=str(package_copy(home)))
        assert every.returncode == 2 and "by another process" in every.stderr
        assert snapshot.is_dir() and other.is_dir()
    assert mistral("rm", MODEL, "--yes", home=home).returncode == 0
    assert other.is_dir() and not snapshot.exists()


@pytest.mark.parametrize("locked", ["tiny.partial", "tiny.spool.partial"])
def test_no_part_of_a_build_that_is_being_made_is_removed(locked: str, home: Path) -> None:
    for name in ("tiny.partial", "tiny.spool.partial", "tiny"):
        add_build(name)
    descriptor = os.open(store.models_directory() / locked, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    for name in ("tiny.partial", "tiny.spool.partial"):
        (model,) = inventory.find(name)
        with pytest.raises(UsageError, match="is being made by another process"):
            inventory.remove(model)
    os.close(descriptor)
    for name in ("tiny", "tiny.partial", "tiny.spool.partial"):
        inventory.remove(inventory.find(name)[0])
    assert inventory.list_models() == []


def test_rm_all_removes_what_is_ours_and_nothing_else_s(home: Path) -> None:
    builds = [add_build("tiny-int4"), add_build("half.partial")]
    hidden = store.models_directory() / ".git"
    hidden.mkdir()  # of some other tool: ours makes none
    ours, theirs = add_pulled("o/ours"), add_pulled("o/theirs")
    stamps.leave("pulled", ours)
    other_kind = add_pulled("openai/whisper")
    (other_kind / "config.json").resolve().write_text('{"model_type": "whisper"}')
    chat = home / "state" / "mistral" / "history"
    chat.write_text("what I typed")
    kept = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    refused = mistral("rm", "--all", home=home)
    assert refused.returncode == 2 and "--yes" in refused.stderr and "o/ours" in refused.stderr
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == kept

    package = package_copy(home)
    kernels = kernel_files(home, package)
    done = mistral("rm", "--all", "--yes", home=home, PYTHONPATH=str(package))
    assert (done.returncode, done.stdout) == (0, "")
    assert not any(path.exists() for path in (*builds, hub_cache.repo_directory("o/ours"), *kernels))
    assert hidden.is_dir() and theirs.is_dir() and other_kind.is_dir() and chat.read_text() == "what I typed"
    assert [model.name for model in inventory.list_models()] == ["o/theirs"]
    assert stamps.when("pulled", ours) is None
    again = mistral("rm", "--all", "--yes", home=home, PYTHONPATH=str(package))
    assert again.returncode == 0 and "nothing to remove" in again.stderr


def package_copy(home: Path) -> Path:
    """The program elsewhere, so that the kernels which this checkout has compiled stay."""
    package = home / "package"
    if not package.is_dir():
        for name in ("mistralcli", "quant"):
            ignored = shutil.ignore_patterns("__pycache__", "demo_model")
            shutil.copytree(REPOSITORY / name, package / name, ignore=ignored)
    return package


def kernel_files(home: Path, package: Path) -> list[Path]:
    """A compiled kernel of that program in each of the places where some are kept."""
    beside = [package / name / "kernels" / "cpu" / "__pycache__" for name in ("quant", "mistralcli")]
    files = [place / "kernels" / "0" / "kernel.o" for place in (*beside, home / "cache" / "mistral")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"code")
    return files


def test_rm_takes_a_model_or_all_and_not_both(home: Path) -> None:
    assert_one_sentence(mistral("rm", "--yes", home=home), 2, "--all")
    assert_one_sentence(mistral("rm", "tiny", "--all", "--yes", home=home), 2, "--all")


# What is recorded, and what takes how much


def test_a_run_is_recorded_with_the_time_of_the_last(home: Path, tiny_model_dir: Path) -> None:
    build = store.models_directory() / "tiny"
    shutil.copytree(tiny_model_dir, build)
    assert inventory.find("tiny")[0].used is None
    assert mistral("run", "-m", "tiny", "-n", "1", "Hello.", home=home).returncode == 0
    used = inventory.find("tiny")[0].used
    assert used is not None and datetime.now(UTC) - used < timedelta(minutes=5)
    assert as_dict(inventory.find("tiny")[0])["last_used"] == used.isoformat()
    assert row(inventory.find("tiny")[0])[6] == used.astimezone().strftime("%Y-%m-%d %H:%M")
    inventory.remove(inventory.find("tiny")[0])
    assert stamps.when("used", build) is None


def test_a_state_directory_that_cannot_be_written_is_no_matter(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = add_build("tiny")
    (home / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "file"))
    store.note_use(build)
    assert inventory.find("tiny")[0].used is None


def test_a_directory_of_the_user_s_own_is_not_recorded(home: Path) -> None:
    store.note_use(write_checkpoint(home / "checkpoint"))
    assert not (home / "state").exists()


def test_du_counts_every_byte_once_and_says_whose_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(disk_usage, "places", lambda package: [home / "kernels"])  # not this checkout's
    (home / "kernels" / "0").mkdir(parents=True)
    (home / "kernels" / "0" / "kernel.o").write_bytes(b"code")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(home / "triton"))
    (home / "triton").mkdir()
    (home / "triton" / "kernel.cubin").write_bytes(b"x" * 7)
    build = add_build("tiny-int4")
    add_pulled(commit=OLD, ref="v1.0", seed=1)
    stamps.leave("pulled", add_pulled(commit=NEW, seed=2))
    stamps.leave("pulled", add_pulled("o/ours"))
    chats = home / "state" / "mistral" / "sessions"
    chats.mkdir()
    (chats / "1.json").write_text("{}")
    rows = {(usage.kind, usage.name): usage for usage in disk_usage.disk_usage()}

    def on_disk(directory: Path) -> int:
        files = (path for path in directory.rglob("*") if path.is_file() and not path.is_symlink())
        return sum(path.stat().st_size for path in files)

    repository = hub_cache.repo_directory(MODEL)
    assert rows["build", "tiny-int4"].size_bytes == on_disk(build)
    assert rows["pulled", MODEL].size_bytes == on_disk(repository)
    assert {key[1]: usage.ours for key, usage in rows.items() if key[0] == "pulled"} == {
        MODEL: False,
        "o/ours": True,
    }
    assert rows["chats", "sessions and history"].size_bytes == 2
    assert rows["kernels", "compiled for this CPU"].size_bytes == 4
    triton = rows["kernels", "compiled by Triton"]
    assert (triton.size_bytes, triton.ours) == (7, False)
    as_json = json.loads(mistral("du", "--json", home=home, TRITON_CACHE_DIR=str(home / "triton")).stdout)
    assert {(one["kind"], one["name"], one["size_bytes"]) for one in as_json if one["kind"] != "kernels"} == {
        (usage.kind, usage.name, usage.size_bytes) for usage in rows.values() if usage.kind != "kernels"
    }
    du()
    text = capfd.readouterr().out
    assert "tiny-int4" in text and "shared with other tools" in text and "total" in text


def test_a_pull_is_recorded_unless_another_tool_had_begun_it(home: Path) -> None:
    with HubServer({MODEL: write_checkpoint(home / "source")}) as hub:
        commit = hub.repos[MODEL].refs["main"]
        assert mistral("pull", MODEL, home=home, **online(home, hub)).returncode == 0
        hub.add("o/theirs", home / "source")
        snapshots = home / "hf" / "hub" / "models--o--theirs" / "snapshots"
        (snapshots / commit).mkdir(parents=True)
        assert mistral("pull", "o/theirs", home=home, **online(home, hub)).returncode == 0
    ours = home / "hf" / "hub" / "models--mistralai--tiny" / "snapshots" / commit
    assert stamps.when("pulled", ours) is not None
    assert stamps.when("pulled", snapshots / commit) is None and (snapshots / commit / "config.json").exists()


def test_sizes_have_three_digits() -> None:
    sizes = (0, 999, 1_000, 999_499, 999_500, 2_450_000, 14_483_464_192, 10**17)
    expected = ["0 B", "999 B", "1.00 kB", "999 kB", "1.00 MB", "2.45 MB", "14.5 GB", "100 PB"]
    assert [size_text(size) for size in sizes] == expected
