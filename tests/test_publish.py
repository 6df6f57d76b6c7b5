"""`hydrahead push` against a Hub in this process: what is sent, refused, resumed and checked; the token is nowhere."""

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import _http
from transformers import AutoTokenizer
from transformers.utils import hub as transformers_hub
from typer.testing import CliRunner

from hydrahead.cli import app
from hydrahead.convert.teachers import EMBEDDED_TEACHER
from hydrahead.hub import publish
from hydrahead.hub.card import write_card
from hydrahead.hub.checkpoint import save_checkpoint
from hydrahead.modeling_hydrahead import HydraHeadForCausalLM
from hydrahead.tests.families import make_student
from hydrahead.tests.hub_server import TOKEN, Fault, Hub, drop, echo, running_hub, slow

MADE_FROM = {"teacher": "demo", "revision": None, "masks": {}, "forms": {}, "stages": []}
MADE_FROM |= {"inherited": {"license": "apache-2.0", "language": ["en"]}}
NAME = "me/hybrid"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "student"
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_TEACHER)
    save_checkpoint(make_student(vocab_size=2048), tokenizer, folder, MADE_FROM)
    return folder


@pytest.fixture
def student(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "student")


# Weights go to the storage of large files one by one, or into commits as the pipeline of `hf_xet` makes them.
IN_STORAGE = pytest.mark.parametrize("hub", ["storage"], indirect=True)
THROUGH_XET = pytest.mark.parametrize("hub", ["xet"], indirect=True)  # whose servers nobody stands in for here
IN_COMMITS = pytest.mark.parametrize("hub", ["regular"], indirect=True)


@pytest.fixture(params=["storage", "regular"])
def hub(request, tmp_path, monkeypatch) -> Hub:
    """A Hub, for this process and its children."""
    with running_hub() as hub:
        hub.large = hub.large if request.param != "regular" else lambda path: False
        for name, value in {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False}.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)  # which it would keep
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "storage")
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between attempts
        for name, value in {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}.items():
            monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture
def without_reload(monkeypatch) -> list:
    """What would have been loaded: a fresh process takes seconds, and is tested once."""
    loaded = []
    monkeypatch.setattr(publish, "reload", lambda *arguments: loaded.append(arguments) or 1)
    return loaded


def push(student: Path, *options: str):
    """The command; nothing it says holds the token."""
    result = CliRunner().invoke(app, ["push", str(student), NAME, *options])
    assert TOKEN not in result.output
    return result


def refused(student: Path, *options: str) -> str:
    """The one line that a push ends in."""
    result = push(student, *options)
    assert result.exit_code == 1 and result.stderr.strip().count("\n") == 0, result.output
    return result.stderr


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(hub: Hub, revision: str = "main") -> dict[str, bytes]:
    return {name: data for name, data in hub.repositories[NAME].files(revision).items() if name != ".gitattributes"}


@IN_STORAGE
def test_a_push_lists_uploads_checks_loads_and_tags(hub, student):
    result = push(student, "--private", "--tag", "v1")
    assert result.exit_code == 0, result.output
    repository = hub.repositories[NAME]
    commit = repository.tags["v1"]
    assert repository.private and published(hub, "v1") == files_of(student)
    said = result.output
    assert all(f"  {name}\n" in said for name in files_of(student))
    order = ["model.safetensors", f"uploaded: {commit}", "checksums of", "loaded from", f"/{NAME}/tree/v1"]
    assert [said.index(each) for each in order] == sorted(said.index(each) for each in order)
    assert f"loaded from {commit[:12]} without hydrahead: the folder's logits, bit for bit, for " in said
    card = (student / "README.md").read_text()
    assert f'name = "{NAME}"\nrevision = "v1"\n' in card and "license: apache-2.0" in card
    again = push(student, "--private", "--tag", "v1")
    assert again.exit_code == 0 and hub.sent("POST", "/commit/") == 1 and repository.tags == {"v1": commit}


@pytest.mark.slow
@IN_COMMITS
def test_a_commit_that_computes_otherwise_gets_no_tag(hub, student, monkeypatch):
    monkeypatch.setattr(publish, "verify", lambda *_: [])

    def spoil(handler):
        files = hub.repositories[NAME].files("main")
        files["config.json"] = files["config.json"].replace(b'"logit_scale_base": 64', b'"logit_scale_base": 65')

    hub.faults = [Fault("HEAD", "config.json", spoil)]
    assert "gives other logits than" in refused(student, "--tag", "v1") and not hub.repositories[NAME].tags


@IN_COMMITS
def test_a_dry_run_lists_and_neither_writes_nor_sends(hub, student):
    before = files_of(student)
    result = push(student, "--dry-run", "--tag", "v1")
    size = sum(map(len, before.values()))
    assert result.exit_code == 0 and f"{size:,}  bytes in {len(before)} files, to {NAME}, tag v1" in result.output
    assert not hub.log and files_of(student) == before


@IN_COMMITS
def test_without_a_tag_the_card_says_how_to_pin(hub, student, without_reload):
    assert push(student).exit_code == 0
    assert 'revision = "main"  # a commit in its place pins' in published(hub)["README.md"].decode()
    assert hub.repositories[NAME].tags == {}


@IN_COMMITS
def test_a_card_that_somebody_edited_goes_as_it_is(hub, student, without_reload):
    card = (student / "README.md").read_text().replace("# HydraHead of", "# My own words on")
    (student / "README.md").write_text(card)
    assert "README.md was edited: it goes as it is" in push(student).output
    assert published(hub)["README.md"].decode() == card


@pytest.mark.parametrize(
    ("method", "path", "answer"),
    [
        ("POST", "/preupload/", drop),
        ("PUT", "/storage/", drop),
        ("PUT", "/storage/", 500),
        ("POST", "/commit/", drop),
        ("POST", "/commit/", 503),
        ("GET", "/tree/", 500),
    ],
)
def test_what_fails_in_the_middle_goes_on_with_the_same_command(method, path, answer, hub, student, without_reload):
    if path == "/storage/" and not hub.large("model.safetensors"):
        pytest.skip("weights are part of the commit")
    hub.faults = [Fault(method, path, answer, times=100)]
    line = refused(student, "--tag", "v1")
    assert "the upload was interrupted" in line and "the same command goes on where it stopped" in line
    assert not hub.repositories[NAME].tags and not without_reload
    hub.faults = []
    assert push(student, "--tag", "v1").exit_code == 0
    assert published(hub, "v1") == files_of(student)


def test_a_short_failure_is_not_even_noticed(hub, student, without_reload):
    hub.faults = [Fault("POST", "/preupload/", 503), Fault("PUT", "/storage/", drop), Fault("POST", "/commit/", 502)]
    hub.faults = hub.faults if hub.large("a.safetensors") is False else hub.faults[:2]
    assert push(student, "--tag", "v1").exit_code == 0
    assert published(hub, "v1") == files_of(student)


def test_what_arrived_is_not_sent_twice(hub, student, without_reload):
    hub.faults = [Fault("POST", "/commit/", drop, times=100)]
    refused(student)
    stored = hub.sent("PUT", "/storage/")
    hub.faults = []
    assert push(student).exit_code == 0 and hub.sent("PUT", "/storage/") == stored
    commits = hub.sent("POST", "/commit/")
    assert push(student).exit_code == 0 and hub.sent("POST", "/commit/") == commits


@IN_COMMITS
@pytest.mark.parametrize(
    ("status", "path", "line"),
    [
        (401, "/api/repos/create", "the Hub does not know your token (401): `hf auth login`"),
        (403, "/api/repos/create", "your token may not write there (403): choose a name of your own"),
        (403, "/commit/", "your token may not write there (403)"),
        (409, "/commit/", "it was changed meanwhile (409): run the same command again"),
        (429, "/preupload/", "the Hub asks to wait (429)"),
        (400, "/api/validate-yaml", "the Hub refused it (400): "),
    ],
)
def test_what_the_hub_refuses_ends_in_one_line_that_says_what_to_do(status, path, line, hub, student, without_reload):
    before = files_of(student)
    for answer in (status, echo(status)):
        hub.faults = [Fault("POST", path, answer, times=100)]
        assert line in refused(student, "--tag", "v1")
        assert not without_reload
    # The card names a repository when there is one.
    assert path != "/api/repos/create" or files_of(student) == before


@THROUGH_XET
@pytest.mark.parametrize("status", [401, 403])
def test_what_the_storage_refuses_is_said_alike(status, hub, student, without_reload):
    hub.faults = [Fault("GET", "/xet-write-token/", status, times=100)]
    assert f"({status})" in refused(student) and not hub.sent("POST", "/commit/")


@IN_COMMITS
def test_no_message_log_or_file_holds_the_token(hub, student, without_reload, tmp_path, caplog, capfd):
    """Neither where the Hub repeats it, nor in a traceback, nor in what is written here or sent."""
    for status in (400, 401, 403, 500):
        hub.faults = [Fault("POST", "/commit/", echo(status), times=100)]
        assert "(token)" in refused(student) or status in (401, 403, 500)
        result = CliRunner().invoke(app, ["--debug", "push", str(student), NAME])
        assert isinstance(result.exception, ValueError) and TOKEN not in repr(result.exception.__cause__)
    hub.faults = []
    assert push(student).exit_code == 0
    said = capfd.readouterr()
    assert TOKEN not in caplog.text + said.out + said.err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert not any(TOKEN.encode() in data for data in published(hub).values())
    assert not any(TOKEN in path for _, path, _ in hub.log)


def test_a_slow_disk_at_the_other_end_is_waited_for(hub, student, without_reload):
    hub.faults = [
        Fault("PUT", "/storage/", slow(1)),
        Fault("POST", "/commit/", slow(1)),
        Fault("GET", "/tree/", slow(1)),
    ]
    assert push(student, "--tag", "v1").exit_code == 0 and published(hub, "v1") == files_of(student)


@IN_COMMITS
def test_a_folder_that_changes_while_it_is_read_is_found_by_its_checksums(hub, student, without_reload):
    """As by an evaluation that ends in the middle of an upload from a slow disk."""
    (student / "report.md").write_text("one")

    def change(handler):
        (student / "report.md").write_text("another")

    hub.faults = [Fault("GET", "/tree/", change)]
    line = refused(student, "--tag", "v1")
    assert f"{NAME}: report.md is not there as it is in {student}" in line and "run the same command again" in line
    assert not hub.repositories[NAME].tags and not without_reload
    assert push(student, "--tag", "v1").exit_code == 0 and published(hub, "v1") == files_of(student)


@IN_COMMITS
def test_a_tag_stands_for_one_state_of_the_folder(hub, student, without_reload):
    assert push(student, "--tag", "v1").exit_code == 0
    write_card(student)
    (student / "report.md").write_text("more")
    before = hub.sent("POST", "/preupload/")
    line = refused(student, "--tag", "v1")
    assert f"{NAME}: its tag v1 stands for another report.md; choose another tag" in line
    assert hub.sent("POST", "/preupload/") == before
    assert push(student, "--tag", "v2").exit_code == 0
    tags = hub.repositories[NAME].tags
    assert set(tags) == {"v1", "v2"} and tags["v1"] != tags["v2"]


@IN_COMMITS
def test_a_public_repository_is_no_private_one(hub, student, without_reload):
    assert push(student).exit_code == 0
    sent = hub.sent("POST", "/commit/")
    assert "is there and public; make it private on the Hub, or choose another name" in refused(student, "--private")
    assert hub.sent("POST", "/commit/") == sent


@IN_COMMITS
def test_what_was_there_before_stays_and_is_named(hub, student, without_reload):
    assert push(student).exit_code == 0
    hub.repositories[NAME].files("main")["notes.txt"] = b"mine"
    result = push(student)
    assert result.exit_code == 0 and "was there before: notes.txt" in result.output


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def link(folder: Path) -> None:
    (folder / "LICENSE").symlink_to("/etc/hostname")


def change_code(folder: Path) -> None:
    with (folder / "modeling_hydrahead.py").open("a") as file:
        file.write("import os\n")


def forget_licence(folder: Path) -> None:
    (folder / "made_from.json").write_text(json.dumps(MADE_FROM | {"inherited": {}}))


def edit_badly(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def forget_a_shard(folder: Path) -> None:
    shutil.copyfile(folder / "model.safetensors", folder / "model-00003-of-00003.safetensors")


@IN_COMMITS
@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (spoil_config, "no HydraHead student but a model of type llama"),
        (shutil.rmtree, "no student there (no config.json)"),
        (lambda folder: (folder / "optimizer.bin").touch(), "optimizer.bin: not part of a student; move it out"),
        (lambda folder: (folder / ".env").touch(), ".env: not part of a student"),
        (lambda folder: (folder / "model.gguf").touch(), "model.gguf: not part of a student"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer_config.json"),
        (lambda folder: (folder / "ops_hydrahead.py").unlink(), "has no ops_hydrahead.py"),
        (lambda folder: (folder / "README.md").unlink(), "has no README.md"),
        (lambda folder: (folder / "made_from.json").unlink(), "no student that says what it was made from"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors, a part of its weights"),
        (forget_a_shard, "model-00003-of-00003.safetensors: not part of its weights"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "does not say which file holds"),
        (lose_a_shard, "has no model-00002-of-00002.safetensors, a part of its weights"),
        (link, "LICENSE: a link, and what it leads to would be published"),
        (change_code, "modeling_hydrahead.py: not the code of this hydrahead"),
        (forget_licence, "the teacher's licence is not known: state one that it allows, hydrahead card"),
        (edit_badly, "README.md: its metadata cannot be read"),
    ],
)
def test_what_is_no_whole_student_is_refused_before_anything_is_sent_or_written(spoil, line, student, hub):
    spoil(student)
    before = files_of(student)
    assert line in refused(student) and not hub.log and files_of(student) == before


@IN_COMMITS
def test_a_licence_that_is_stated_is_enough(hub, student, without_reload):
    forget_licence(student)
    assert CliRunner().invoke(app, ["card", str(student), "--license", "mit"]).exit_code == 0
    assert push(student).exit_code == 0 and b"license: mit" in published(hub)["README.md"]


@IN_COMMITS
@pytest.mark.parametrize("name", ["hybrid", "me/hy brid", "me/a/b", "../hybrid"])
def test_a_repository_has_an_owner_and_a_name(name, student, hub):
    result = CliRunner().invoke(app, ["push", str(student), name])
    assert result.exit_code == 1 and "expected OWNER/NAME" in result.stderr and not hub.log


@IN_COMMITS
def test_without_a_token_or_a_network_nothing_is_tried(student, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set; unset it to push" in refused(student)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no token: `hf auth login`" in refused(student)
    assert not hub.log


def test_a_model_pushed_by_itself_brings_the_code_that_loads_it(hub, saved):
    """`model.push_to_hub`: transformers' own way, which leaves a card of its own that has no licence."""
    model = HydraHeadForCausalLM.from_pretrained(saved)
    model.push_to_hub(NAME)
    files = published(hub)
    assert set(publish.CODE) < set(files) and files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert json.loads(files["config.json"])["auto_map"]["AutoModelForCausalLM"].startswith("modeling_hydrahead.")
    assert "made_from.json" not in files and ModelCard(files["README.md"].decode()).data.license is None


def test_an_upload_of_the_folder_sends_what_a_push_sends(hub, saved):
    """`hf upload NAME FOLDER` is this call."""
    HfApi().create_repo(NAME)
    HfApi().upload_folder(repo_id=NAME, folder_path=saved)
    assert published(hub) == files_of(saved)
    assert set(publish.check_folder(saved)) == set(files_of(saved))


def test_what_a_card_shows_loads_and_generates(saved, monkeypatch, capsys):
    monkeypatch.chdir(saved)
    exec(re.search(r"```python\n(.*?)```", (saved / "README.md").read_text(), flags=re.S)[1], {})
    assert capsys.readouterr().out.startswith("The first thing to know is")
